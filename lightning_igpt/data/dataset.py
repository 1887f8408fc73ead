"""Whole batches of images as bytes: read rows, decode, resize, augment, stack."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_igpt.data.order import Draw
from lightning_igpt.data.splits import Part
from lightning_igpt.data.transforms import Augment, Resize
from lightning_igpt.images import BadImageError, decode

CACHE_LIMIT = 256 * 2**20  # bytes; 87,381 images of 32 x 32


class PixelCache:
    """Resized images that were decoded once, filled as they are read.

    Args:
        n_images: Number of rows.
        size: Side of the images; memory is ``n_images * 3 * size**2`` bytes.
        shared: Put it into shared memory, where the workers of a DataLoader find each other's images.
    """

    def __init__(self, n_images: int, size: int, *, shared: bool) -> None:
        # Tensors, because these stay shared when they are sent to a worker; read through NumPy, whose small copies do
        # not wait for a pool of threads.
        self.pixels = torch.zeros(n_images, 3, size, size, dtype=torch.uint8)
        self.filled = torch.zeros(n_images, dtype=torch.bool)
        # The lock is also the barrier that lets no processor see a row's mark before its pixels.
        self.lock: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if shared:
            for tensor in (self.pixels, self.filled):
                tensor.share_memory_()  # type: ignore[no-untyped-call]
            self.lock = multiprocessing.Lock()

    def read(self, rows: list[int]) -> tuple[NDArray[np.uint8], list[int]]:
        """Return uint8 (B, 3, S, S) and the places in it that are not filled yet."""
        with self.lock:
            absent = np.flatnonzero(~self.filled.numpy()[rows]).tolist()
        return self.pixels.numpy()[rows], absent

    def write(self, rows: list[int], pixels: NDArray[np.uint8]) -> None:
        """Keep ``pixels``, uint8 (B, 3, S, S)."""
        self.pixels.numpy()[rows] = pixels
        with self.lock:
            self.filled.numpy()[rows] = True


def make_cache(policy: str, n_images: int, size: int, *, num_workers: int) -> PixelCache | None:
    """A cache by the option ``cache``: "memory", "none" or "auto"."""
    # Not by itself with workers: they decode beside the training, and shared memory is small in containers.
    fits = num_workers == 0 and n_images * 3 * size**2 <= CACHE_LIMIT
    if policy == "none" or (policy == "auto" and not fits):
        return None
    return PixelCache(n_images, size, shared=num_workers > 0)


class ImageBatches(Dataset[dict[str, Tensor]]):
    """Indexed by a list of (row, sample) pairs, as the orders yield them; gives a finished batch.

    Args:
        part: The rows.
        image_column: Column of ``{"bytes", "path"}``.
        resize: Makes an image square.
        labels: int64 (len(part),), or None.
        augment: Changes the pixels of training images.
        cache: Where resized images are kept; those that a random crop made are not.
    """

    def __init__(
        self,
        part: Part,
        *,
        image_column: str,
        resize: Resize,
        labels: Tensor | None = None,
        augment: Augment | None = None,
        cache: PixelCache | None = None,
    ) -> None:
        self.part, self.image_column, self.labels = part, image_column, labels
        self.resize, self.augment, self.cache = resize, augment, cache
        self._images = part.dataset.select_columns([image_column])

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, draws: Sequence[Draw]) -> dict[str, Tensor]:
        """Read one batch.

        Returns:
            ``image`` uint8 (B, 3, S, S), ``sample`` int64 (B,) and, with labels, ``label`` int64 (B,).

        Raises:
            BadImageError: An image cannot be used; the message names source, split, row and path.
            TypeError: The sampler is not one of this package's.
        """
        if isinstance(draws, int):
            raise TypeError(
                "this data set is read by its own order; overfit_batches and other samplers do not work with it. "
                "To overfit, give a small source and limit_train_batches"
            )
        rows, samples = [row for row, _ in draws], [sample for _, sample in draws]
        pixels = self._read(rows, samples)  # (B, 3, S, S)
        if self.augment is not None:
            pixels = np.stack([self.augment(image, sample) for image, sample in zip(pixels, samples, strict=True)])
        batch = {
            "image": torch.from_numpy(np.ascontiguousarray(pixels)),
            "sample": torch.tensor(samples, dtype=torch.int64),
        }
        if self.labels is not None:
            batch["label"] = self.labels[rows]
        return batch

    def _read(self, rows: list[int], samples: list[int]) -> NDArray[np.uint8]:
        if self.cache is None:
            return np.stack([pixels for pixels, _ in self._decode(rows, samples)])
        pixels, absent = self.cache.read(rows)
        if absent:
            new = self._decode([rows[place] for place in absent], [samples[place] for place in absent])
            pixels[absent] = np.stack([image for image, _ in new])
            keep = [place for place, (_, is_random) in zip(absent, new, strict=True) if not is_random]
            self.cache.write([rows[place] for place in keep], pixels[keep])
        return pixels

    def _decode(self, rows: list[int], samples: list[int]) -> list[tuple[NDArray[np.uint8], bool]]:
        """(uint8 (3, S, S), whether another draw may differ) of each row."""
        rows = self.part.rows_of(rows)
        result = []
        values = self._images[rows][self.image_column]
        for row, sample, value in zip(rows, samples, values, strict=True):
            try:
                image = decode(value)
            except BadImageError as error:
                raise BadImageError(f"{self._place(row, value)}: {error}") from error
            pixels = np.asarray(self.resize(image, sample)).transpose(2, 0, 1)  # (3, S, S)
            result.append((pixels, self.resize.is_random(image)))
        return result

    def _place(self, row: int, value: Mapping[str, Any] | None) -> str:
        path = (value or {}).get("path")
        return f"{self.part.source}, split {self.part.split!r}, row {row}" + (f" ({path})" if path else "")
