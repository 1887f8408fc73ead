"""The parser of Lightning's verbs: what a recipe may name, and a help that does not explain every option of Trainer.

Not here: building and running what was parsed (``cli.py``).
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import class_from_function
from lightning.pytorch.cli import LightningArgumentParser

from lightning_igpt.commands.arguments import SEEDS
from lightning_igpt.commands.help_text import Entry, Section, entry_of
from lightning_igpt.commands.parsers import PRINT_CONFIG, VerbParser
from lightning_igpt.trainer import make_trainer

# What a recipe may name as a class. Any other name is refused before its module is imported, which would run its code.
TRUSTED = ("lightning", "lightning_igpt", "torch.optim", "torchmetrics")
ALL_OF_TRAINER = "--trainer.help"  # a word of the command line, not an option that a recipe could have
DRY_RUN, TRUST = "--dry_run", "--trust"
OWN = frozenset(f"trainer.{name}" for name in inspect.signature(make_trainer).parameters if name != "kwargs")
FIRST = {"trainer.default_root_dir", "trainer.accumulate_grad_batches", "trainer.num_nodes", "trainer.logger"}
ABOUT = {
    "fit": "Train: pretraining, probing or fine-tuning, whichever the recipe names.",
    "validate": "Run the validation loop of a recipe on a checkpoint.",
    "test": "Run the test loop of a recipe on a checkpoint.",
    "predict": "Complete images (pretraining) or classify them (probe, fine-tune), and write PNG files or a CSV file.",
}
CHECKPOINT = Entry("--ckpt_path CHECKPOINT", "Checkpoint of a run of this recipe, whose weights are taken.")
TEXTS = {
    "config": Entry(
        "-c, --config RECIPE",
        "A YAML file, or the name of a shipped recipe (lightning-igpt recipes list). Several merge, the last wins; "
        "options that follow win over all.",
    ),
    "model": Entry("--model CLASS", "PretrainModule, ProbeModule or FineTuneModule; its options are --model.NAME."),
    "data": Entry(
        "--data CLASS", "PretrainDataModule, ProbeDataModule or FineTuneDataModule; its options are --data.NAME."
    ),
    "ckpt_path": CHECKPOINT,
    "seed_everything": Entry(
        "--seed_everything N",
        f"Of weights, order and draws, from 0 to {SEEDS - 1}; true takes a random one. Default: 0.",
    ),
}
GO_ON = Entry("--ckpt_path CHECKPOINT", "Checkpoint of this run to go on from; --resume auto finds the newest.")
EXTRA = (
    Entry("--dry_run", "Print what would run, with sizes and, for fit, memory and time; train and write nothing."),
    Entry("--trust NAME", "A package, module or class that the recipe may name beside lightning's and this package's."),
    Entry("--print_config", PRINT_CONFIG),
)
ORDER = ("config", "model", "data", "resume", "ckpt_path", "random_weights", "seed_everything")
MORE = (
    Entry("--model.help CLASS", "The options of a model, such as --model.help PretrainModule."),
    Entry("--data.help CLASS", "The options of a data module, such as --data.help PretrainDataModule."),
    Entry("--trainer.help", "This help with every option of the trainer explained."),
    Entry("--trainer.callbacks.help CLASS", "The options of a callback, such as CompletionGrid."),
    Entry("-h, --help", "Show this help and exit."),
)


class LightningVerbParser(VerbParser, LightningArgumentParser):
    """LightningCLI's parser, with this package's help and errors."""

    whole = False  # explain every option of Trainer
    beside = (DRY_RUN, TRUST)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """As every verb does; and tell what to do about a class that a recipe may not name.

        jsonargparse's advice on that is for programmers.
        """
        refused = re.search(r"Importing '([\w.]+)' is not allowed", message)
        if refused is not None:
            taken = ", ".join(TRUSTED)
            raise SystemExit(
                f"{self.words}: {refused[1]} is named, and naming a class runs its module; only classes of {taken} are "
                f"taken unasked. If you trust it: --trust {refused[1].split('.')[0]}"
            )
        super().error(message, ex)

    def add_lightning_class_args(self, lightning_class: Any, nested_key: str, *args: Any, **options: Any) -> list[str]:
        """Leave out what make_trainer is told of model and data: on the command line both are known."""
        if lightning_class is not make_trainer:
            return super().add_lightning_class_args(lightning_class, nested_key, *args, **options)
        made, skip = class_from_function(make_trainer), {"module", "data"}
        options = {"fail_untyped": False, "instantiate": False, "sub_configs": True, "skip": skip}
        return list(self.add_class_arguments(made, nested_key, **options))

    @property
    def about(self) -> str:
        """What the verb does."""
        return ABOUT.get(self.words.rpartition(" ")[2], "") or super().about

    def needed(self) -> list[argparse.Action]:
        """Nothing that would be the same for every recipe."""
        return []

    def sections(self, actions: list[argparse.Action]) -> list[Section]:
        """What runs; the trainer's options that most need; names of the others; where to read more."""
        verb = self.words.rpartition(" ")[2]
        own = (action for action in actions if "." not in action.dest)
        texts = {action.dest: entry_of(action, switches=False) for action in own} | TEXTS
        texts["ckpt_path"] = GO_ON if verb == "fit" else CHECKPOINT
        known = {"config", *(action.dest for action in actions)}
        first = [texts[name] for name in ORDER if name in known]
        trainer = [action for action in actions if action.dest.startswith("trainer.")]
        told = [action for action in trainer if self.whole or action.dest in OWN | FIRST]
        names = [action.option_strings[0].removeprefix("--trainer.") for action in trainer if action not in told]
        return [
            Section("what to run", [*first, *EXTRA]),
            Section("the trainer", [entry_of(action, switches=False) for action in told]),
            Section("further options of Lightning's Trainer, as --trainer.NAME", text=" ".join(names)),
        ]

    def usage_line(self) -> str:
        """How to call it."""
        verb = self.words.rpartition(" ")[2]
        return f"{self.words} --config RECIPE {'' if verb == 'fit' else '--ckpt_path CHECKPOINT '}[options]"

    def _always(self) -> list[Entry]:
        return [*MORE]


class WholeLightningVerbParser(LightningVerbParser):
    """The same, for ``--trainer.help``."""

    whole = True


def without_flags(words: Sequence[str]) -> tuple[list[str], bool, bool]:
    """(the words without ``--dry_run`` and ``--trainer.help``, whether the one was there, and the other).

    Both are for the command line only; ``--trainer.help`` becomes ``--help``.
    """
    dry = [word for word in words if _means(word.partition("=")[0], DRY_RUN, least="--dr")]
    rest = ["--help" if word == ALL_OF_TRAINER else word for word in words if word not in dry]
    return rest, any(not word.lower().endswith("=false") for word in dry), ALL_OF_TRAINER in words


def _means(word: str, option: str, *, least: str) -> bool:
    """Whether a word is an option of two dashes, or its beginning, ``least`` being the shortest that means no other."""
    plain = f"--{word[2:].replace('-', '_')}"
    return word.startswith(least) and option.startswith(plain)


def without_trust(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without ``--trust NAME``, and the names: packages, modules or classes that a recipe may name too.

    Only the command line is asked, never a recipe: it could not be stopped from trusting itself.

    Raises:
        SystemExit: A name is missing or is none.
    """
    rest: list[str] = []
    trusted: list[str] = []
    remaining = iter(words)
    for word in remaining:
        flag, equals, value = word.partition("=")
        if not _means(flag, TRUST, least="--tru"):
            rest.append(word)
            continue
        name = value if equals else next(remaining, "")
        if not name or not all(part.isidentifier() for part in name.split(".")) or name.split(".")[0] == "jsonargparse":
            raise SystemExit(f"lightning-igpt: --trust {name}: name a package, module or class, such as my_package")
        trusted.append(name)
    return rest, trusted
