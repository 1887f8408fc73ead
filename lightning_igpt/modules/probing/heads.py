"""The classifier of several layers together, and the votes of several masks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lightning_igpt.objectives import majority_vote


class ConcatHead(nn.Module):
    """A classifier of the concatenated features of several layers (paper, section 4.4).

    Args:
        layers: Numbers of the layers that are probed.
        count: How many of them are concatenated.
        num_classes: C.
        width: D.
    """

    weight: Tensor  # (C, count * D)
    bias: Tensor  # (C,)
    center: Tensor  # place in layers that the concatenated ones are centred on; -1 before the fit

    def __init__(self, layers: Sequence[int], count: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.layers, self.count = list(layers), count
        self.register_buffer("weight", torch.zeros(num_classes, count * width))
        self.register_buffer("bias", torch.zeros(num_classes))
        self.register_buffer("center", torch.tensor(-1))

    @property
    def fitted(self) -> bool:
        """Whether there is a classifier."""
        return int(self.center) >= 0

    @property
    def places(self) -> list[int]:
        """Places in ``layers`` of those concatenated."""
        return places_around(self.layers, int(self.center), self.count)

    @property
    def name(self) -> str:
        """The layers, such as 8-12, or 8+10+12 where some between are not probed."""
        layers = [self.layers[place] for place in self.places]
        gapless = layers == list(range(layers[0], layers[-1] + 1))
        return f"{layers[0]}-{layers[-1]}" if gapless and len(layers) > 1 else "+".join(map(str, layers))

    def forward(self, read: Callable[[int], Tensor]) -> Tensor:
        """Logits (..., C), where ``read`` gives the features (..., D) of the layer in a place, read in turn."""
        parts = self.weight.float().chunk(self.count, dim=1)  # count of (C, D)
        logits = self.bias.float()
        for place, part in zip(self.places, parts, strict=True):
            logits = logits + read(place) @ part.T
        return logits


def places_around(layers: Sequence[int], center: int, count: int) -> list[int]:
    """Places in ``layers`` of the ``count`` ones nearest in depth to that in place ``center``, from shallow to deep.

    At the ends the window is moved, not cut: of layers 0 to 12, five around 11 are 8 to 12.
    """
    by_depth = sorted(range(len(layers)), key=layers.__getitem__)
    start = min(max(0, by_depth.index(center) - count // 2), len(layers) - count)
    return by_depth[start : start + count]


def vote(logits: Tensor, samples: Tensor, *, seed: int) -> Tensor:
    """The classes that most masks name, for each of n classifiers by itself (paper, section 4.6).

    Args:
        logits: Float (M, B, n, C).
        samples: int64 (B,), the number of each sample; decides ties together with the seed.
        seed: Any integer.

    Returns:
        int64 (B, n).
    """
    votes = logits.argmax(-1)  # (M, B, n)
    if len(votes) == 1:
        return votes[0]
    _, n_rows, n_heads, num_classes = logits.shape
    numbers = samples.repeat_interleave(n_heads)
    return majority_vote(votes.flatten(1), numbers, num_classes, seed=seed).view(n_rows, n_heads)
