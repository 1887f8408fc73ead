"""Rows of a stream that belong together, and what one row holds."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import datasets
import numpy as np
from datasets.utils.file_utils import xopen
from numpy.typing import NDArray
from PIL import Image

from lightning_igpt.data.bad_images import BadImage
from lightning_igpt.data.transforms import Resize
from lightning_igpt.images import BadImageError, decode
from lightning_igpt.palette import PALETTE_COLUMN

_HASH_RANGE = 2**32
_BLOCK = 100  # rows that are read together where they are not shuffled


@dataclass(frozen=True)
class HoldOut:
    """Divides rows by a hash of their content, so that it depends on no order and place, and copies stay together.

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
class Kept:
    """Whether a row belongs to a part, for ``stream.filter``."""

    image_column: str
    hold_out: HoldOut

    def __call__(self, row: Mapping[str, Any]) -> bool:
        """Look at one row."""
        value = _as_mapping(row[self.image_column])
        with suppress(BadImageError):  # it will be told of when it is read
            value = fetch(value)
        return self.hold_out.keeps(value)


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
        own_names: The classes as this split numbers them; None: as the training split does.
        need_labels: Whether a label that is missing or no class is an error; else it is -1.
        hold_out: Which rows belong to the part; None means all.
        tokens: Whether the column holds tokens.
        sha256: The palette of the tokens, which every row that names one must name.
    """

    source: str
    split: str
    stream: datasets.IterableDataset
    image_column: str
    label_column: str | None = None
    class_names: Sequence[str] = ()
    own_names: Sequence[str] | None = None
    need_labels: bool = True
    hold_out: HoldOut | None = None
    tokens: bool = False
    sha256: str | None = None

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of the part once, in the stream's own order."""
        for block in self.stream.iter(_BLOCK):
            for place in range(len(block[self.image_column])):
                row = self.row(block, place)
                if row is not None:
                    yield row

    def row(self, block: Mapping[str, Any], place: int) -> dict[str, Any] | None:
        """One row of several that were read together, or None where it belongs to another part."""
        row = {name: values[place] for name, values in block.items()}
        if not self.tokens:
            row[self.image_column] = _as_mapping(row[self.image_column])
        if self.hold_out is None:
            return row
        with suppress(BadImageError):  # it will be told of when it is read
            row[self.image_column] = fetch(row[self.image_column])
        return row if self.hold_out.keeps(row[self.image_column]) else None

    def read(self, row: Mapping[str, Any], resize: Resize, sample: int) -> NDArray[Any] | BadImage:
        """One row as a grid, uint8 (3, S, S) or int16 (1, S, S), or what is wrong with it.

        Raises:
            ValueError: There are not S * S tokens.
        """
        value = row[self.image_column]
        if self.tokens:
            self._check_mark(row.get(PALETTE_COLUMN))
            if len(value) != resize.size**2:
                raise ValueError(f"{self.describe(value, sample)}: {len(value)} tokens, not {resize.size}^2")
            return np.asarray(value, np.int16).reshape(1, resize.size, resize.size)
        try:
            pixels: NDArray[Any] = np.asarray(resize(decode(fetch(value)), sample)).transpose(2, 0, 1)
            return pixels
        except BadImageError as error:
            return BadImage(self.describe(value, sample), str(error))

    def _check_mark(self, mark: Any) -> None:
        feature = (self.stream.features or {}).get(PALETTE_COLUMN)
        if isinstance(mark, int) and isinstance(feature, datasets.ClassLabel):
            mark = feature.names[mark]
        if isinstance(mark, str) and mark != self.sha256:
            raise ValueError(
                f"{self.source}, split {self.split!r}, holds tokens of several palettes: {str(self.sha256)[:12]} and "
                f"{mark[:12]}; make all anew with one"
            )

    def describe(self, value: Any, sample: int) -> str:
        """A row for messages: by its path or content, for rows of a stream have no number; else by its draw."""
        path = value.get("path") if isinstance(value, Mapping) else None
        content = _content(value)
        # Paths within archives may be alike, and the same image must be known again in another pass.
        names = [str(path)] if path else []
        names += [f"CRC-32 {zlib.crc32(content):08x}"] if isinstance(value, Mapping) and value.get("bytes") else []
        if not names:
            names = [f"CRC-32 {zlib.crc32(content):08x}" if content else f"draw {sample}"]
        return f"{self.source}, split {self.split!r}, {', '.join(names)}"

    def label(self, row: Mapping[str, Any]) -> int:
        """The class number of a row among the training split's classes; -1 where there is none and none is needed.

        Raises:
            ValueError: It is missing, hidden (-1), outside the range or of a class that training does not have.
        """
        assert self.label_column is not None
        label, names = row[self.label_column], self.class_names if self.own_names is None else self.own_names
        known = isinstance(label, int | np.integer) and 0 <= label < len(names)
        if known and names[label] in self._numbers:
            return self._numbers[names[label]]
        if not self.need_labels:
            return -1
        where = f"{self.source}, split {self.split!r}"
        if known:
            raise ValueError(f"{where} has the class {names[label]!r}, which the training split does not have")
        raise ValueError(
            f"{where}: a label is {label!r}, outside 0..{len(names) - 1}"
            + ("; -1 marks the hidden labels of a benchmark's test split" if label == -1 else "")
        )

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.class_names)}


def has_own_buffer(stream: datasets.IterableDataset) -> bool:
    """Whether it was shuffled with ``stream.shuffle``, whose buffer no state of the stream holds."""
    waiting = [getattr(stream, "_ex_iterable", None)]
    while waiting:
        stage = waiting.pop()
        if type(stage).__name__ == "BufferShuffledExamplesIterable":
            return True
        inner = [getattr(stage, "ex_iterable", None), *(getattr(stage, "ex_iterables", None) or [])]
        waiting += [one for one in inner if one is not None]
    return False


def _as_mapping(value: Any) -> Any:
    """Files and paths, as streams without types may give them, like images of a column that has the type."""
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    return {"bytes": None, "path": value} if isinstance(value, str) else value


def fetch(value: Any) -> Any:
    """An image that is but named, by a path or a URL, with the bytes of its file; others as they are.

    Raises:
        BadImageError: The file cannot be read.
    """
    if not isinstance(value, Mapping) or value.get("bytes") is not None or not value.get("path"):
        return value
    path = str(value["path"])
    try:
        with (xopen if "://" in path else open)(path, "rb") as file:
            return {"bytes": file.read(), "path": path}
    except Exception as error:  # of the many file systems each has its own
        absent = isinstance(error, FileNotFoundError)
        raise BadImageError("there is no such file" if absent else f"the file cannot be read: {error}") from error


def _content(value: Any) -> bytes:
    if isinstance(value, Image.Image):
        return value.tobytes()
    if isinstance(value, Mapping):
        return value.get("bytes") or str(value.get("path") or "").encode()
    return b"" if value is None else np.asarray(value).tobytes()
