"""The paper's optimiser and schedule (sections 3.4 and A.1): Adam, linear warm-up, cosine to zero."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn


def make_adam(
    parameters: Iterable[nn.Parameter], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """Adam with decoupled weight decay on matrices only; gains, biases and the start vector are never decayed.

    Args:
        parameters: What to train; those that need no gradient are left out.
        lr: Peak learning rate.
        betas: Decay of the two moments; the paper uses 0.9 and 0.95, as 0.999 gave loss spikes.
        weight_decay: The paper uses 0, which makes this plain Adam.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim >= 2], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas, fused=True)


def warmup_cosine(
    optimizer: torch.optim.Optimizer, *, warmup_steps: int, total_steps: int
) -> torch.optim.lr_scheduler.LambdaLR:
    """Rise linearly over ``warmup_steps``, then fall along a cosine to zero at ``total_steps``.

    Raises:
        ValueError: The warm-up is longer than the run.
    """
    if warmup_steps > total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps} but the run has {total_steps} steps; lower warmup_steps or train longer"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def warmup_constant(optimizer: torch.optim.Optimizer, *, warmup_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Rise linearly over ``warmup_steps``, then stay."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))


def default_warmup(total_steps: int, steps_per_epoch: int | None) -> int:
    """One epoch as in the paper, but never more than a tenth of the run (the paper's runs last 100 epochs)."""
    tenth = max(1, total_steps // 10)
    return tenth if steps_per_epoch is None else max(1, min(steps_per_epoch, tenth))
