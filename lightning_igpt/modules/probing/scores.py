"""The probe's table of results, and the counters that fill it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy


class Scores(nn.Module):
    """A row and a counter for each layer, and one more for layers that are fitted together.

    Args:
        layers: The layer numbers.
        num_classes: C; 0 as long as it is unknown, when nothing can be counted yet.
    """

    def __init__(self, layers: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.layers = list(layers)
        self.together = len(self.layers)  # place of the last row and counter
        n_counters = self.together + 1 if num_classes else 0
        self.counters = nn.ModuleList(MulticlassAccuracy(num_classes, average="micro") for _ in range(n_counters))
        self.clear()

    def clear(self) -> None:
        """Empty the table."""
        self.rows = [_row(layer) for layer in self.layers]

    def add_together(self, name: str, c: float) -> None:
        """Add the row of the layers that were fitted together."""
        self.rows[self.together :] = [_row(name, c)]

    def by_layer(self, column: str) -> dict[int, float]:
        """A column of the table by layer number, without its gaps."""
        values = {layer: row[column] for layer, row in zip(self.layers, self.rows, strict=False)}
        return {layer: value for layer, value in values.items() if value is not None}

    def update(self, predictions: Tensor, labels: Tensor, *, first: int = 0) -> None:
        """Count int64 predictions (B, n) of the n classifiers from place ``first`` on, against int64 labels (B,)."""
        for counter, column in zip(self.counters[first:], predictions.unbind(1), strict=False):
            counter.update(column, labels)  # type: ignore[operator]

    def finish(self, column: str, places: range) -> Tensor:
        """Put the accuracies of some classifiers into the table and begin anew; all devices together.

        Returns:
            Float (len(places),).
        """
        counters: Any = [self.counters[place] for place in places]
        accuracy = torch.stack([counter.compute() for counter in counters])
        for place, counter, value in zip(places, counters, accuracy.tolist(), strict=True):
            self.rows[place][column] = value
            counter.reset()
        return accuracy


def _row(layer: int | str, c: float | None = None) -> dict[str, Any]:
    return {"layer": layer, "c": c, "val_accuracy": None, "test_accuracy": None}
