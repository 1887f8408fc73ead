"""``lightning-igpt plan``: what a network costs before it is trained.

Not here: what a recipe says (``plan_recipe.py``), the figures (``plan_facts.py``), the table that people read
(``plan_text.py``), the plot (``plan_sweep.py``), measuring this CPU (``plan_cpu.py``); the formulas (``planning``).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning_igpt.commands.arguments import run_function
from lightning_igpt.commands.places import check_file
from lightning_igpt.commands.plan_cpu import measured_cpu
from lightning_igpt.commands.plan_facts import Plan, facts
from lightning_igpt.commands.plan_recipe import PRECISIONS, Recipe, read_recipe
from lightning_igpt.commands.plan_sweep import draw_sweep
from lightning_igpt.commands.plan_text import lines
from lightning_igpt.planning import CPU_MFU, Run, Schedule, find_device, usual_mfu

BATCH_SIZE, STEPS = 128, 1_000_000  # the paper's


def plan(
    config: str | None = None,
    network: str | None = None,
    image_size: int | None = None,
    objective: Literal["autoregressive", "bert"] | None = None,
    batch_size: int | None = None,
    accumulate_grad_batches: int | None = None,
    steps: int | None = None,
    devices: int | None = None,
    device_kind: str = "h100",
    precision: str | None = None,
    recompute: Literal["none", "selective", "full"] | None = None,
    compile: bool | None = None,
    mfu: float | None = None,
    format: Literal["text", "json"] = "text",
    sweep: str | None = None,
) -> None:
    """Print what a training run costs: parameters, operations, memory, time, data, files.

    Args:
        config: A recipe for pretraining or fine-tuning, or the name of a shipped one. Options given beside it win.
        network: Name of a preset; default igpt_s.
        image_size: Side of the images in pixels; default the network's.
        objective: Default the network's, which is autoregressive for presets.
        batch_size: Images per optimiser step, all devices together. Default 128; with a recipe its images per device,
            times devices and accumulate_grad_batches.
        accumulate_grad_batches: Parts in which each device computes its share of a step; default 1.
        steps: Optimiser steps; default a million.
        devices: Number of devices; default 1.
        device_kind: What they are, such as a100-40, h100 or rtx4090; cpu measures this one.
        precision: bf16-mixed (or bf16), 16-mixed (or 16), 32-true (or 32), or bf16-true. Default: as fit chooses on the
            device.
        recompute: Activation checkpointing that memory is shown for; default none.
        compile: Show memory for compiled blocks.
        mfu: Share of the device's peak that training reaches, such as 0.45; default by the network's size.
        format: text, or json: one object.
        sweep: A PNG file to write: cost against size and resolution. Missing folders are made.
    """
    if sweep is not None:
        check_file(sweep, "--sweep", "cost.png")
    told: dict[str, Any] = {
        "network": network,
        "objective": objective,
        "image_size": image_size,
        "devices": devices,
        "accumulate": accumulate_grad_batches,
        "precision": None if precision is None else PRECISIONS.get(precision, precision),
        "recompute": recompute,
        "compiled": compile,
    }
    recipe = Recipe(max_steps=STEPS) if config is None else read_recipe(config, known_network=network is not None)
    wanted = recipe._replace(**{name: value for name, value in told.items() if value is not None})
    planned = decide(wanted, device_kind=device_kind, batch_size=batch_size, steps=steps, mfu=mfu)
    if sweep is not None:
        draw_sweep(planned, Path(sweep), mfu=CPU_MFU if mfu is None and device_kind.lower() == "cpu" else mfu)
    found = facts(planned)
    print(json.dumps(found) if format == "json" else "\n".join(lines(found)))


def decide(wanted: Recipe, *, device_kind: str, batch_size: int | None, steps: int | None, mfu: float | None) -> Plan:
    """Fill in what was left open.

    Args:
        wanted: What recipe and options say.
        device_kind: A key of the device table, or cpu.
        batch_size: Images per optimiser step, all devices together.
        steps: Optimiser steps.
        mfu: Share of the device's peak.

    Raises:
        ValueError: A number is out of range, the batch does not divide, or device or precision are not known.
    """
    cpu = device_kind.lower() == "cpu"
    device = measured_cpu() if cpu else find_device(device_kind)
    config = wanted.config()
    devices = 1 if wanted.devices is None else wanted.devices
    accumulate = 1 if wanted.accumulate is None else wanted.accumulate
    if batch_size is None:
        batch_size = BATCH_SIZE if wanted.batch_size is None else wanted.batch_size * devices * accumulate
    check_divides(batch_size, devices, accumulate)
    run = Run(
        config,
        Schedule(batch_size, wanted.steps(batch_size, accumulate) if steps is None else steps),
        device,
        devices,
        wanted.precision or ("bf16-mixed" if device.bfloat16 else "32-true"),
        CPU_MFU if cpu else usual_mfu(config),
    )
    # A network too small for its device does not come near the usual.
    run = replace(run, mfu=min(run.mfu, run.ceiling_mfu) if mfu is None else mfu)
    return Plan(wanted.name(), run, accumulate, wanted.recompute or "none", bool(wanted.compiled))


def check_divides(batch_size: int, devices: int, accumulate: int) -> None:
    """Insist that every device computes as many images at once as every other.

    Raises:
        ValueError: They do not, or a number is below 1; the message says what to take.
    """
    for name, value in (("batch_size", batch_size), ("devices", devices), ("accumulate_grad_batches", accumulate)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    parts = devices * accumulate
    if batch_size % parts:
        less, more = batch_size // parts * parts, -(-batch_size // parts) * parts
        among = f"{devices} devices" + (f" x {accumulate} batches each" if accumulate > 1 else "")
        raise ValueError(
            f"batch_size {batch_size} counts the images of all devices in a step, and {among} cannot share them "
            f"evenly; take {f'{less} or {more}' if less else more}"
        )


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    return run_function(plan, words, "plan")
