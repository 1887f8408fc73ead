"""Where the pixels or tokens of a place come from: image files, a cache of their pixels, or a column of tokens."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from numpy.typing import NDArray
from PIL import Image

from lightning_igpt.data.bad_images import BadImage, OnBadImage, stand_ins
from lightning_igpt.data.dataset import Reading
from lightning_igpt.data.splits import Part
from lightning_igpt.data.transforms import Resize
from lightning_igpt.images import BadImageError, decode

CACHE_LIMIT = 256 * 2**20  # bytes; 87,381 images of 32 x 32


class BadImagePolicy(NamedTuple):
    """What a reader does with an image that cannot be read.

    ``error`` raises; ``skip`` leaves the image out and, if ``replace``, reads another one of the part instead.
    """

    action: OnBadImage = "error"
    replace: bool = True
    seed: int = 0


STOP = BadImagePolicy()


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
    """A cache of pixels by the option ``cache``: "memory", "none" or "auto"."""
    # Not by itself with workers: they decode beside the training, and shared memory is small in containers.
    fits = num_workers == 0 and n_images * 3 * size**2 <= CACHE_LIMIT
    if policy == "none" or (policy == "auto" and not fits):
        return None
    return PixelCache(n_images, size, shared=num_workers > 0)


class ImageReader:
    """Decodes and resizes image files.

    Args:
        part: The rows.
        image_column: Column of ``{"bytes", "path"}``.
        resize: Makes an image square.
        cache: Where resized images are kept; those that a random crop made, and stand-ins, are not.
        policy: What happens to images that cannot be read.
    """

    def __init__(
        self,
        part: Part,
        image_column: str,
        resize: Resize,
        *,
        cache: PixelCache | None = None,
        policy: BadImagePolicy = STOP,
    ) -> None:
        self.part, self.image_column, self.resize, self.cache, self.policy = part, image_column, resize, cache, policy
        self._images = part.dataset.select_columns([image_column]).with_format("arrow")

    def read(self, places: list[int], samples: list[int]) -> Reading:
        """Read pixels, uint8 (B, 3, S, S).

        Raises:
            BadImageError: An image cannot be read and the policy is "error", or nothing of the batch can be.
        """
        places = list(places)
        if self.cache is None:
            pixels, _, bad = self._decode_all(places, samples)
        else:
            pixels, absent = self.cache.read(places)
            if not absent:
                return Reading(pixels, places, samples, [])
            of_absent = self._decode_all([places[number] for number in absent], [samples[number] for number in absent])
            pixels[absent], bad = of_absent[0], {absent[number]: image for number, image in of_absent[2].items()}
            fixed = [absent[number] for number in of_absent[1]]
            self.cache.write([places[number] for number in fixed], pixels[fixed])
        return self._without(bad, pixels, places, samples) if bad else Reading(pixels, places, samples, [])

    def values(self, places: list[int]) -> list[dict[str, Any]]:
        """The undecoded images, ``{"bytes", "path"}``; both are None where one is missing."""
        if not places:
            return []
        contents, paths = self._images[self.part.rows_of(places)][self.image_column].flatten()
        pairs = zip(contents.to_pylist(), paths.to_pylist(), strict=True)
        return [{"bytes": content, "path": path} for content, path in pairs]

    def decode(self, place: int, value: Mapping[str, Any]) -> Image.Image | BadImage:
        """One image, or what is wrong with it.

        Raises:
            BadImageError: It cannot be read and the policy is "error".
        """
        try:
            return decode(value)
        except BadImageError as error:
            bad = BadImage(self._describe(place, value), str(error), place)
            if self.policy.action == "error":
                raise BadImageError(
                    f"{bad.place}: {error}. Repair or remove it; on_bad_image=skip leaves such images out"
                ) from error
            return bad

    def _decode_all(
        self, places: list[int], samples: list[int]
    ) -> tuple[NDArray[np.uint8], list[int], dict[int, BadImage]]:
        """uint8 (B, 3, S, S), which of them no other draw would change, and what is bad in their stead."""
        size = self.resize.size
        # One tall picture becomes an array once; an array of every image and a stack take twice as long.
        tall = Image.new("RGB", (size, size * len(places)))
        fixed: list[int] = []
        bad: dict[int, BadImage] = {}
        for number, (place, value) in enumerate(zip(places, self.values(places), strict=True)):
            image = self.decode(place, value)
            if isinstance(image, BadImage):
                bad[number] = image
                continue
            tall.paste(self.resize(image, samples[number]), (0, number * size))
            if not self.resize.is_random(image):
                fixed.append(number)
        return np.asarray(tall).reshape(-1, size, size, 3).transpose(0, 3, 1, 2).copy(), fixed, bad

    def _without(
        self, bad: dict[int, BadImage], pixels: NDArray[np.uint8], places: list[int], samples: list[int]
    ) -> Reading:
        """What was read with stand-ins for bad images, or without them."""
        if self.policy.replace:
            for number in bad:
                places[number], pixels[number] = self._stand_in(places[number], samples[number])
            return Reading(pixels, places, samples, list(bad.values()))
        good = [number for number in range(len(places)) if number not in bad]
        if not good:
            first = next(iter(bad.values()))
            raise BadImageError(
                f"none of the {len(places)} images of a batch can be read; the first is {first.place}: {first.reason}"
            )
        return Reading(pixels[good], [places[i] for i in good], [samples[i] for i in good], list(bad.values()))

    def _stand_in(self, place: int, sample: int) -> tuple[int, NDArray[np.uint8]]:
        for other in stand_ins(self.policy.seed, place, len(self.part)):
            image = self.decode(other, *self.values([other]))
            if not isinstance(image, BadImage):
                return other, self._square(image, sample)
        raise BadImageError(f"found no image of {self.part.source}, split {self.part.split!r}, that can be read")

    def _square(self, image: Image.Image, sample: int) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = np.asarray(self.resize(image, sample)).transpose(2, 0, 1)  # (3, S, S)
        return pixels

    def _describe(self, place: int, value: Mapping[str, Any]) -> str:
        path = value["path"]
        (row,) = self.part.rows_of([place])
        return self.part.describe(row) + (f" ({path})" if path else "")


class TokenColumn:
    """Reads a column of tokens, as ``lightning_igpt.tokenize`` makes it.

    Args:
        part: The rows.
        column: Column of lists of S * S tokens.
        size: Side S of the images.
    """

    def __init__(self, part: Part, column: str, size: int) -> None:
        self.part, self.column, self.size = part, column, size
        self._tokens = part.dataset.select_columns([column]).with_format("arrow")

    def read(self, places: list[int], samples: list[int]) -> Reading:
        """Read tokens, int16 (B, 1, S, S)."""
        rows = self._tokens[self.part.rows_of(places)][self.column].combine_chunks()
        lengths = pc.list_value_length(rows).fill_null(0).to_numpy()
        if (lengths != self.size**2).any():
            wrong = int(np.flatnonzero(lengths != self.size**2)[0])
            (row,) = self.part.rows_of([places[wrong]])
            raise ValueError(f"{self.part.describe(row)}: there are {lengths[wrong]} tokens, not {self.size}^2")
        flat = rows.flatten().to_numpy(zero_copy_only=False)
        return Reading(flat.astype(np.int16).reshape(-1, 1, self.size, self.size), places, samples, [])
