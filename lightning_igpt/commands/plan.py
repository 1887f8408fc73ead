"""``lightning-igpt plan``: what a network costs before it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from lightning_igpt.commands.arguments import run_function
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.planning import loading_bytes, parameter_count, train_flops_per_token, training_bytes


def plan(
    network: str = "igpt_s",
    batch_size: int = 128,
    steps: int = 1_000_000,
    image_size: int | None = None,
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed",
) -> None:
    """Print parameters, operations and memory of a training run on one device.

    Args:
        network: Name of a preset.
        batch_size: Images per step.
        steps: Optimiser steps.
        image_size: Side of the images in pixels; default the preset's.
        precision: bf16-mixed or 32-true.
    """
    if batch_size < 1 or steps < 1:
        raise ValueError(f"batch_size {batch_size} and steps {steps} must be at least 1")
    config = ImageGPTConfig.resolve(network)
    config = config if image_size is None else replace(config, image_size=image_size)
    per_step = train_flops_per_token(config) * config.n_positions * batch_size
    memory = training_bytes(config, batch_size, precision)
    rows = {
        "network": f"{network}: {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads",
        "image": f"{config.image_size} x {config.image_size} = {config.n_positions} tokens",
        "parameters": f"{parameter_count(config):,}",
        "train FLOPs per token": f"{train_flops_per_token(config):.3e}",
        "train FLOPs per step": f"{per_step:.3e}",
        "train FLOPs of the run": f"{per_step * steps:.3e} ({batch_size * steps:,} images)",
        "memory to load weights": f"{loading_bytes(config) / 2**30:.2f} GiB",
        **{f"memory, {part}": f"{size / 2**30:.2f} GiB" for part, size in memory.items()},
        "memory, together": f"{sum(memory.values()) / 2**30:.2f} GiB",
    }
    for name, value in rows.items():
        print(f"{name:<24}{value}")


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    return run_function(plan, words, "plan")
