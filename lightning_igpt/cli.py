"""Lightning's verbs: LightningCLI in subclass mode, with this package's classes known by their short names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import set_parsing_settings
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_igpt import callbacks, data, modules
from lightning_igpt.commands import recipes
from lightning_igpt.commands.arguments import one_line_errors
from lightning_igpt.trainer import make_trainer

__all__ = ["IGPTCLI", "callbacks", "data", "modules", "run"]  # importing the classes makes their short names known


class IGPTCLI(LightningCLI):
    """LightningCLI whose recipes may refer to each other's values and whose flags a checkpoint never changes."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse without Lightning's warning about ``sys.argv``, which here holds the same words."""
        self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration alone.

        Lightning's own version lets the hyperparameters in the checkpoint win over recipe and flags without a word.
        Here the modules compare themselves with the checkpoint when it is loaded, and say what differs.
        """

    def before_validate(self) -> None:
        """Refuse to evaluate random weights."""
        self._need_weights()

    before_test = before_predict = before_validate

    def _need_weights(self) -> None:
        options = self.config[self.subcommand]
        given, cure = options.get("ckpt_path"), "pass --ckpt_path with the checkpoint of a run"
        if options["model"]["class_path"].endswith("PretrainModule"):  # classifiers are in checkpoints alone
            given = given or options["model"].get("init_args", {}).get("pretrained")
            cure += " (or model.init_args.pretrained)"
        if not given:
            raise ValueError(f"{self.subcommand} would run on random weights: {cure}")


def run(words: Sequence[str]) -> IGPTCLI:
    """Run ``fit``, ``validate``, ``test`` or ``predict``.

    Args:
        words: The verb and its options. ``--config`` takes a file or the name of a shipped recipe.

    Raises:
        SystemExit: Wrong usage (2), or a mistake in what the user gave (1), told in one line.
    """
    # Interpolations like ${trainer.max_steps} are written from the recipe's root, below which the verb lies.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    with one_line_errors(f"lightning-igpt {words[0]}"):
        return IGPTCLI(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            trainer_class=make_trainer,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # the modules keep their own plain hyperparameters
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "omegaconf+", "prog": "lightning-igpt"},
            args=with_shipped_recipes(words),
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
