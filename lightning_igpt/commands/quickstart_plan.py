"""What ``quickstart`` would do, for ``--dry_run``."""

from __future__ import annotations

from lightning_igpt.commands.dry_run import NOTHING, network, row
from lightning_igpt.commands.plan_cpu import measured_cpu
from lightning_igpt.commands.plan_text import hours
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.planning import CPU_MFU, Run, Schedule

BATCH_SIZE = 16


def planned(config: ImageGPTConfig, steps: int, epochs: int, out: str) -> list[str]:
    """The four steps, and what is known of their time, as lines of a table.

    Args:
        config: The network.
        steps: Optimiser steps of pretraining.
        epochs: Passes of fine-tuning.
        out: The folder of the results.

    Raises:
        ValueError: There are no steps to make.
    """
    run = Run(config, Schedule(BATCH_SIZE, steps), measured_cpu(), precision="32-true", mfu=CPU_MFU)
    floor = hours(run.floor_device_seconds)
    return [
        row("network", network(config)),
        row("data", "digits, which are embedded: 1,437 training and 360 test images"),
        row("1", f"pretraining without labels: {steps:,} steps of {BATCH_SIZE} images"),
        row("2", "completing lower halves of test images"),
        row("3", "probing every layer, and the same network untrained"),
        row("4", f"fine-tuning to a classifier: {epochs} passes"),
        row("time", f"unknown: pretraining cannot take less than {floor} by this CPU's speed, measured just now, and"),
        row("", "networks this small take several times as long; count in minutes"),
        row("results", f"{out}: report.html, pictures, checkpoints and logs"),
        f"dry run: {NOTHING}",
    ]
