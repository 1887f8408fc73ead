"""``lightning-igpt plan``: what a network costs before it is trained; the formulas are in ``planning.py``."""

import importlib
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any, Literal

from lightning_igpt import planning
from lightning_igpt.commands.help import MARGIN, row
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.files import counted
from lightning_igpt.planning import Device, Run, Schedule

GIB = 2**30
SAMPLED = 64  # images side by side
WIDTH = 100  # characters of a line
PRECISIONS = {"bf16": "bf16-mixed", "16": "16-mixed", "32": "32-true"}  # Lightning's short names


def plan(
    network: str = "igpt_s",
    image_size: int | None = None,
    objective: Literal["autoregressive", "bert"] | None = None,
    batch_size: int = 128,
    accumulate_grad_batches: int = 1,
    steps: int = 1_000_000,
    devices: int = 1,
    device_kind: str = "h100",
    precision: str | None = None,
    mfu: float | None = None,
    rgb: bool = False,
) -> None:
    """Print what a training run costs: parameters, operations, memory and time. ``fit --dry_run`` plans a recipe.

    Args:
        network: Name of a preset.
        image_size: Side of the images in pixels; default the network's.
        objective: Default: the network's, which is autoregressive for presets.
        batch_size: Images per optimizer step, over all devices; default the paper's.
        accumulate_grad_batches: Micro-batches in which each device computes its share of a step.
        steps: Optimizer steps.
        devices: Number of devices.
        device_kind: Kind of device, such as a100-40, h100 or rtx4090; cpu times training steps on this CPU.
        precision: bf16-mixed (or bf16), 16-mixed (or 16), 32-true (or 32), or bf16-true. Default: as fit chooses.
        mfu: Share of the device's peak that training reaches, such as 0.45; default by the network's size, on a CPU 1.
        rgb: With the palette rgb: 256 values and three tokens per pixel.
    """
    config = ImageGPTConfig.resolve(network)
    config = replace(config, vocab_size=256, tokens_per_pixel=3) if rgb else config
    config = replace(config, image_size=image_size or config.image_size, objective=objective or config.objective)
    parts = devices * accumulate_grad_batches
    if min(batch_size, devices, accumulate_grad_batches) < 1 or batch_size % parts:
        what = f"batch_size {batch_size} is no multiple of devices {devices} x micro-batches {accumulate_grad_batches}"
        raise ValueError(f"{what}; take {max(1, batch_size // max(parts, 1)) * parts}")
    precision = PRECISIONS.get(precision or "", precision)
    if device_kind.lower() == "cpu":
        cpu = importlib.import_module("lightning_igpt.commands.cpu")  # planning for other devices needs no torch
        precision = precision or cpu.best_precision("cpu", config)[0]
        device = cpu.measured_cpu(config, batch_size // parts, precision)
    else:
        device = planning.find_device(device_kind)
    run = make_run(config, Schedule(batch_size, steps), device, devices, precision)
    run = run if mfu is None else replace(run, mfu=mfu)
    print(*lines(network, run, batch_size // parts), sep="\n")


def make_run(
    config: ImageGPTConfig, schedule: Schedule, device: Device, devices: int = 1, precision: str | None = None
) -> Run:
    """A run, by default in the device's usual precision and at the usual share of its peak."""
    precision = precision or ("bf16-mixed" if device.bfloat16 else "32-true")
    mfu = planning.usual_mfu(config) if device.torch_name else 1.0  # a CPU's peak is measured in training
    run = Run(config, schedule, device, devices, precision, mfu)
    return replace(run, mfu=min(run.mfu, run.ceiling_mfu))  # small networks reach less


def lines(name: str, run: Run, micro_batch: int) -> Iterator[str]:
    """The table, for a network of that name and images that a device computes at once."""
    config, device, schedule = run.config, run.device, run.schedule
    tokens, per_token = config.n_positions, planning.train_flops_per_token(config)
    yield row("network", f"{name}, {config.objective}: {shape(config)}")
    each = f" x {config.tokens_per_pixel} channels" * (config.tokens_per_pixel > 1)
    yield row("images", f"{config.image_size} x {config.image_size}{each} = {tokens:,} tokens")
    step = f"{per_token * tokens * schedule.batch_size:.3e} per step of {counted(schedule.batch_size, 'image')}"
    yield row("training FLOPs", f"{per_token:.3e} per token, {step}")
    yield row("", f"{run.flops:.3e} in {counted(schedule.steps, 'step')}, {run.tokens:.3e} tokens")
    yield row("devices", f"{run.devices} x {device.name}, {device.usable / GIB:.1f} GiB usable")
    yield row("", f"{run.precision}, peak {device.peak(run.precision) / 1e12:,.4g} TFLOP/s, {device.source}")
    yield from ("", *_memory(run, micro_batch), "")
    choice = planning.choose(config, micro_batch, run.devices, device.usable, run.precision)
    fits = f"{choice.bytes / GIB:.0f} GiB" if choice.fits else "does NOT fit"
    yield row("strategy", f"{choice.strategy}, recompute {choice.recompute}, {fits}")
    yield from (row("", line) for line in textwrap.wrap(choice.reason, WIDTH - MARGIN))
    yield ""
    share = f" at {run.mfu:.0%} MFU" if device.torch_name else ""
    yield row(f"time{share}", f"{hours(run.seconds)}, {schedule.images / run.seconds:,.4g} images/s")
    if device.torch_name:
        yield row("floor", hours(run.floor_device_seconds / run.devices))
    if device.torch_name and config.objective == "autoregressive":
        seconds = tokens * planning.decode_seconds(config, device, SAMPLED, run.precision)
        yield row("sampling", f"at most {SAMPLED / seconds:,.3g} images/s in batches of {SAMPLED} on one device")
    yield row("checkpoint", f"{planning.checkpoint_bytes(config, run.precision) / 1e9:,.3g} GB")


def _memory(run: Run, micro_batch: int) -> Iterator[str]:
    """GiB of a step, and the largest micro-batch, for each way to recompute and to spread the state."""
    head = f"{'eager':>12}{'compiled':>12}{'largest micro-batch':>26}   (micro-batch {micro_batch:,})"
    yield row("memory per device", head)
    for strategy, recompute in product(("DDP", "FSDP") if run.devices > 1 else ("",), planning.RECOMPUTE):
        options: dict[str, Any] = {"precision": run.precision, "devices": run.devices, "recompute": recompute}
        ways = [options | {"sharded": strategy == "FSDP", "compiled": compiled} for compiled in (False, True)]
        sizes = [sum(planning.training_bytes(run.config, micro_batch, **way).values()) / GIB for way in ways]
        most = [planning.largest_batch(run.config, run.device.usable, **way) for way in ways]
        name = f"  {strategy} {recompute}".replace("   ", "  ")
        yield row(name, f"{sizes[0]:>8.2f} GiB{sizes[1]:>8.2f} GiB{most[0]:>15,} eager, {most[1]:,} compiled")


def shape(config: ImageGPTConfig) -> str:
    """A network's size in words."""
    size = f"{counted(config.n_layer, 'layer')}, width {config.n_embd}, {counted(config.n_head, 'head')}"
    return f"{size}, {planning.parameter_count(config):,} parameters"


def hours(seconds: float) -> str:
    """A time in a suitable unit, with three digits."""
    units = (("year", 365.25 * 86400, 2), ("day", 86400, 3), ("hour", 3600, 1), ("minute", 60, 1), ("s", 1, 0))
    unit, length = next((unit, length) for unit, length, least in units if seconds >= least * length)
    value = float(f"{seconds / length:.3g}")
    return (f"{value:,.0f} {unit}" if value >= 100 else f"{value:g} {unit}") + "s" * (value != 1 and unit != "s")
