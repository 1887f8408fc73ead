"""Lightning's verbs: LightningCLI in subclass mode, with this package's classes known by their short names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import capture_parser, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_igpt import callbacks, data, modules
from lightning_igpt.callbacks.disk_check import check_folder
from lightning_igpt.checkpointing import check_resumable, find_checkpoint
from lightning_igpt.commands import dry_run, recipes
from lightning_igpt.commands.arguments import check_seed, one_line_errors
from lightning_igpt.commands.lightning_parser import (
    TRUSTED,
    LightningVerbParser,
    WholeLightningVerbParser,
    without_flags,
    without_trust,
)
from lightning_igpt.commands.places import check_places
from lightning_igpt.commands.predictions import write_predictions
from lightning_igpt.commands.trainer_names import check_names
from lightning_igpt.trainer import make_trainer
from lightning_igpt.weights.safety import check_opens_safely

__all__ = ["IGPTCLI", "callbacks", "data", "modules", "run"]  # importing the classes makes their short names known

CHECKPOINT_WORDS = ("best", "last", "hpc", "registry")  # what Lightning takes for ckpt_path beside a path


RESUME = (
    "Go on with an interrupted run: auto takes the newest whole checkpoint of this model where the trainer saves, and "
    "starts anew where there is none; a run folder or a checkpoint must be there."
)
RANDOM = "Run although no weights are given: what a network that was never trained does, as a baseline."


class IGPTCLI(LightningCLI):
    """LightningCLI whose recipes may refer to each other's values and whose flags a checkpoint never changes."""

    def __init__(self, model: type, data: type, *, args: Sequence[str], **options: Any) -> None:
        self._verb = args[0] if args else None
        super().__init__(model, data, args=list(args), **options)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse without Lightning's warning about ``sys.argv``, which here holds the same words."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone.

        Lightning's own version lets the hyperparameters in the checkpoint win over recipe and flags without a word.
        Here the modules compare themselves with the checkpoint when it is loaded, and say what differs.
        """

    def _set_seed(self) -> None:
        """Seed everything, once the seed is known to be one."""
        check_seed("seed_everything", self._get(self.config, "seed_everything"))
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Check the names of classes."""
        check_names(self.config[self.subcommand]["trainer"])

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, planned for model and data; only ``fit`` has to be told how long to train."""
        options = self._get(self.config_init, "trainer", default={})
        if self.subcommand == "fit":
            kwargs |= {"module": self.model, "data": self.datamodule}
        elif options.get("max_steps", -1) < 1 and options.get("max_epochs") is None:
            kwargs["max_epochs"] = 1
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ModuleNotFoundError, TypeError, ValueError) as error:
            raise ValueError(f"trainer: {error}") from error  # what Lightning refuses is the user's business, too

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, without ``weights_only``: a recipe could set it to false, and checkpoints then run code."""
        return {verb: {*skipped, "weights_only"} for verb, skipped in LightningCLI.subcommands().items()}

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        options = super()._prepare_subcommand_kwargs(subcommand)
        path = options.get("ckpt_path")
        if path and str(path).split(":")[0] not in CHECKPOINT_WORDS:
            check_opens_safely(path)  # our modules do it themselves; a recipe may name others
        return options | {"weights_only": True}

    def before_validate(self) -> None:
        """Refuse to evaluate random weights."""
        self._need_weights()

    before_test = before_predict = before_validate

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self._verb in self.subcommands() and subcommand != self._verb:
            return self.init_parser(**kwargs)  # nobody asks it; the options of all four take a third of a second
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "fit":
            parser.add_argument("--resume", type=str | None, default=None, help=RESUME)
        else:
            parser.add_argument("--random_weights", type=bool, default=False, help=RANDOM)
        return parser

    def before_fit(self) -> None:
        """Find the checkpoint to go on from, or tell that it is not there, before anything is set up."""
        options, root = self.config_init["fit"], self._place()
        if root is not None:
            self.check_folder(root)
        path, resume = options.get("ckpt_path"), options.get("resume")
        if resume and path:
            raise ValueError(
                f"--resume {resume} and --ckpt_path {path} both name the checkpoint to go on from; drop one"
            )
        if resume:
            options["ckpt_path"] = self._found(resume)
            self.trainer.callbacks.append(callbacks.SameCheckpoint(options["ckpt_path"]))  # type: ignore[attr-defined]
        elif path and path not in CHECKPOINT_WORDS and "://" not in path and not Path(path).exists():
            raise FileNotFoundError(f"ckpt_path {path} is no file; it names the checkpoint of a run to continue")

    def _place(self) -> Path | None:
        """Where a run saves, once it is known that it can; None where it does not, or not in this file system."""
        root = str(self.trainer.default_root_dir)
        if "://" in root or getattr(self.trainer, "fast_dev_run", False):
            return None
        check_places([root])
        return Path(root)

    def check_folder(self, folder: Path) -> None:
        """Raise OSError where nothing can be saved in a folder; makes it where it does not exist."""
        check_folder(folder, 0)

    def _found(self, resume: str) -> str | None:
        """The checkpoint that ``--resume`` means; None for a run that has none yet."""
        if resume.lower() == "auto":
            found = find_checkpoint(self.trainer, self.model)
            if found is None:
                rank_zero_info(f"--resume auto: {self.trainer.default_root_dir} has no run yet, so one starts")
            return None if found is None else str(found)
        place = Path(resume).expanduser()
        if not place.exists():
            raise FileNotFoundError(f"--resume {resume}: there is no such file or folder; say auto, or name one")
        if place.is_file():
            check_resumable(place, self.model)
            return str(place)
        found = find_checkpoint(place, self.model)
        if found is None:
            raise FileNotFoundError(
                f"--resume {resume}: the folder holds no checkpoint; --resume auto would start anew"
            )
        return str(found)

    def predict(self, **options: Any) -> None:
        """Run ``predict`` and keep what it gives: completed images as PNG files, class probabilities as CSV."""
        if self.trainer.world_size > 1:
            raise ValueError("predict writes one file in the order of the images: pass --trainer.devices 1")
        batches: list[Any] = list(self.trainer.predict(**options) or [])
        if not all(isinstance(batch, Tensor) and batch.ndim in (2, 4) for batch in batches):
            rank_zero_info("predictions are neither images (B, 3, S, S) nor probabilities (B, C): nothing is written")
        elif batches:
            folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "predictions"
            ask = getattr(self.datamodule, "left_out_of_predictions", set)
            names = getattr(self.model, "class_names", None)
            written = write_predictions(torch.cat(batches), folder, names, left_out=ask())
            rank_zero_info(f"wrote {written}")

    def _need_weights(self) -> None:
        self._place()
        options = self.config[self.subcommand]
        given, cure = options.get("ckpt_path"), "pass --ckpt_path with the checkpoint of a run"
        if options["model"]["class_path"].endswith("PretrainModule"):  # classifiers are in checkpoints alone
            given = given or options["model"].get("init_args", {}).get("pretrained")
            cure += " (or model.init_args.pretrained)"
        if not given and not options["random_weights"]:
            raise ValueError(
                f"{self.subcommand} would run on random weights: {cure}; --random_weights true if that is what you want"
            )


class _DryRun(IGPTCLI):
    """Tells what would run, and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        getattr(self, f"before_{subcommand}")()
        checkpoint = self.config_init[subcommand].get("ckpt_path")
        for line in dry_run.lines(subcommand, self.trainer, self.model, self.datamodule, checkpoint):
            print(line)  # noqa: T201

    def check_folder(self, folder: Path) -> None:
        """Nothing is written, not even to see whether it could be."""


def run(words: Sequence[str]) -> IGPTCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        words: The verb and its options. ``--config`` takes a file or the name of a shipped recipe.

    Raises:
        SystemExit: Wrong usage (2), or a mistake in what the user gave (1), told in one line.
    """
    words, trusted = without_trust(words)
    words, dry, whole = without_flags(words)
    warn_of_restarts()
    warnings.filterwarnings("ignore", ".*LeafSpec.*")  # Lightning's to mend; it stands there like an error
    with one_line_errors(f"lightning-igpt {words[0]}"):
        return _run(_DryRun if dry else IGPTCLI, with_shipped_recipes(words), trusted, whole=whole)


def parser() -> LightningVerbParser:
    """The parser of all four verbs, for those who want to know their options."""
    found: LightningVerbParser = capture_parser(lambda: _run(IGPTCLI, []))
    return found


def _run(kind: type[IGPTCLI], words: list[str], trusted: Sequence[str] = (), *, whole: bool = False) -> IGPTCLI:
    set_parsing_settings(
        # Interpolations like ${trainer.max_steps} are written from the recipe's root, below which the verb lies.
        omegaconf_absolute_to_relative_paths=True,
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*"],
        import_path_allowlist=[*TRUSTED, *trusted],
    )
    return kind(
        LightningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        trainer_class=make_trainer,
        parser_class=WholeLightningVerbParser if whole else LightningVerbParser,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,  # the modules keep their own plain hyperparameters
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={"parser_mode": "omegaconf+", "prog": "lightning-igpt"},
        args=words,
    )


def warn_of_restarts() -> None:
    """Say so where torchrun could not restart this run: its processes would meet the addresses of those that ended.

    See pytorch #135712. ``lightning-igpt launch torchrun`` prints a command that sets the variable.
    """
    shares = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        rank_zero_warn(
            "if torchrun restarts this run it will hang; start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )


def with_shipped_recipes(words: Sequence[str]) -> list[str]:
    """Replace the names of shipped recipes after ``--config`` or ``-c`` by their paths."""
    found: list[str] = []
    previous = ""
    for word in words:
        flag, equals, value = word.partition("=")
        if previous in ("--config", "-c"):
            word = _recipe(word)
        elif equals and flag in ("--config", "-c"):
            word = f"{flag}={_recipe(value)}"
        found.append(word)
        previous = word
    return found


def _recipe(value: str) -> str:
    return value if Path(value).exists() or "\n" in value else str(recipes.find(value))
