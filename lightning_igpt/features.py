"""Logistic regression on pooled features, the linear probe of the paper (sections 2.4 and 3.4).

The features themselves come from ``ImageGPT.features``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

HISTORY = 10  # pairs that L-BFGS remembers, as in scikit-learn


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
    features = features.float()
    mean, scale = features.new_zeros(features.shape[1]), features.new_ones(features.shape[1])
    if standardize:
        mean, scale = features.mean(0), features.std(0, correction=0)
        scale = torch.where(scale > 1e-7, scale, 1)  # a constant feature stays zero instead of becoming noise
        features = (features - mean) / scale
    weight = features.new_zeros(num_classes, features.shape[1], requires_grad=True)
    bias = features.new_zeros(num_classes, requires_grad=True)
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
    weight, bias = weight.detach() / scale, bias.detach()
    return weight, bias - weight @ mean
