"""Lightning's verbs, fit, validate, test and predict, driven by recipes; the only reader of recipes."""

import contextlib
import itertools
import logging
import re
import shlex
import warnings
from argparse import ArgumentError
from collections.abc import Collection, Sequence
from pathlib import Path
from textwrap import TextWrapper
from typing import Any, NoReturn

import lightning
import torch
from jsonargparse import ActionConfigFile, class_from_function, get_loader, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_igpt import callbacks, data, modules
from lightning_igpt.callbacks.loggers import continue_run
from lightning_igpt.callbacks.run_folder import run_folder
from lightning_igpt.callbacks.run_record import Outline
from lightning_igpt.checkpointing import find_checkpoint
from lightning_igpt.commands import dry_run, recipe_words, recipes
from lightning_igpt.commands.arguments import check_folder, check_seed, one_line_errors
from lightning_igpt.commands.help import MARGIN, PROGRAM, Parser, columns, usage_error
from lightning_igpt.commands.recipe_words import check_checkpoint
from lightning_igpt.data.embedded import EMBEDDED
from lightning_igpt.files import write_csv
from lightning_igpt.pictures import save_png
from lightning_igpt.trainer import make_trainer

__all__ = ["RecipeCLI", "callbacks", "data", "modules", "run"]  # importing the classes makes their short names known

# Classes that a recipe may name. Any other name is refused before its module is imported, which would run its code.
TRUSTED = ("lightning", "lightning_igpt", "torch.optim", "torchmetrics")
UNQUOTED = re.compile(r"(\w+): +([\w.+-]+)(?=[\s,}\]]|$)")  # of a recipe, key and text


class RecipeFile(ActionConfigFile):  # type: ignore[misc]
    """``--config``: a YAML file, or the name of a shipped recipe."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the file, or the shipped recipe of that name."""
        path = Path(values) if values and Path(values).exists() else recipes.find(values)
        if path.is_file():  # no pipe, which can be read once only
            try:
                parser.unquoted += tuple(UNQUOTED.findall(path.read_text()))  # in the encoding of the parser
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is no text ({error}); save it in UTF-8, or set PYTHONUTF8=1") from error
        super().__call__(parser, cfg, str(path), option_string)


class RecipeParser(LightningArgumentParser):
    """LightningCLI's parser, with this package's help and errors of one line."""

    verb: str | None = None  # None for the parsers that jsonargparse makes for --model.help and the like
    unquoted: tuple[tuple[str, str], ...] = ()  # keys and texts of the recipes

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong with the command or the recipe in one line, and exit with status 2."""
        if not self.exit_on_error:  # a parser within a parser, whose message becomes part of the outer one's
            raise ArgumentError(None, message) from ex
        if "import_path_allowlist" in message:  # jsonargparse's setting, behind which is our option
            message += f". If you trust that module: {PROGRAM} {self.verb} --trust NAME"
        for key, text in self.unquoted:
            wanted = message.partition(f'{key}":')[2]
            if "<class 'str'>" in wanted and f"value: {get_loader('yaml')(text)}" in wanted:
                message = f'{key} is {text}, which YAML does not read as text; quote it: {key}: "{text}"'
        usage_error(self.prog, message)

    def format_help(self) -> str:
        """The text of ``--help``."""
        return recipe_words.page(self.verb) if self.verb else str(super().format_help())

    def add_lightning_class_args(self, lightning_class: Any, nested_key: str, *args: Any, **options: Any) -> list[str]:
        """Leave out make_trainer's parameters for model and data, which the command line knows already."""
        if lightning_class is not make_trainer:
            return super().add_lightning_class_args(lightning_class, nested_key, *args, **options)
        made, skip = class_from_function(make_trainer), {"module", "data"}
        options = {"fail_untyped": False, "instantiate": False, "sub_configs": True, "skip": skip}
        return list(self.add_class_arguments(made, nested_key, **options))


class RecipeCLI(LightningCLI):
    """Model, data and trainer of a recipe, without weights if ``dry``; no checkpoint changes what they say."""

    def __init__(self, verb: str, words: Sequence[str], *, dry: bool = False, trusted: Sequence[str] = ()) -> None:
        self.verb, self.words, self.dry, self.trusted = verb, words, dry, trusted
        super().__init__(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=make_trainer,
            trainer_defaults={"callbacks": Outline()},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # the modules keep their own plain hyperparameters
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            run=False,  # with subcommands Lightning lets a checkpoint's hyperparameters win over recipe and flags
            args=list(words),
        )

    def init_parser(self, **options: Any) -> LightningArgumentParser:
        """The parser, before the options of trainer, model and data are added."""
        parser = RecipeParser(prog=f"{PROGRAM} {self.verb}", parser_mode="omegaconf+", **options)
        parser.verb = self.verb
        parser.add_argument("-c", "--config", action=RecipeFile)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own options; all verbs have all of them, so that each runs the configuration another one saved."""
        parser.add_argument("--resume", type=str | None, default=None)
        parser.add_argument("--ckpt_path", type=str | None, default=None)
        parser.add_argument("--random_weights", type=bool, default=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse without Lightning's warning about ``sys.argv``, which here holds the same words."""
        self.config = parser.parse_args(args)
        check_seed("seed_everything", self.config["seed_everything"])
        recipes.check_texts(self.config, self.words, self.trusted)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; a network that a strategy shards, or of a dry run, stays on the meta device."""
        model = self.config["model"]
        drawn = model["class_path"].startswith("lightning_igpt.") and not model["init_args"].get("pretrained")
        with torch.device("meta") if drawn else contextlib.nullcontext():
            super().instantiate_classes()  # the strategy is chosen by the network's shape
        if drawn and not self.dry and not isinstance(self.trainer.strategy, ModelParallelStrategy):
            self.model = self.parser.instantiate_classes(self.config)["model"]

    def instantiate_trainer(self, **options: Any) -> Trainer:
        """The trainer, planned for model and data; only ``fit`` needs to know how long to train."""
        given = self.config_init["trainer"]
        options["enable_model_summary"] = bool(given.get("enable_model_summary"))  # Outline says what matters
        if self.verb == "fit":
            options |= {"module": self.model, "data": self.datamodule}
        elif given.get("max_steps", -1) < 1 and given.get("max_epochs") is None:
            options["max_epochs"] = 1
        try:
            return super().instantiate_trainer(**options)
        except (MisconfigurationException, ImportError, TypeError, ValueError) as error:
            raise ValueError(f"trainer: {error}") from error  # values that Lightning refuses are the user's, too

    def checkpoint(self) -> str | None:
        """The checkpoint to continue (fit) or to run (the other verbs); None to start from the recipe's weights."""
        path, resume, model = self.config["ckpt_path"], self.config["resume"], self.config["model"]
        # The heads of other modules are in checkpoints alone.
        pretrained = model["class_path"].endswith("PretrainModule") and model.get("init_args", {}).get("pretrained")
        if self.verb == "fit":
            if resume and path:
                raise ValueError(f"--resume {resume} and --ckpt_path {path} both name a checkpoint; drop one of them")
            path = self._resumed(resume) if resume else path
        elif not (path or self.config["random_weights"] or pretrained):
            cure = "the checkpoint of a run (or, for pretraining, model.pretrained); --random_weights true runs them"
            raise ValueError(f"{self.verb} would run on random weights: pass --ckpt_path with {cure} as a baseline")
        check_checkpoint(path)
        return path or None

    def _resumed(self, resume: str) -> str | None:
        check_checkpoint(None, resume)
        auto, place = resume.lower() == "auto", Path(resume).expanduser()
        newest = place if place.is_file() and not auto else find_checkpoint(self.trainer if auto else place, self.model)
        if newest is None and not auto:
            raise FileNotFoundError(f"--resume {resume}: the folder has no checkpoint; --resume auto would start a run")
        if newest is None:
            rank_zero_info(f"--resume auto: {self.trainer.default_root_dir} has no run yet; starting one")
        return str(newest) if newest else None


def _is_news(log: logging.LogRecord) -> bool:
    """Whether a message is not Lightning's, a warning, or says where a run resumes or how many processes it has."""
    ours = not log.pathname.startswith(lightning.__path__[0])
    return ours or log.levelno > logging.INFO or re.search("Restored|Starting with", log.getMessage()) is not None


def run(words: Sequence[str]) -> RecipeCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` with its options, and return what the recipe made."""
    verb, *rest = words
    # A deprecation within Lightning; a resumed run; short epochs; a probe's network, which is meant to be in eval mode.
    expected = "LeafSpec|Checkpoint directory .* is not empty|smaller than the logging|in eval mode at the start"
    warnings.filterwarnings("ignore", f".*({expected}).*")
    for handler in logging.getLogger("lightning.pytorch").handlers + logging.getLogger("lightning.fabric").handlers:
        handler.addFilter(_is_news)
    # Not options of the recipe's parser: a recipe must not be able to trust itself.
    flags = Parser(prog=f"{PROGRAM} {verb}")
    flags.add_argument("--dry_run", action="store_true")
    flags.add_argument("--trust", action="append", default=[])
    given, rest = flags.parse_known_args(rest)
    with one_line_errors(f"{PROGRAM} {verb}"):
        _allow([name for name in given.trust if "://" not in name])
        cli = RecipeCLI(verb, rest, dry=given.dry_run, trusted=[name for name in given.trust if "://" in name])
        if "://" not in cli.trainer.default_root_dir:
            check_folder(cli.trainer.default_root_dir, "--trainer.default_root_dir")
        checkpoint = cli.checkpoint()
        if given.dry_run:
            row = TextWrapper(columns(), subsequent_indent=" " * MARGIN, break_long_words=False, break_on_hyphens=False)
            print(*map(row.fill, dry_run.lines(verb, cli.trainer, cli.model, cli.datamodule, checkpoint)), sep="\n")  # noqa: T201
            return cli
        if verb == "predict" and cli.trainer.world_size > 1:
            raise ValueError("predict writes one file in the order of the images: pass --trainer.devices 1")
        if checkpoint and verb == "fit":
            continue_run(cli.trainer, checkpoint)
        method = getattr(cli.trainer, verb)
        try:
            result = method(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
        except MisconfigurationException as error:
            raise ValueError(f"trainer: {error}") from error
        if verb == "predict":
            _write(cli, result or [])
        elif verb == "fit":
            _say_next(cli)
    return cli


def _say_next(cli: RecipeCLI) -> None:
    """Log where a run's results are, and the command that uses them."""
    folder = run_folder(cli.trainer)
    if folder is None or not cli.trainer.loggers:
        return
    words = ["report", str(folder)]
    if isinstance(cli.model, modules.PretrainModule):
        source = str(getattr(cli.datamodule, "source", ""))
        here = source in EMBEDDED or Path(source).exists()
        words = ["complete", "--pretrained", str(folder), "--images", source if here else "photos"]
    rank_zero_info(f"results: {folder}\nnext: {PROGRAM} {shlex.join(words)}")


def _allow(trusted: Sequence[str]) -> None:
    """Let recipes name the classes that are trusted, and no others."""
    for name in trusted:
        if not all(part.isidentifier() for part in name.split(".")) or name.split(".")[0] == "jsonargparse":
            raise ValueError(f"--trust {name} is no package, module, class (such as my_package) or address")
    set_parsing_settings(
        instantiate_subclass_spec_in_any=False,
        import_path_denylist=["*"],
        import_path_allowlist=[*TRUSTED, *trusted],
        add_print_completion_argument=True,
        config_read_mode_fsspec_enabled=False,  # Lightning lets the parser take texts for addresses of files
        subclasses_disabled=[torch.Tensor],  # whose attributes would be options, tensors among them, without end
    )


def write_predictions(
    predictions: Tensor, folder: Path, class_names: Sequence[str] | None, *, left_out: Collection[int] = ()
) -> Path:
    """Write images, uint8 (N, 3, S, S), as PNG, or class probabilities, float (N, C), as CSV, without rows left out."""
    rows = (row for row in itertools.count() if row not in left_out)
    if predictions.ndim == 4:
        for number, image in zip(rows, predictions, strict=False):
            save_png(image, folder / f"{number:06d}.png")
        return folder
    names = [*(class_names or []), *map(str, range(len(class_names or []), predictions.shape[1]))]
    table: list[list[Any]] = [["row", "class", *names]]
    for row, values in zip(rows, predictions.tolist(), strict=False):
        table.append([row, names[values.index(max(values))], *(f"{value:.6f}" for value in values)])
    write_csv(folder / "classes.csv", table)
    return folder / "classes.csv"


def _write(cli: RecipeCLI, batches: Sequence[Any]) -> None:
    """Keep the predictions: completed images as PNG files, class probabilities as CSV."""
    if not all(isinstance(batch, Tensor) and batch.ndim in (2, 4) for batch in batches):
        rank_zero_info("predictions are neither images (B, 3, S, S) nor probabilities (B, C): nothing is written")
    elif batches:
        folder = Path(cli.trainer.log_dir or cli.trainer.default_root_dir) / "predictions"
        left_out = getattr(cli.datamodule, "left_out_of_predictions", set[int])()
        names = getattr(cli.model, "class_names", None)
        rank_zero_info(f"wrote {write_predictions(torch.cat([*batches]), folder, names, left_out=left_out)}")
