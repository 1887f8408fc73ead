"""``--dry_run``: what a run would be, before it is one: network, data, steps, strategy, memory and time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from lightning_igpt import planning
from lightning_igpt.callbacks import Recompute
from lightning_igpt.commands.cpu import STEPS, measured_cpu
from lightning_igpt.commands.help import row
from lightning_igpt.commands.plan import GIB, hours, make_run, shape
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.data.embedded import EMBEDDED
from lightning_igpt.data.sources import name_of
from lightning_igpt.files import counted
from lightning_igpt.planning import Device, Schedule
from lightning_igpt.trainer import choices
from lightning_igpt.weights.checkpoint import read_checkpoint

CONVERTED = frozenset({".parquet", ".arrow", ".tar"})  # files that are read by converting them
TITLES = {"train": "training", "val": "validation", "test": "test"}


def lines(verb: str, trainer: Trainer, model: Any, data: Any, checkpoint: str | None) -> Iterator[str]:
    """What the verb would do with trainer, model and data before ``setup``; the network may lie on the meta device."""
    if checkpoint and Path(checkpoint).is_file():
        read_checkpoint(Path(checkpoint))
    yield row("would", f"{verb}: {type(model).__name__} on {type(data).__name__}")
    config, counts, origin = getattr(model, "config", None), images(data), getattr(model, "origin", None)
    if isinstance(config, ImageGPTConfig):
        side, size = config.image_size, getattr(data, "image_size", None) or config.image_size
        colors = f"{config.vocab_size} colors" if config.tokens_per_pixel == 1 else "3 tokens each (rgb)"
        yield row("network", f"{config.objective}, {shape(config)}, {side} x {side} pixels, {colors}")
        if size != side:
            raise ValueError(f"image_size is {size}, but the network reads images of {side} x {side}; leave it out")
    yield row("weights", checkpoint or (f"those of {origin}" if origin else "drawn at random"))
    source = name_of(data.source) if hasattr(data, "source") else type(data).__name__
    shown = ", ".join(f"{count:,} {TITLES.get(role, role)}" for role, count in counts.items())
    yield row("data", f"{source}: {f'{shown} images' if shown else 'not opened, to avoid a download or conversion'}")
    chosen = choices(trainer, model)
    if verb == "fit":
        yield from _fit(trainer, model, data, counts)
    yield from (row("" if number else "settings", text) for number, text in enumerate(chosen))
    places = [str(logger.log_dir) for logger in trainer.loggers if getattr(logger, "log_dir", None)]
    yield row("results", ", ".join(dict.fromkeys(places)) or str(trainer.default_root_dir))
    yield "dry run: nothing was trained, and nothing was written"


def images(data: Any) -> dict[str, int]:
    """Images of each part; empty where counting them would copy, convert or download anything."""
    source = getattr(data, "source", "")
    if source is None:
        raise ValueError("source is empty; give it a folder, Parquet files, a hub id, digits or emoji")
    if source not in tuple(EMBEDDED):
        place = Path(source).expanduser() if isinstance(source, str | Path) else None
        if not (place and place.exists()) or any(p.suffix.lower() in CONVERTED for p in (place, *place.rglob("*"))):
            return {}  # perhaps a hub id
    data.setup("fit")
    return {role: len(part) for role, part in data.parts.items()}


def _fit(trainer: Trainer, model: Any, data: Any, counts: dict[str, int]) -> Iterator[str]:
    n_images = counts.get("train")
    step, world, parts = getattr(data, "batch_size", None), trainer.world_size, trainer.accumulate_grad_batches
    trained = hasattr(model, "network") and any(weight.requires_grad for weight in model.network.parameters())
    if not isinstance(step, int):
        yield row("length", "unknown: the data has no batch_size")
        return
    if step % (world * parts):
        raise ValueError(f"batch_size {step} is no multiple of devices {world} x micro-batches {parts}; change one")
    if trained and n_images is not None and n_images < step:
        raise ValueError(f"batch_size {step} exceeds the number of training images, {n_images}; lower batch_size")
    steps = length(trainer, step, n_images)
    shared = f"({step // (world * parts)} at once x {counted(world, 'device')} x {parts} accumulated)"
    number = "unknown steps" if steps is None else counted(steps, "step")
    yield row("length", f"{number} of {counted(step, 'image')} {shared}")
    if hasattr(model, "network"):
        yield from _costs(trainer, model, step, steps, trained, validated(trainer, counts, step, steps))
        limits = [float(one.time_remaining() or 0) for one in trainer.callbacks if isinstance(one, Timer)]  # type: ignore[attr-defined]
        yield from (row("", f"ends after {hours(seconds)} (max_time)") for seconds in limits)


def length(trainer: Trainer, step: int, n_images: int | None) -> int | None:
    """Optimizer steps of the run; None where it ends by the clock, or the number of images is not known."""
    ends, epochs, parts = [trainer.max_steps], trainer.max_epochs or -1, trainer.accumulate_grad_batches
    if epochs > 0 and n_images is not None:
        batches, limit = max(1, n_images * parts // step), trainer.limit_train_batches
        batches = max(1, int(batches * limit)) if isinstance(limit, float) else min(batches, limit)
        ends.append(epochs * -(-batches // parts))
    return min((end for end in ends if end > 0), default=None)


def validated(trainer: Trainer, counts: dict[str, int], step: int, steps: int | None) -> int:
    """Images that all validations of the run read; 0 where the number of images, steps or validations is not known."""
    every, parts, limit = trainer.val_check_interval, trainer.accumulate_grad_batches, trainer.limit_val_batches
    if isinstance(every, float):  # of an epoch
        every = max(1, int(every * counts.get("train", 0) * parts / step))
    images = counts.get("val", 0)
    images = int(images * limit) if isinstance(limit, float) else min(images, limit * step // parts)
    return (steps or 0) * parts // every * images if isinstance(every, int) else 0


def _costs(trainer: Trainer, model: Any, step: int, steps: int | None, trained: bool, validated: int) -> Iterator[str]:
    """Memory and time by the formulas of ``planning``; on a CPU by the speed of a few training steps."""
    place, precision, config = trainer.strategy.root_device, str(trainer.precision), model.config
    kind, world = torch.cuda.get_device_name(place) if place.type == "cuda" else place.type, trainer.world_size
    device = planning.device_called(kind) if precision in planning.ACTIVATION_BYTES else None
    if kind == "cpu" and precision in planning.ACTIVATION_BYTES:
        images = step // (world * trainer.accumulate_grad_batches)
        device = measured_cpu(config, images, precision, getattr(model, "optimizer", "adam"))
    if device is None:
        yield row("costs", f"unknown for {kind} in {precision}")
        return
    run = make_run(config, Schedule(step, steps or 1), device, world, precision)
    speed = f"{device.name}, {device.peak(precision) / 1e12:,.3g} TFLOP/s"
    if trained:
        yield row("memory", _memory(trainer, config, step, device))
        share = f"{run.mfu:.0%} of {speed}" if device.torch_name else f"the speed of {STEPS} training steps now"
        seconds = run.seconds * (1 + validated / (3 * step * (steps or 1)))  # a forward pass is a third of a step
        yield row("time", f"about {hours(seconds)}{' per step' * (steps is None)}, at {share}")
        yield row("", "plus start, reading images and drawing pictures")
    else:
        rate = device.reached(precision) / (config.n_positions * planning.forward_flops_per_token(config))
        yield row("time", f"features: at most {rate:,.3g} images/s, without fitting ({speed})")


def _memory(trainer: Trainer, config: ImageGPTConfig, step: int, device: Device) -> str:
    """What a device has to hold, and how many batches to accumulate where it cannot."""
    recomputes = [callback for callback in trainer.callbacks if isinstance(callback, Recompute)]  # type: ignore[attr-defined]
    asked = [callback.given.how for callback in recomputes if callback.given]
    world, parts = trainer.world_size, trainer.accumulate_grad_batches
    sharded = any(word in type(trainer.strategy).__name__ for word in ("Sharded", "ModelParallel", "FSDP"))
    options: dict[str, Any] = {"precision": str(trainer.precision), "devices": world, "sharded": sharded}
    for how in asked or (planning.RECOMPUTE[:1] if trainer.strategy.root_device.type == "cpu" else planning.RECOMPUTE):
        needed: int = sum(planning.training_bytes(config, step // (world * parts), recompute=how, **options).values())
        named = "off" if how == "none" else how
        text = f"{needed / GIB:.2f} of {device.usable / GIB:.1f} GiB per device, activation checkpointing: {named}"
        if needed <= device.usable:
            return text
    most, share = planning.largest_batch(config, device.usable, recompute=how, **options), step // world
    fitting = [number for number in range(parts, share + 1) if share % number == 0 and share // number <= most]
    cure = f"--trainer.accumulate_grad_batches {fitting[0]} does" if fitting else "nor does a single image"
    return f"{text}, which does NOT fit; {cure}"
