"""From places in a part to whole batches: decoding, images that cannot be read, augmentation, labels.

Not here: columns of tokens (``tokens.py``), streams (``streams.py``).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_igpt.data.order import Draw
from lightning_igpt.data.splits import Part
from lightning_igpt.data.transforms import Augment, Resize, draw_generator
from lightning_igpt.images import BadImageError, decode

OnBadImage: TypeAlias = Literal["error", "skip"]

BAD = "bad_images"  # key of a batch: what was left out; the loader removes it
MAX_STAND_INS = 100  # tried for one image before the data set itself is called bad
REPAIR = "Repair or remove it; on_bad_image=skip leaves such images out"
_SHOWN = 10  # warnings of single images; the list has them all
_ENOUGH_READ = 1000  # images after which a share of those read means something


class BadImage(NamedTuple):
    """An image that could not be read."""

    place: str  # source, split, row and, where there is one, path
    reason: str
    number: int = -1  # its place in the part; -1 in a stream


class BadImages:
    """The images left out so far, each once."""

    def __init__(self, max_share: float, n_images: int | None = None) -> None:
        self.max_share, self.n_images = max_share, n_images
        self.reasons: dict[str, str] = {}  # by place
        self.numbers: set[int] = set()
        self.n_read = 0

    def note(self, bad: list[BadImage], n_read: int) -> None:
        """Record a batch of ``n_read`` images of which ``bad`` could not be read.

        Raises:
            BadImageError: More than ``max_share`` of all images are bad; where their number is unknown, of at least
                1,000 read so far.
        """
        self.n_read += n_read
        for image in bad:
            if image.place not in self.reasons:
                self.reasons[image.place] = image.reason
                self.numbers.add(image.number)
                if len(self.reasons) <= _SHOWN:
                    rank_zero_warn(f"left out {image.place}: {image.reason}")
        total, n_bad = self.n_images or self.n_read, len(self.reasons)
        if bad and n_bad > self.max_share * total and (self.n_images or self.n_read >= _ENOUGH_READ):
            first, reason = next(iter(self.reasons.items()))
            raise BadImageError(
                f"{n_bad} of {total} images cannot be read, more than max_bad_share={self.max_share:g} allows; the "
                f"first is {first}: {reason}. Repair or remove them, or set max_bad_share"
            )


class Reading(NamedTuple):
    """What a reader makes of the draws it is asked for."""

    grids: NDArray[Any]  # (B, 3, S, S) uint8 pixels, or (B, 1, S, S) int16 tokens
    places: list[int]  # of the part, for each grid; a stand-in's where the one asked for could not be read
    samples: list[int]  # number of the draw, for each grid
    bad: list[BadImage]


class Reader(Protocol):
    """Gives pixels or tokens of places in a part."""

    def read(self, places: list[int], samples: list[int]) -> Reading:
        """Read the draws ``zip(places, samples)``."""
        ...


class BadImagePolicy(NamedTuple):
    """What a reader does with an image that cannot be read.

    ``error`` raises; ``skip`` leaves the image out and, if ``replace``, reads another one of the part instead, chosen
    by ``seed`` and place alone, whoever reads.
    """

    action: OnBadImage = "error"
    replace: bool = True
    seed: int = 0

    def settle(
        self, reading: Reading, bad: Mapping[int, BadImage], part: Part, read: Callable[[int, int], Any]
    ) -> Reading:
        """Put stand-ins in the place of bad images, or take these out.

        Args:
            reading: What was read, with anything in the place of bad images.
            bad: The bad images by their index in the batch.
            part: Where stand-ins come from.
            read: Maps (place, sample) to a grid or a BadImage.

        Raises:
            BadImageError: The policy is "error", nothing of the batch can be read, or no stand-in can.
        """
        if not bad:
            return reading
        first = next(iter(bad.values()))
        if self.action == "error":
            raise BadImageError(f"{first.place}: {first.reason}. {REPAIR}")
        grids, places, samples, _ = reading
        if self.replace:
            for index in bad:
                places[index], grids[index] = self._stand_in(places[index], samples[index], part, read)
            return Reading(grids, places, samples, list(bad.values()))
        good = [index for index in range(len(places)) if index not in bad]
        if not good:
            raise BadImageError(
                f"none of the {len(places)} images of a batch can be read; the first is {first.place}: {first.reason}"
            )
        return Reading(grids[good], [places[i] for i in good], [samples[i] for i in good], list(bad.values()))

    def _stand_in(self, place: int, sample: int, part: Part, read: Callable[[int, int], Any]) -> tuple[int, Any]:
        generator = draw_generator(self.seed, place)
        for _ in range(MAX_STAND_INS):
            other = int(generator.integers(len(part)))
            grid = read(other, sample)
            if not isinstance(grid, BadImage):
                return other, grid
        raise BadImageError(f"no image of {part.source}, split {part.split!r}, could be read in {MAX_STAND_INS} tries")


STOP = BadImagePolicy()


class ImageReader:
    """Decodes and resizes image files."""

    def __init__(self, part: Part, image_column: str, resize: Resize, policy: BadImagePolicy = STOP) -> None:
        self.part, self.image_column, self.resize, self.policy = part, image_column, resize, policy
        self._images = part.dataset.select_columns([image_column]).with_format("arrow")

    def read(self, places: list[int], samples: list[int]) -> Reading:
        """Read pixels, uint8 (B, 3, S, S).

        Raises:
            BadImageError: See ``BadImagePolicy.settle``.
        """
        size = self.resize.size
        # One tall picture becomes an array once; an array of every image and a stack take twice as long.
        tall = Image.new("RGB", (size, size * len(places)))
        bad: dict[int, BadImage] = {}
        for index, (place, value) in enumerate(zip(places, self._values(places), strict=True)):
            image = self._decode(place, value)
            if isinstance(image, BadImage):
                bad[index] = image
                if self.policy.action == "error":
                    break
            else:
                tall.paste(self.resize(image, samples[index]), (0, index * size))
        pixels = np.asarray(tall).reshape(-1, size, size, 3).transpose(0, 3, 1, 2).copy()
        return self.policy.settle(Reading(pixels, list(places), samples, []), bad, self.part, self._one)

    def _values(self, places: list[int]) -> Iterator[dict[str, Any]]:
        """The undecoded images, ``{"bytes", "path"}``; both are None where one is missing."""
        contents, paths = self._images[self.part.rows_of(places)][self.image_column].flatten()
        pairs = zip(contents.to_pylist(), paths.to_pylist(), strict=True)
        return ({"bytes": content, "path": path} for content, path in pairs)

    def _decode(self, place: int, value: Mapping[str, Any]) -> Image.Image | BadImage:
        try:
            return decode(value)
        except BadImageError as error:
            (row,) = self.part.rows_of([place])
            return BadImage(self.part.describe(row, value["path"]), str(error), place)

    def _one(self, place: int, sample: int) -> NDArray[np.uint8] | BadImage:
        image = self._decode(place, next(self._values([place])))
        return image if isinstance(image, BadImage) else square(self.resize, image, sample)


def square(resize: Resize, image: Image.Image, sample: int) -> NDArray[np.uint8]:
    """The pixels of a resized image, uint8 (3, S, S)."""
    pixels: NDArray[np.uint8] = np.asarray(resize(image, sample)).transpose(2, 0, 1)
    return pixels


class ImageBatches(Dataset[dict[str, Any]]):
    """Indexed by a list of (place, sample) pairs; gives a finished batch."""

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
        check_draws(draws)
        reading = self.reader.read([place for place, _ in draws], [sample for _, sample in draws])
        labels = None if self.labels is None else self.labels[reading.places]
        return make_batch(reading, labels, self.augment)

    __getitems__ = __getitem__  # what torch calls with the draws of a batch


def check_draws(draws: Any) -> None:
    """Raise TypeError unless these are draws of one of this package's orders."""
    if not isinstance(draws, list) or not isinstance(draws[0], tuple):
        raise TypeError(
            "this data set is read in its own order; overfit_batches and other samplers do not work with it. To "
            "overfit, give a small source and limit_train_batches"
        )


def make_batch(reading: Reading, labels: Tensor | None, augment: Augment | None) -> dict[str, Any]:
    """Augment what was read and give it the keys that modules read."""
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


def write_list(reasons: Mapping[str, str], path: Path) -> Path:
    """Write images that were left out, and why, as CSV; return the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "reason"), *reasons.items()])
    return path
