"""What happens to images that cannot be read: an error, or a stand-in and an entry in a list that has an end."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from lightning.pytorch.utilities import rank_zero_warn

from lightning_igpt.data.transforms import draw_generator
from lightning_igpt.images import BadImageError

OnBadImage: TypeAlias = Literal["error", "skip"]

MAX_STAND_INS = 100  # tried for one image, before the data set itself is called bad
_SHOWN = 10  # warnings of single images; the list has them all
_ENOUGH_READ = 1000  # images after which a share of those read means something


class BadImage(NamedTuple):
    """An image that could not be read."""

    place: str  # source, split, row and, where there is one, path
    reason: str
    number: int = -1  # its place in the part, or its row in a stream that is read once


def stand_ins(seed: int, place: int, n_images: int) -> Iterator[int]:
    """Places to try instead of one that cannot be read: a function of these numbers, whoever reads."""
    generator = draw_generator(seed, place)
    for _ in range(MAX_STAND_INS):
        yield int(generator.integers(n_images))


def without_traceback(error: BadImageError) -> BadImageError:
    """The error as it was raised: torch writes the whole traceback of a worker into the text."""
    # Torch's frames hold the error in a cycle, and with it the workers, which then wait for ever: whatever collects
    # cycles closes their queues before it tells them to stop.
    error.__traceback__ = None
    return BadImageError(str(error).rpartition(f"{BadImageError.__name__}: ")[2].strip())


class BadImages:
    """The images left out so far, each once.

    Args:
        max_share: Largest share of images that may be left out.
        n_images: Images there are; None where that is not known.
    """

    def __init__(self, max_share: float, n_images: int | None = None) -> None:
        self.max_share, self.n_images = max_share, n_images
        self.found: dict[str, str] = {}  # place: reason
        self.numbers: set[int] = set()
        self.n_read = 0

    def note(self, bad: list[BadImage], n_read: int) -> None:
        """Take note of a batch of ``n_read`` images of which ``bad`` could not be read.

        Raises:
            BadImageError: More than ``max_share`` of all images are bad; where their number is not known, of at least
                1,000 read so far.
        """
        self.n_read += n_read
        for image in bad:
            if image.place not in self.found:
                self.found[image.place] = image.reason
                self.numbers.add(image.number)
                if len(self.found) <= _SHOWN:
                    rank_zero_warn(f"left out {image.place}: {image.reason}")
        if bad:
            self._check()

    def _check(self) -> None:
        n_bad = len(self.found)
        of_all = self.n_images is not None and n_bad > self.max_share * self.n_images
        of_read = self.n_images is None and self.n_read >= _ENOUGH_READ and n_bad > self.max_share * self.n_read
        if of_all or of_read:
            total = f"{self.n_images} images" if of_all else f"the first {self.n_read} images"
            first, reason = next(iter(self.found.items()))
            raise BadImageError(
                f"{n_bad} of {total} cannot be read, more than max_bad_share={self.max_share:g} allows; the first is "
                f"{first}: {reason}. Repair or remove them, or set max_bad_share"
            )


def write_list(found: dict[str, str], path: Path) -> Path:
    """Write images that were left out, and why, as CSV; return the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "reason"), *found.items()])
    return path
