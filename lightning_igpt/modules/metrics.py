"""Metrics that count right in every precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchmetrics import MeanMetric


class Mean(MeanMetric):
    """torchmetrics' mean, summed in float32: in bf16-true a sum in bfloat16 would stand still at 256 images."""

    def __init__(self) -> None:
        narrow = torch.get_default_dtype()  # Trainer.init_module sets it
        torch.set_default_dtype(torch.float32)
        try:
            super().__init__()
        finally:
            torch.set_default_dtype(narrow)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> Mean:
        def moved(value: Tensor) -> Tensor:
            return fn(value).to(value.dtype)

        return super()._apply(moved, exclude_state)  # type: ignore[return-value]
