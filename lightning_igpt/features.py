"""Logistic regression on pooled features, the linear probe of the paper (sections 2.4 and 3.4).

The features themselves come from ``ImageGPT.features``; where they are kept is no matter of this file.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

HISTORY = 10  # pairs that L-BFGS remembers, as in scikit-learn
C_GRID = (0.001, 0.01, 0.1, 1.0, 10.0)  # ours: the paper names no strength
SELECT_PART = 10  # one row in so many is held out to choose c on
SELECT_LEAST = 20  # rows; on fewer, one image would decide


def fit_logistic(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    c: float = 1.0,
    standardize: bool = True,
    max_iter: int = 1000,
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression with an L2 penalty, minimised by L-BFGS.

    The objective is scikit-learn's: mean cross-entropy + |weight|^2 / (2 c N); the bias is not penalised.

    Args:
        features: Float (N, D).
        labels: int64 (N,), 0 to num_classes - 1.
        num_classes: C.
        c: Inverse strength of the penalty.
        standardize: Scale each feature to mean 0 and variance 1 first. The scaling is folded into what is returned.
        max_iter: Upper bound on L-BFGS steps.
        tolerance: Stop when no entry of the gradient is larger.

    Returns:
        Weight (C, D) and bias (C,), so that ``features @ weight.T + bias`` are the logits of raw features.
    """
    features, mean, scale = _scaled(features, standardize)
    start = _zeros(features, num_classes)
    weight, bias = _minimize(features, labels, start, c=c, max_iter=max_iter, tolerance=tolerance)
    weight = weight / scale
    return weight, bias - weight @ mean


def choose_c(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    grid: Sequence[float] = C_GRID,
    standardize: bool = True,
    max_iter: int = 1000,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> float:
    """The strength that classifies held-out rows best, the strongest penalty among equals.

    Every value is fitted to the rows that ``split_rows`` keeps and measured on those that it holds out; give training
    features only. Too few rows to hold out leave no choice, as in usable_grid.

    Args:
        features: Float (N, D).
        labels: int64 (N,), 0 to num_classes - 1.
        num_classes: C.
        grid: Values of c, as in fit_logistic, in any order.
        standardize: As in fit_logistic; mean and variance are those of the rows kept.
        max_iter: Upper bound on L-BFGS steps, for each value.
        tolerance: As in fit_logistic.
        seed: Decides which rows are held out.
    """
    grid = usable_grid(grid, len(features))
    if len(grid) == 1:
        return grid[0]
    kept, held = split_rows(len(features), seed)
    x, mean, scale = _scaled(features[kept.to(features.device)], standardize)
    x_held = (features[held.to(features.device)].float() - mean) / scale
    y, y_held = labels[kept.to(labels.device)], labels[held.to(labels.device)]
    best, most, found = 0.0, -1, _zeros(x, num_classes)
    for c in sorted(grid):  # from strong to weak, each starts where the one before has ended
        found = _minimize(x, y, found, c=c, max_iter=max_iter, tolerance=tolerance)
        right = int(((x_held @ found[0].T + found[1]).argmax(1) == y_held).sum())
        log.debug("c=%g: %d of %d held-out images right", c, right, len(held))
        if right > most:
            best, most = c, right
    return best


def usable_grid(grid: Sequence[float], n_rows: int) -> Sequence[float]:
    """The grid or, with a warning, its value nearest to 1 where fewer than SELECT_LEAST rows would be held out."""
    n_held = n_rows // SELECT_PART
    if len(grid) == 1 or n_held >= SELECT_LEAST:
        return grid
    nearest = min(grid, key=lambda c: abs(math.log(c)))
    log.warning(
        "%d training images leave %d to choose c on, fewer than %d: c is %g, the nearest of the grid to 1. "
        "Set c= to fix another value",
        *(n_rows, n_held, SELECT_LEAST, nearest),
    )
    return (nearest,)


def split_rows(n_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the rows to fit to, and of the tenth (rounded down) to choose c on; int64 on the CPU, ascending."""
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))
    n_held = n_rows // SELECT_PART
    return order[n_held:].sort().values, order[:n_held].sort().values


def _zeros(features: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    return features.new_zeros(num_classes, features.shape[1]), features.new_zeros(num_classes)


def _scaled(features: Tensor, standardize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(features (N, D), mean (D,), scale (D,)), all float32; mean 0 and scale 1 where nothing is to be done."""
    features = features.float()
    if not standardize:
        return features, features.new_zeros(features.shape[1]), features.new_ones(features.shape[1])
    mean, scale = features.mean(0), features.std(0, correction=0)
    scale = torch.where(scale > 1e-7, scale, 1)  # a constant feature stays zero instead of becoming noise
    return (features - mean).div_(scale), mean, scale


def _minimize(
    features: Tensor, labels: Tensor, start: tuple[Tensor, Tensor], *, c: float, max_iter: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Weight and bias for features as they are, from a starting point that stays as it is."""
    weight, bias = (part.clone().requires_grad_() for part in start)
    penalty = 1 / (2 * c * len(features))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=max_iter,
        history_size=HISTORY,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + penalty * weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()
