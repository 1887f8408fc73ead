"""What a run would be, before it is one: classes, sizes, data, steps, places, memory and time.

Not here: the formulas and the devices (``planning``), the figures made of them (``plan.py``, ``plan_facts.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_igpt.callbacks import Recompute
from lightning_igpt.commands.places import check_places
from lightning_igpt.commands.plan import decide
from lightning_igpt.commands.plan_facts import facts
from lightning_igpt.commands.plan_recipe import Recipe
from lightning_igpt.commands.plan_text import GIB, hours
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.data.sources import name_of
from lightning_igpt.planning import parameter_count
from lightning_igpt.trainer import choices
from lightning_igpt.weights.safety import check_opens_safely

MARGIN = 12
COSTLY = frozenset({".parquet", ".arrow", ".tar"})  # read by converting them
NOTHING = "nothing was trained, and nothing was written"


def lines(verb: str, trainer: Trainer, model: Any, data: Any, checkpoint: str | None) -> list[str]:
    """What the verb would do, line by line.

    Args:
        verb: fit, validate, test or predict.
        trainer: As it would run.
        model: As it would run; its network may still be without weights.
        data: As it would run, before ``setup``.
        checkpoint: What it would load, or go on from.

    Raises:
        ValueError: Data, network and batch do not fit together, or the checkpoint could not be opened.
        OSError: There is no such checkpoint or source, or nothing can be saved at that place.
    """
    if checkpoint:
        check_opens_safely(checkpoint)
    places = [str(one.log_dir) for one in trainer.loggers if getattr(one, "log_dir", None)]
    check_places([*places, trainer.default_root_dir])
    return list(_lines(verb, trainer, model, data, checkpoint, places))


def _lines(
    verb: str, trainer: Trainer, model: Any, data: Any, checkpoint: str | None, places: Sequence[str]
) -> Iterator[str]:
    yield row("would", f"{verb}: {type(model).__name__} on {type(data).__name__}")
    config = getattr(model, "config", None)
    if isinstance(config, ImageGPTConfig):
        yield row("network", network(config))
    origin = getattr(model, "origin", None)
    yield row("weights", checkpoint or (f"those of {origin}" if origin else "drawn at random"))
    counts = images(data)
    if isinstance(config, ImageGPTConfig):
        _check_fit(config, data)
    source = name_of(data.source) if hasattr(data, "source") else type(data).__name__
    yield row("data", f"{source}: {told(counts)}")
    if verb == "fit":
        yield from _fit(trainer, model, data, counts, checkpoint)
    for text in choices(trainer):
        yield row("", text)
    yield row("results", ", ".join(dict.fromkeys(places)) or str(trainer.default_root_dir))
    yield f"dry run: {NOTHING}"


def row(name: str, text: str) -> str:
    """A line of the table."""
    return f"{name:<{MARGIN}}{text}"


def network(config: ImageGPTConfig) -> str:
    """Shape and size in words."""
    shape = f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, {config.vocab_size} colours"
    side = config.image_size
    return f"{config.objective}, {shape}, {side} x {side} pixels: {parameter_count(config):,} parameters"


def images(data: Any) -> dict[str, int]:
    """Images of each part, where they can be counted without copying or downloading anything; else nothing."""
    if not hasattr(data, "source") or not _is_cheap(data.source):
        return {}
    data.setup("fit")
    parts = getattr(data, "parts", {})
    return {role: len(part) for role, part in parts.items()}


def told(counts: dict[str, int]) -> str:
    """The numbers of images in words."""
    titles = {"train": "training", "val": "validation", "test": "test"}
    parts = [f"{count:,} {titles.get(role, role)}" for role, count in counts.items()]
    return f"{', '.join(parts)} images" if parts else "not opened, since that would download or convert it"


def _is_cheap(source: Any) -> bool:
    if source == "digits":
        return True
    if not isinstance(source, str | Path):
        return False
    place = Path(source).expanduser()
    if not place.exists():  # perhaps a hub id
        return False
    files = place.rglob("*") if place.is_dir() else [place]
    return not any(path.suffix.lower() in COSTLY for path in files)


def _check_fit(config: ImageGPTConfig, data: Any) -> None:
    size = getattr(data, "image_size", None)
    if size is not None and size != config.image_size:
        raise ValueError(
            f"the data are set to images of {size} x {size}, but the network reads {config.image_size} x "
            f"{config.image_size}; leave out the data's image_size"
        )


def _fit(trainer: Trainer, model: Any, data: Any, counts: dict[str, int], checkpoint: str | None) -> Iterator[str]:
    size, steps = getattr(data, "batch_size", None), length(trainer, data, counts)
    world, parts = trainer.world_size, trainer.accumulate_grad_batches
    together = f"{size * world * parts:,} images per step" if isinstance(size, int) else "batches of unknown size"
    shared = [f"{size} at once"] + [f"{world} devices"] * (world > 1) + [f"{parts} batches each"] * (parts > 1)
    told_steps = "an unknown number of steps" if steps is None else f"{steps:,} steps"
    trained = hasattr(model, "network") and any(one.requires_grad for one in model.network.parameters())
    n_images, step = counts.get("train"), size * world * parts if isinstance(size, int) else 0
    if trained and n_images is not None and n_images < step:
        raise ValueError(f"there are {n_images} training images, but one step takes {step}; set a smaller batch_size")
    yield row("length", f"{told_steps}, {together} ({' x '.join(shared)})")
    yield row("begin", f"goes on from {checkpoint}" if checkpoint else "at step 0")
    if isinstance(size, int) and steps and hasattr(model, "network"):
        yield from costs(trainer, model.config, size, steps if trained else None)


def length(trainer: Trainer, data: Any, counts: dict[str, int]) -> int | None:
    """Optimiser steps of the whole run; None where it ends by the clock, or nobody knows how many images there are."""
    ends = Recipe(
        max_steps=trainer.max_steps if trainer.max_steps > 0 else None,
        max_epochs=trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None,
        images=counts.get("train"),
        batches=trainer.limit_train_batches,
    )
    size = getattr(data, "batch_size", 1) * trainer.world_size * trainer.accumulate_grad_batches
    try:
        return ends.steps(size, trainer.accumulate_grad_batches)
    except ValueError:
        return None


def costs(trainer: Trainer, config: ImageGPTConfig, batch_size: int, steps: int | None) -> Iterator[str]:
    """Memory and time by ``plan``, and what they rest on.

    Args:
        trainer: Tells devices and precision.
        config: The network.
        batch_size: Images that a device computes at once.
        steps: Optimiser steps; None for a network that is not trained.
    """
    place = trainer.strategy.root_device
    kind = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type
    how = next((one.told.how for one in trainer.callbacks if isinstance(one, Recompute) and one.told), None)  # type: ignore[attr-defined]
    how = how or ("none" if kind == "cpu" else None)  # what fit does where nobody says
    recipe = Recipe(
        network=config.to_dict(),
        batch_size=batch_size,
        devices=trainer.world_size,
        accumulate=trainer.accumulate_grad_batches,
        precision=str(trainer.precision),
        recompute=how,
    )
    try:
        found = facts(decide(recipe, device_kind=kind, batch_size=None, steps=steps or 1, mfu=None))
    except ValueError as error:
        yield row("costs", f"unknown: {error}")
        return
    run, device = found["run"], found["device"]
    basis = "measured just now" if kind == "cpu" else "by its data sheet"
    speed = f"{device['name']}, {device['peak_flops'] / 1e12:,.3g} TFLOP/s {basis}"
    if steps is None:
        rate = found["inference"]["forward_images_per_second"]
        yield row("time", f"features: at most {rate:,.3g} images/s ({speed}); fitting is not reckoned")
        return
    choice = found["strategy"]
    taken = choice["bytes"] if how is None else found["memory"][choice["strategy"]]["total"]
    fits = "" if taken <= device["usable_bytes"] else ": it does NOT fit"
    room = f"{device['usable_bytes'] / GIB:.1f} GiB usable"
    yield row("memory", f"{taken / GIB:.2f} of {room} per device, recompute {how or choice['recompute']}{fits}")
    yield row("time", f"about {hours(run['seconds'])}, not below {hours(run['floor_seconds'])}")
    yield row("", f"at {run['mfu']:.0%} of {speed}")
    yield row("", "Validation, reading images and what small networks waste come on top.")
