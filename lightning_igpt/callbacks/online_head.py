"""The classifier of ``OnlineProbe``."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOMENTUM = 0.1  # share of a new batch in the running mean and variance of the features
EPS = 1e-6  # added to variances, and Adam's: the rounding of a gradient that is zero shall not make a step


class OnlineHead(nn.Module):
    """Linear classifier of features (B, D), standardized by their running mean and variance to a length of about 1."""

    def __init__(self, n_embd: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, n_embd))  # nothing is drawn
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.mean, self.variance = nn.Buffer(torch.zeros(n_embd)), nn.Buffer(torch.zeros(n_embd))
        self.count = nn.Buffer(torch.zeros((), dtype=torch.long))  # batches seen

    def forward(self, features: Tensor) -> Tensor:
        scale = (self.variance * len(self.mean) + EPS).rsqrt()
        return F.linear((features - self.mean) * scale, self.weight, self.bias)

    @torch.no_grad()
    def follow(self, features: Tensor, mean_over_processes: Callable[[Tensor], Any]) -> None:
        """Move mean and variance towards those of a batch (B, D)."""
        self.count.add_(1)
        share = self.count.float().reciprocal().clamp(min=MOMENTUM)  # a plain mean over the first batches
        centered = features - self.mean
        moments = mean_over_processes(torch.stack([centered.mean(0), centered.square().mean(0)]))  # (2, D)
        shift = share * moments[0]
        self.mean.add_(shift)
        self.variance.lerp_(moments[1], share).sub_(shift.square()).clamp_(min=0)
