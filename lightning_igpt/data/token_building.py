"""Decodes, crops and quantises a whole split, in several processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from lightning_igpt.data.bad_images import BadImage, BadImages, without_traceback
from lightning_igpt.data.locations import quiet
from lightning_igpt.data.readers import ImageReader
from lightning_igpt.images import BadImageError
from lightning_igpt.palette import Palette
from lightning_igpt.progress import working

_CHUNK = 64  # images that a process decodes before it hands them over
_WORTH_WORKERS = 2000  # images; fewer are decoded before workers have started
_MOST_WORKERS = 8


@dataclass(frozen=True)
class Crops(Dataset[tuple[Any, ...]]):
    """Crops of the images of a range of rows.

    Args:
        reader: Reads a whole split.
        n_crops: Crops of each image; crop c of row r is draw ``r * n_crops + c``.
    """

    reader: ImageReader
    n_crops: int

    def __getitem__(self, rows: range) -> tuple[range, NDArray[np.uint8], list[tuple[int, BadImage]]]:
        """The rows, uint8 (rows, crops, 3, S, S), and the rows that could not be read."""
        size, bad = self.reader.resize.size, []
        pixels = np.zeros((len(rows), self.n_crops, 3, size, size), np.uint8)
        for number, (row, value) in enumerate(zip(rows, self.reader.values(list(rows)), strict=True)):
            image = self.reader.decode(row, value)
            if isinstance(image, BadImage):
                bad.append((row, image))
                continue
            for crop in range(self.n_crops):
                square = self.reader.resize(image, row * self.n_crops + crop)
                pixels[number, crop] = np.asarray(square).transpose(2, 0, 1)
        return rows, pixels, bad


@dataclass(frozen=True)
class TokenBuilder:
    """Fills a file with the tokens of a split.

    Args:
        reader: Reads a whole split.
        palette: Colours.
        n_crops: Crops of each image.
        num_workers: Processes to decode in; 0 takes up to eight for larger sets.
        max_bad_share: Largest share of images that may be left out.
    """

    reader: ImageReader
    palette: Palette
    n_crops: int
    num_workers: int
    max_bad_share: float

    def fill(self, tokens: NDArray[np.uint16]) -> list[tuple[int, str, str]]:
        """Write every row of ``tokens``, (images, crops, S * S).

        Returns:
            (row, place, reason) of images that could not be read.

        Raises:
            BadImageError: One cannot be read and the reader's policy is "error", or too many cannot be.
        """
        n_images = len(tokens)
        log = BadImages(self.max_bad_share, n_images)
        found: list[tuple[int, str, str]] = []
        with quiet(), working("token cache, images", n_images) as advance:
            for rows, pixels, bad in self._crops(n_images):
                ids = self.palette.quantize(torch.from_numpy(pixels).flatten(0, 1))  # (rows * crops, S * S)
                tokens[rows.start : rows.stop] = ids.numpy().reshape(len(rows), self.n_crops, -1)
                log.note([image for _, image in bad], len(rows))
                found += [(row, image.place, image.reason) for row, image in bad]
                advance(len(rows))
        return found

    def _crops(self, n_images: int) -> Iterator[Any]:
        chunks = [range(start, min(start + _CHUNK, n_images)) for start in range(0, n_images, _CHUNK)]
        workers = self.num_workers
        if workers == 0 and n_images >= _WORTH_WORKERS:
            workers = min(_MOST_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
        crops = Crops(self.reader, self.n_crops)
        try:
            yield from DataLoader(crops, batch_size=None, sampler=chunks, num_workers=workers, collate_fn=_as_it_is)
        except BadImageError as error:
            raise without_traceback(error) from error


def _as_it_is(value: Any) -> Any:
    return value
