"""The paper's optimiser and schedule (sections 3.4 and A.1): Adam, linear warm-up, cosine to zero.

Not the paper's: layer-wise decay of the learning rate, for fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn


def make_adam(
    parameters: Iterable[nn.Parameter],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
    below: Sequence[Iterable[nn.Parameter]] = (),
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """Adam with decoupled weight decay on matrices only; gains, biases and the start vector are never decayed.

    Every group notes what a resumed run needs to set its rate and decay anew: ``lr_scale``, by which its rate is
    smaller than ``lr``, and ``decayed``, whether weight decay is for it.

    Args:
        parameters: What to train; those that need no gradient are left out.
        lr: Peak learning rate.
        betas: Decay of the two moments; the paper uses 0.9 and 0.95, as 0.999 gave loss spikes.
        weight_decay: The paper uses 0, which makes this plain Adam.
        below: More parameters to train, layer by layer, from the one under ``parameters`` down to the input.
        layer_decay: The k-th entry of ``below``, counted from 1, trains at ``lr * layer_decay**k``. Layer-wise decay
            is that of ELECTRA (Clark et al., 2020); the exponents are those of BEiT (Bao et al., 2022).
    """
    groups: list[dict[str, Any]] = []
    for depth, layer in enumerate([parameters, *below]):
        trained = [parameter for parameter in layer if parameter.requires_grad]
        scale = layer_decay**depth
        for decayed in (True, False):
            chosen = [parameter for parameter in trained if (parameter.ndim >= 2) == decayed]
            decay = weight_decay if decayed else 0.0
            group = {"params": chosen, "lr": lr * scale, "weight_decay": decay, "lr_scale": scale, "decayed": decayed}
            groups += [group] if chosen else []
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


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
