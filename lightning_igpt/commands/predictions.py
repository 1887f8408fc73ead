"""What ``predict`` writes."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Collection, Sequence
from pathlib import Path

from torch import Tensor

from lightning_igpt.pictures import save_png


def write_predictions(
    predictions: Tensor, folder: Path, class_names: Sequence[str] | None, *, left_out: Collection[int] = ()
) -> Path:
    """Write images, uint8 (N, 3, S, S), as PNG files, or class probabilities, float (N, C), as a CSV file.

    They are named by the rows of the data, of which those ``left_out`` have no prediction.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = (row for row in itertools.count() if row not in left_out)
    if predictions.ndim == 4:
        for number, image in zip(rows, predictions, strict=False):
            save_png(image, folder / f"{number:06d}.png")
        return folder
    names = list(class_names or [])
    names += [str(number) for number in range(len(names), predictions.shape[1])]
    path = folder / "classes.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "class", *names])
        for row, values in zip(rows, predictions.tolist(), strict=False):
            writer.writerow([row, names[values.index(max(values))], *(f"{value:.6f}" for value in values)])
    return path
