"""Whole batches: read rows, augment, stack, add labels. Indexed by lists of draws, as the orders yield them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_igpt.data.bad_images import BadImage
from lightning_igpt.data.order import Draw
from lightning_igpt.data.transforms import Augment

BAD = "bad_images"  # key of a batch: what was left out; loaders take it off before anyone sees it


class Reading(NamedTuple):
    """What a reader makes of the draws it is asked for."""

    grids: NDArray[Any]  # (B, 3, S, S) uint8 pixels, or (B, 1, S, S) int16 tokens
    places: list[int]  # of the part, for each grid; another one than asked for where that could not be read
    samples: list[int]  # number of the draw, for each grid
    bad: list[BadImage]


class Reader(Protocol):
    """Gives pixels or tokens of places in a part."""

    def read(self, places: list[int], samples: list[int]) -> Reading:
        """Read the draws ``zip(places, samples)``."""
        ...


class ImageBatches(Dataset[dict[str, Any]]):
    """Indexed by a list of (place, sample) pairs; gives a finished batch.

    Args:
        reader: Where the pixels or tokens come from.
        n_images: Number of places.
        labels: int64 (n_images,), or None.
        augment: Changes training images.
    """

    def __init__(
        self, reader: Reader, n_images: int, *, labels: Tensor | None = None, augment: Augment | None = None
    ) -> None:
        self.reader, self.n_images, self.labels, self.augment = reader, n_images, labels, augment

    def __len__(self) -> int:
        return self.n_images

    def __getitem__(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """Read one batch.

        Returns:
            ``image`` uint8 (B, 3, S, S) or ``tokens`` int16 (B, S * S), ``sample`` int64 (B,) and, with labels,
            ``label`` int64 (B,).

        Raises:
            BadImageError: An image cannot be used; the message names source, split, row and path.
            TypeError: The sampler is not one of this package's.
        """
        if isinstance(draws, int):
            raise TypeError(
                "this data set is read by its own order; overfit_batches and other samplers do not work with it. "
                "To overfit, give a small source and limit_train_batches"
            )
        reading = self.reader.read([place for place, _ in draws], [sample for _, sample in draws])
        labels = None if self.labels is None else self.labels[reading.places]
        return make_batch(reading, labels, self.augment)


def make_batch(reading: Reading, labels: Tensor | None, augment: Augment | None) -> dict[str, Any]:
    """Augment what was read and give it the names that modules look for."""
    grids, samples = reading.grids, reading.samples
    if augment is not None:
        grids = augment(grids, samples)
    values = torch.from_numpy(np.ascontiguousarray(grids))
    batch: dict[str, Any] = {"tokens": values.flatten(1)} if values.shape[1] == 1 else {"image": values}
    batch["sample"] = torch.tensor(samples, dtype=torch.int64)
    if labels is not None:
        batch["label"] = labels
    if reading.bad:
        batch[BAD] = reading.bad
    return batch
