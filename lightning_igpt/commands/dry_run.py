"""``--dry_run``: what a run would be, before it is one: network, data, steps, strategy, memory and time.

Not here: the formulas and the table of devices (``planning``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_igpt.callbacks import Recompute
from lightning_igpt.commands.plan import measured_cpu
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.data.sources import as_list, name_of
from lightning_igpt.planning import (
    RECOMPUTE,
    Device,
    Run,
    Schedule,
    device_called,
    largest_batch,
    parameter_count,
    training_bytes,
    usual_mfu,
)
from lightning_igpt.planning.runs import CPU_MFU
from lightning_igpt.trainer import choices
from lightning_igpt.weights.checkpoint import read_checkpoint

GIB = 2**30
CONVERTED = frozenset({".parquet", ".arrow", ".tar"})  # files that are read by converting them
UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("s", 1))
TITLES = {"train": "training", "val": "validation", "test": "test"}
NOTHING = "nothing was trained, and nothing was written"


def lines(verb: str, trainer: Trainer, model: Any, data: Any, checkpoint: str | None) -> list[str]:
    """What the verb would do, line by line.

    Args:
        verb: fit, validate, test or predict.
        trainer: As it would run.
        model: As it would run; its network may lie on the meta device.
        data: As it would run, before ``setup``.
        checkpoint: What it would load, or continue.

    Raises:
        ValueError: Data, network and batch do not fit together, or the checkpoint could not be opened.
        OSError: The checkpoint or the source does not exist.
    """
    if checkpoint and Path(checkpoint).is_file():
        read_checkpoint(checkpoint)
    return list(_lines(verb, trainer, model, data, checkpoint))


def _lines(verb: str, trainer: Trainer, model: Any, data: Any, checkpoint: str | None) -> Iterator[str]:
    yield row("would", f"{verb}: {type(model).__name__} on {type(data).__name__}")
    config, counts = getattr(model, "config", None), images(data)
    if isinstance(config, ImageGPTConfig):
        yield row("network", network(config))
        _check_size(config, data)
    pretrained = getattr(model, "hparams", {}).get("pretrained")
    yield row("weights", checkpoint or (f"those of {pretrained}" if pretrained else "drawn at random"))
    source = name_of(data.source) if hasattr(data, "source") else type(data).__name__
    shown = ", ".join(f"{count:,} {TITLES.get(role, role)}" for role, count in counts.items())
    yield row("data", f"{source}: {f'{shown} images' if shown else 'not opened, to avoid a download or conversion'}")
    if verb == "fit":
        yield from _fit(trainer, model, data, counts)
    for text in choices(trainer):
        yield row("", text)
    places = [str(logger.log_dir) for logger in trainer.loggers if getattr(logger, "log_dir", None)]
    yield row("results", ", ".join(dict.fromkeys(places)) or str(trainer.default_root_dir))
    yield f"dry run: {NOTHING}"


def row(name: str, text: str) -> str:
    """A line of the table."""
    return f"{name:<12}{text}"


def network(config: ImageGPTConfig) -> str:
    """Shape and size in words."""
    shape = f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, {config.vocab_size} colors"
    side = config.image_size
    return f"{config.objective}, {shape}, {side} x {side} pixels: {parameter_count(config):,} parameters"


def images(data: Any) -> dict[str, int]:
    """Images of each part; empty where counting them would copy, convert or download anything."""
    if not hasattr(data, "source") or not all(_is_cheap(source) for source in as_list(data.source)):
        return {}
    data.setup("fit")
    return {role: len(part) for role, part in getattr(data.images, "parts", {}).items()}


def _is_cheap(source: Any) -> bool:
    if source == "digits":
        return True
    place = Path(source).expanduser() if isinstance(source, str | Path) else None
    if place is None or not place.exists():  # perhaps a hub id
        return False
    files = place.rglob("*") if place.is_dir() else [place]
    return not any(path.suffix.lower() in CONVERTED for path in files)


def _check_size(config: ImageGPTConfig, data: Any) -> None:
    size = getattr(data, "image_size", None)
    if size is not None and size != config.image_size:
        raise ValueError(
            f"the data has image_size {size}, but the network reads images of {config.image_size} x "
            f"{config.image_size}; leave out the data's image_size"
        )


def _fit(trainer: Trainer, model: Any, data: Any, counts: dict[str, int]) -> Iterator[str]:
    step, n_images = getattr(data, "batch_size", None), counts.get("train")
    world, parts = trainer.world_size, trainer.accumulate_grad_batches
    trained = hasattr(model, "network") and any(weight.requires_grad for weight in model.network.parameters())
    if not isinstance(step, int):
        yield row("length", "unknown: the data has no batch_size")
        return
    if step % (world * parts):
        raise ValueError(
            f"batch_size {step} is not a multiple of {world} devices x {parts} accumulate_grad_batches; change one"
        )
    if trained and n_images is not None and n_images < step:
        raise ValueError(f"batch_size {step} exceeds the {n_images} training images; lower batch_size")
    steps = length(trainer, step, n_images)
    shared = f"{step // (world * parts)} at once x {world} devices x {parts} accumulated"
    yield row("length", f"{'unknown' if steps is None else f'{steps:,}'} steps of {step:,} images ({shared})")
    if hasattr(model, "network"):
        yield from _costs(trainer, model.config, step, steps if trained else None, trained)


def length(trainer: Trainer, step: int, n_images: int | None) -> int | None:
    """Optimizer steps of the run; None where it ends by the clock, or the number of images is not known.

    Args:
        trainer: As it would run.
        step: Images of an optimizer step.
        n_images: Training images.
    """
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    if (trainer.max_epochs or -1) > 0 and n_images is not None:
        batches, limit = max(1, n_images * trainer.accumulate_grad_batches // step), trainer.limit_train_batches
        batches = max(1, int(batches * limit)) if isinstance(limit, float) else min(batches, limit)
        ends.append(trainer.max_epochs * -(-batches // trainer.accumulate_grad_batches))  # type: ignore[operator]
    return min(ends, default=None)


def _costs(trainer: Trainer, config: ImageGPTConfig, step: int, steps: int | None, trained: bool) -> Iterator[str]:
    """Memory and time, by the formulas of ``planning``."""
    place = trainer.strategy.root_device
    device = device_called(torch.cuda.get_device_name(place)) if place.type == "cuda" else measured_cpu()
    if device is None:
        yield row("costs", f"unknown for {torch.cuda.get_device_name(place)}")
        return
    try:
        run = Run(config, Schedule(step, steps or 1), device, trainer.world_size, str(trainer.precision))
    except ValueError as error:
        yield row("costs", f"unknown: {error}")
        return
    speed = f"{device.name}, {device.peak(run.precision) / 1e12:,.3g} TFLOP/s"
    if not trained:
        rate = run.forward_images_per_second
        yield row("time", f"features: at most {rate:,.3g} images/s on each {speed}; fitting comes on top")
        return
    yield from _memory(trainer, config, step, device)
    if steps is not None:
        mfu = min(CPU_MFU if place.type == "cpu" else usual_mfu(config), run.ceiling_mfu)
        yield row("time", f"about {_duration(run.flops / (mfu * device.peak(run.precision)) / run.devices)}")
        yield row("", f"at {mfu:.0%} of {speed}; validation and reading images come on top")


def _memory(trainer: Trainer, config: ImageGPTConfig, step: int, device: Device) -> Iterator[str]:
    """What a device has to hold, and the number of accumulated batches with which it can."""
    asked = next(
        (callback.told.how for callback in trainer.callbacks if isinstance(callback, Recompute) and callback.told), None
    )
    world, parts = trainer.world_size, trainer.accumulate_grad_batches
    sharded = any(word in type(trainer.strategy).__name__ for word in ("Sharded", "ModelParallel", "FSDP"))
    options: dict[str, Any] = {"precision": str(trainer.precision), "devices": world, "sharded": sharded}
    tried = [asked] if asked else ["none"] if trainer.strategy.root_device.type == "cpu" else RECOMPUTE
    for how in tried:
        needed = sum(training_bytes(config, step // (world * parts), recompute=how, **options).values())
        if needed <= device.usable:
            break
    text = f"{needed / GIB:.2f} of {device.usable / GIB:.1f} GiB usable per device, recompute {how}"
    if needed <= device.usable:
        yield row("memory", text)
        return
    most = largest_batch(config, device.usable, recompute=how, **options)
    share = step // world
    fitting = [number for number in range(parts, share + 1) if share % number == 0 and share // number <= most]
    cure = (
        f"trainer.accumulate_grad_batches {fitting[0]} fits" if fitting else "not even one image fits: shard or shrink"
    )
    yield row("memory", f"{text}: it does NOT fit; {cure}")


def _duration(seconds: float) -> str:
    unit, length = next((pair for pair in UNITS if seconds >= pair[1]), UNITS[-1])
    return f"{seconds / length:.3g} {unit}"
