"""What a recipe says about the cost of its run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from lightning_igpt.commands import recipes
from lightning_igpt.config import PRESETS, ImageGPTConfig, Objective
from lightning_igpt.planning import RECOMPUTE, Recompute

TRAINING_IMAGES = {"digits": 1_437, "uoft-cs/cifar10": 50_000, "ILSVRC/imagenet-1k": 1_281_167}
HELD_OUT = {"digits": 0.1, "uoft-cs/cifar10": 0.1}  # where there is no validation split; the data modules' default
RELEASED = {"openai/imagegpt-small": "igpt_s", "openai/imagegpt-medium": "igpt_m", "openai/imagegpt-large": "igpt_l"}
BATCH_SIZE = 128  # the data modules' default
PRECISIONS = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true"}  # Lightning's short names


class Recipe(NamedTuple):
    """What a recipe says; None where it leaves the choice to the defaults."""

    network: str | Mapping[str, Any] | None = None
    objective: Objective | None = None
    image_size: int | None = None
    batch_size: int | None = None  # per device
    devices: int | None = None
    accumulate: int | None = None
    max_steps: int | None = None
    max_epochs: int | None = None
    images: int | None = None  # that it trains on
    precision: str | None = None
    recompute: Recompute | None = None
    compiled: bool | None = None
    batches: int | float | None = None  # of a pass that are trained on: so many, or this share of them

    def name(self) -> str | None:
        """The preset's name; None for a network given by its fields."""
        return "igpt_s" if self.network is None else self.network if isinstance(self.network, str) else None

    def config(self) -> ImageGPTConfig:
        """The network, as the modules make it.

        Raises:
            ValueError: There is no such preset, or a field is out of range.
        """
        changes: dict[str, Any] = {"objective": self.objective, "image_size": self.image_size}
        config = ImageGPTConfig.resolve("igpt_s" if self.network is None else self.network)
        return replace(config, **{name: value for name, value in changes.items() if value is not None})

    def steps(self, batch_size: int, accumulate: int) -> int:
        """Optimiser steps of the run: to the first of its two ends.

        Args:
            batch_size: Images of a step, all devices together.
            accumulate: Batches of a step.

        Raises:
            ValueError: It does not tell, or counts passes over images of which nobody knows how many there are.
        """
        ends = [] if self.max_steps is None else [self.max_steps]
        if self.max_epochs is not None and self.images is not None:
            batches = max(1, self.images * accumulate // batch_size)
            if isinstance(self.batches, float):
                batches = max(1, int(batches * self.batches))
            elif self.batches is not None:
                batches = min(batches, self.batches)
            ends.append(self.max_epochs * -(-batches // accumulate))  # the end of a pass cuts a step short
        if ends:
            return min(ends)
        if self.max_epochs is None:
            raise ValueError("the recipe has neither trainer.max_steps nor trainer.max_epochs; pass --steps")
        raise ValueError(
            f"the recipe trains for {self.max_epochs} epochs, and how many images its source has is not known before "
            "it is opened; pass --steps"
        )


def read_recipe(name: str, *, known_network: bool = False) -> Recipe:
    """Read a recipe.

    Args:
        name: A file, or the name of a shipped recipe.
        known_network: The network is told elsewhere, so the recipe need not say which it is.

    Raises:
        FileNotFoundError: It is neither.
        ValueError: It is not YAML, or holds what cannot be planned.
    """
    recipe = _load(Path(name) if Path(name).is_file() else recipes.find(name))
    if not (known_network and "model" not in recipe):
        _check_model(recipe, name)
    kind = str(_at(recipe, "model.class_path", "PretrainModule")).rsplit(".", 1)[-1]
    if kind == "ProbeModule":
        raise ValueError(
            f"{name} is a probe: it trains no network, and only computes features, once per image; plan --network says "
            "how many images per second the forward pass allows"
        )
    if kind not in ("PretrainModule", "FineTuneModule"):
        raise ValueError(f"{name} trains a {kind}, of which nothing is known; only PretrainModule and FineTuneModule")
    precision = _at(recipe, "trainer.precision")
    compiled = _at(recipe, "trainer.compile")
    return Recipe(
        network=None if known_network else _network(recipe, name),
        objective=_at(recipe, "model.init_args.objective"),
        image_size=_number(recipe, name, "model.init_args.image_size"),
        batch_size=_number(recipe, name, "data.init_args.batch_size") or BATCH_SIZE,
        devices=_devices(recipe, name),
        accumulate=_number(recipe, name, "trainer.accumulate_grad_batches"),
        max_steps=_number(recipe, name, "trainer.max_steps"),
        max_epochs=_number(recipe, name, "trainer.max_epochs"),
        images=_images(recipe),
        precision=None if precision is None else PRECISIONS.get(str(precision), str(precision)),
        recompute=_recompute(recipe, name),
        compiled=compiled if isinstance(compiled, bool) else None,
        batches=_batches(recipe, name),
    )


def _load(path: Path) -> DictConfig:
    try:
        recipe = OmegaConf.load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, DictConfig):
        raise ValueError(f"{path} is no recipe: it must have the sections model, data and trainer")
    for section in ("model", "data", "trainer"):
        if not isinstance(recipe.get(section, {}), DictConfig | dict):
            raise ValueError(f"{path} is no recipe: {section} is {recipe[section]!r}, not a section with options")
    return recipe


def _check_model(recipe: DictConfig, name: str) -> None:
    """Insist that the recipe says what it trains.

    Raises:
        ValueError: It does not.
    """
    if "model" not in recipe:
        raise ValueError(f"{name} has no section model, so what it trains is not known; pass --network")
    if not isinstance(_at(recipe, "model.class_path"), str):
        raise ValueError(f"{name}: model.class_path must name what is trained, such as PretrainModule")
    options = _at(recipe, "model.init_args", {})
    if not isinstance(options, DictConfig | dict):
        raise ValueError(f"{name}: model.init_args is {options!r}, not a section with options")


def _recompute(recipe: DictConfig, name: str) -> Recompute | None:
    how = _at(recipe, "trainer.recompute", "auto")
    if how != "auto" and how not in RECOMPUTE:
        raise ValueError(f"{name}: trainer.recompute is {how!r}; it must be auto, {', '.join(RECOMPUTE)}")
    return None if how == "auto" else how


def _batches(recipe: DictConfig, name: str) -> int | float | None:
    """A number of batches, or a share of them, as its type says."""
    limit = _at(recipe, "trainer.limit_train_batches")
    if limit is None:
        return None
    share = isinstance(limit, float) and 0 < limit <= 1
    if not share and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        raise ValueError(
            f"{name}: trainer.limit_train_batches is {limit!r}; it must be a whole number from 1 on, or a share above "
            "0.0 and up to 1.0"
        )
    return limit  # type: ignore[no-any-return]


def _at(recipe: DictConfig, key: str, default: Any = None) -> Any:
    """A value, with what it refers to put in; the default where it or its section is absent or null."""
    found = OmegaConf.select(recipe, key, throw_on_resolution_failure=True)
    return default if found is None else found


def _number(recipe: DictConfig, name: str, key: str) -> int | None:
    """A positive whole number; None where there is none, or where -1 stands for no limit."""
    value = _at(recipe, key)
    if value is None or value == -1:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: {key} is {value!r}; it must be a whole number, at least 1")
    return value


def _network(recipe: DictConfig, name: str) -> str | Mapping[str, Any] | None:
    """What ``network`` says; else the network of the shipped recipe, or of the release, that the run starts from."""
    network = _at(recipe, "model.init_args.network")
    if network is not None:
        plain: Any = OmegaConf.to_container(network, resolve=True) if isinstance(network, DictConfig) else network
        return plain  # type: ignore[no-any-return]
    start = _at(recipe, "model.init_args.pretrained")
    if start is None:
        return None
    if start in RELEASED:
        return RELEASED[start]
    if Path(start).name in recipes.names():
        return _whole(read_recipe(Path(start).name))
    raise ValueError(f"{name} starts from {start}, and does not say what network that is; pass --network")


def _whole(earlier: Recipe) -> str | Mapping[str, Any] | None:
    """The network of a recipe, of which another one takes all; a preset's name says it where nothing was changed."""
    config = earlier.config()
    return earlier.network if config == PRESETS.get(earlier.name() or "") else config.to_dict()


def _devices(recipe: DictConfig, name: str) -> int | None:
    """Devices of all machines; None where the recipe leaves their number to the machine."""
    given = _at(recipe, "trainer.devices")
    machines = _number(recipe, name, "trainer.num_nodes") or 1
    if isinstance(given, str) and given.isdigit():
        given = int(given)
    if OmegaConf.is_list(given):
        return machines * len(given)
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return machines * given
    if given in (None, "auto", -1, "-1"):
        return machines if machines > 1 else None
    raise ValueError(f"{name}: trainer.devices is {given!r}; give their number, or pass --devices")


def _images(recipe: DictConfig) -> int | None:
    source = _at(recipe, "data.init_args.source")
    if not isinstance(source, str) or source not in TRAINING_IMAGES:
        return None
    images = TRAINING_IMAGES[source]
    share = _at(recipe, "data.init_args.val_fraction", HELD_OUT[source]) if source in HELD_OUT else 0.0
    return images - (max(1, round(images * share)) if share else 0)
