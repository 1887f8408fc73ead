"""Rows of a stream that belong together, and what one row holds."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lightning_igpt.data.bad_images import BadImage
from lightning_igpt.data.transforms import Resize
from lightning_igpt.images import BadImageError, decode

_HASH_RANGE = 2**32


@dataclass(frozen=True)
class HoldOut:
    """Divides rows by a hash of their content, so that it depends on no order, and copies stay together.

    Args:
        fraction: Share of the rows that are held out.
        held_out: Whether to keep the held-out rows, or the others.
    """

    fraction: float
    held_out: bool

    def keeps(self, value: Any) -> bool:
        """Whether a row with this image belongs to the part."""
        return (zlib.crc32(_content(value)) < self.fraction * _HASH_RANGE) == self.held_out


@dataclass(frozen=True)
class StreamPart:
    """Rows of one split of a stream.

    Args:
        source: Name of the source, for messages.
        split: Name of the split.
        stream: The split.
        image_column: Column of images or tokens.
        label_column: Column of class numbers, or None.
        class_names: The classes of the training split; needed with labels.
        own_names: The classes as this split numbers them, where it does so otherwise.
        hold_out: Which rows belong to the part; None means all.
        tokens: Whether the column holds tokens.
    """

    source: str
    split: str
    stream: datasets.IterableDataset
    image_column: str
    label_column: str | None = None
    class_names: tuple[str, ...] = ()
    own_names: tuple[str, ...] = ()
    hold_out: HoldOut | None = None
    tokens: bool = False

    def read(self, row: Mapping[str, Any], resize: Resize, sample: int) -> NDArray[Any] | BadImage:
        """One row as a grid, uint8 (3, S, S) or int16 (1, S, S), or what is wrong with it.

        Raises:
            ValueError: There are not S * S tokens.
        """
        value = row[self.image_column]
        if self.tokens:
            if len(value) != resize.size**2:
                raise ValueError(f"{self.describe(value, sample)}: {len(value)} tokens, not {resize.size}^2")
            return np.asarray(value, np.int16).reshape(1, resize.size, resize.size)
        try:
            pixels: NDArray[Any] = np.asarray(resize(decode(value), sample)).transpose(2, 0, 1)
            return pixels
        except BadImageError as error:
            return BadImage(self.describe(value, sample), str(error), sample)

    def describe(self, value: Any, sample: int) -> str:
        """A row for messages: by its path, for rows of a stream have no number of their own, or by its draw."""
        path = value.get("path") if isinstance(value, Mapping) else None
        return f"{self.source}, split {self.split!r}, " + (str(path) if path else f"draw {sample}")

    def label(self, row: Mapping[str, Any]) -> int:
        """The class number of a row, as the training split numbers them.

        Raises:
            ValueError: It is missing, hidden (-1), outside the range, or of a class that training does not have.
        """
        assert self.label_column is not None
        label, names = row[self.label_column], self.own_names or self.class_names
        if label is None or not 0 <= label < len(names):
            raise ValueError(
                f"{self.source}, split {self.split!r}: a label is {label}, outside 0..{len(names) - 1}"
                + ("; -1 marks the hidden labels of a benchmark's test split" if label == -1 else "")
            )
        if names[label] not in self.class_names:
            raise ValueError(
                f"{self.source}, split {self.split!r} has the class {names[label]!r}, which the training split does "
                f"not have; it has {', '.join(self.class_names)}"
            )
        return int(label) if names == self.class_names else self.class_names.index(names[label])


def _content(value: Any) -> bytes:
    if isinstance(value, Image.Image):
        return value.tobytes()
    if isinstance(value, Mapping):
        return value.get("bytes") or str(value.get("path")).encode()
    return np.asarray(value).tobytes()
