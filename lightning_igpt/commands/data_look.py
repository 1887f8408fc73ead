"""The looking behind ``lightning-igpt data show``: rows of each split, what their files are like, a contact sheet.

Not here: arguments and recipes (``data.py``), the text of the report (``data_report.py``).
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from math import sqrt
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_igpt.data.datamodule import ImageDataModule
from lightning_igpt.data.readers import MAX_STAND_INS, BadImage
from lightning_igpt.data.sources import Source
from lightning_igpt.data.splits import Part
from lightning_igpt.data.streams import HoldOut
from lightning_igpt.data.transforms import Augment, Resize
from lightning_igpt.images import FORMATS, BadImageError, decode, resize_center_crop
from lightning_igpt.palette import Palette
from lightning_igpt.pictures import CELL, heading, image_grid, stack
from lightning_igpt.progress import track

_MAT = (224, 224, 224)  # around originals that are not square


class Row(NamedTuple):
    """One row of a split."""

    place: str  # source, split, row and, where there is one, path
    name: str  # the same in short
    value: Any  # an undecoded image, or tokens
    label: str | None


@dataclass
class Seen:
    """What was found in some rows.

    Args:
        n_rows: Rows looked at.
        bad: Those that cannot be used.
        modes: How many files have which Pillow mode.
        sizes: How many images have which (width, height), upright.
        squares: Mean squared error of the palette, in 0..255 squared, of each resized image.
    """

    n_rows: int = 0
    bad: list[BadImage] = field(default_factory=list)
    modes: Counter[str] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    squares: list[float] = field(default_factory=list)

    @property
    def rmse(self) -> float:
        """Root mean square error per channel of the palette, in 0..255."""
        return sqrt(sum(self.squares) / len(self.squares))

    def __add__(self, other: Seen) -> Seen:
        return Seen(
            self.n_rows + other.n_rows,
            self.bad + other.bad,
            self.modes + other.modes,
            self.sizes + other.sizes,
            self.squares + other.squares,
        )


@dataclass(frozen=True)
class Images:
    """How rows of image files are looked at.

    Args:
        palette: Quantises them.
        resize: Makes training images square.
        augment: Changes them then.
    """

    palette: Palette
    resize: Resize
    augment: Augment | None
    headings: ClassVar[tuple[str, ...]] = ("original", "resized", "quantised", "in training")

    @property
    def size(self) -> int:
        """Side S of the square images."""
        return self.resize.size

    def open(self, row: Row) -> Image.Image | BadImage:
        """Decode a row."""
        try:
            return decode(row.value)
        except BadImageError as error:
            return BadImage(row.place, str(error))

    def note(self, seen: Seen, row: Row, image: Image.Image) -> None:
        """Add an image to what was found."""
        seen.modes[file_mode(row.value)] += 1
        seen.sizes[image.size] += 1
        pixels = _tensor(resize_center_crop(image, self.size))
        seen.squares.append(self.palette.rmse(pixels[None]) ** 2)

    def describe(self, row: Row, image: Image.Image) -> str:
        """Size and mode."""
        return f"{image.width} x {image.height}, {file_mode(row.value)}"

    def cells(self, image: Image.Image, draw: int) -> Tensor:
        """The columns of the contact sheet, uint8 (4, 3, h, w)."""
        plain = _tensor(resize_center_crop(image, self.size))
        trained: NDArray[np.uint8] = _tensor(self.resize(image, draw)).numpy()
        if self.augment is not None:
            trained = self.augment(trained[None], [draw])[0]
        squares = torch.stack([plain, torch.from_numpy(np.ascontiguousarray(trained))])
        quantised = self.palette.dequantize(self.palette.quantize(squares))
        enlarged = _enlarged(torch.stack([plain, *quantised]))
        return torch.cat([letterbox(image, enlarged.shape[-1])[None], enlarged])


@dataclass(frozen=True)
class Tokens:
    """How rows of tokens are looked at.

    Args:
        sha256: Of their palette.
        palette: Their palette itself; None where nobody knows it.
        size: Side S of the images.
        augment: Changes them in training.
    """

    sha256: str
    palette: Palette | None
    size: int
    augment: Augment | None
    headings: ClassVar[tuple[str, ...]] = ("tokens", "in training")

    def open(self, row: Row) -> NDArray[np.int16] | BadImage:
        """The tokens of a row, (1, S, S)."""
        tokens = np.asarray(row.value or [])
        if len(tokens) != self.size**2:
            return BadImage(row.place, f"{len(tokens)} tokens, not {self.size}^2")
        if self.palette is not None and (tokens.min() < 0 or tokens.max() >= len(self.palette)):
            found = f"tokens from {tokens.min()} to {tokens.max()}"
            return BadImage(row.place, f"{found}, but {len(self.palette)} colours have ids 0..{len(self.palette) - 1}")
        return tokens.astype(np.int16).reshape(1, self.size, self.size)

    def note(self, seen: Seen, row: Row, tokens: NDArray[np.int16]) -> None:
        """Add tokens to what was found."""
        seen.sizes[self.size, self.size] += 1

    def describe(self, row: Row, tokens: NDArray[np.int16]) -> str:
        """Number of colours."""
        return f"{len(np.unique(tokens))} colours"

    def cells(self, tokens: NDArray[np.int16], draw: int) -> Tensor:
        """The columns of the contact sheet, uint8 (2, 3, h, w)."""
        assert self.palette is not None
        trained: NDArray[Any] = tokens
        if self.augment is not None:
            trained = self.augment(trained[None], [draw])[0]
        both = torch.from_numpy(np.stack([tokens, trained]))
        return _enlarged(self.palette.dequantize(both.flatten(1)))


Kind: TypeAlias = Images | Tokens


def kind_of(data: ImageDataModule, palette: Palette) -> Kind:
    """How rows of a data module are looked at, as training will see them.

    Args:
        data: With an image size.
        palette: That of the network.
    """
    mark = data.opened.tokens
    resize, augment = data.training_resize(), data.augmentation()
    if mark is None:
        return Images(palette, resize, augment)
    return Tokens(mark.sha256, palette if palette.sha256 == mark.sha256 else None, resize.size, augment)


def look(rows: Iterable[Row], kind: Kind) -> Seen:
    """Open every row, and note what it is like."""
    seen = Seen()
    for row in track(rows, "looking at images"):
        seen.n_rows += 1
        opened: Any = kind.open(row)
        if isinstance(opened, BadImage):
            seen.bad.append(opened)
        else:
            kind.note(seen, row, opened)
    return seen


def rows_by_split(data: ImageDataModule, limit: int) -> dict[str, Iterator[Row]]:
    """Rows of every split that a run reads: evenly spread, of streams the first.

    Args:
        data: After ``setup``.
        limit: Rows per split; 0 means all.
    """
    division = data.division
    assert division is not None
    if data.opened.streaming:
        splits = [split for split in (division.train, division.val, division.test) if split is not None]
        return {split: stream_rows(division.source, split, limit) for split in dict.fromkeys(splits)}
    found: dict[str, Iterator[Row]] = {}
    for part in data.parts.values():
        if part.split not in found:  # a hold-out is in the split of the training part, which comes first
            whole = Part(part.source, part.split, part.dataset)
            found[part.split] = stored_rows(whole, data.opened, spread(len(whole), limit))
    return found


def contact_sheet(data: ImageDataModule, kind: Kind, n_images: int) -> tuple[Tensor, int]:
    """Training images beside what becomes of them, a row for each, with its name below.

    Args:
        data: After ``setup``.
        kind: How they are looked at.
        n_images: Rows of the sheet.

    Returns:
        uint8 (3, H, W), and the number of images on it; those that cannot be used are passed over.
    """
    parts: list[Tensor] = []
    for number, (row, opened) in enumerate(_usable(data, kind, n_images)):
        captions = kind.headings if number == 0 else None
        parts.append(image_grid(kind.cells(opened, number)[None], scale=1, gap=4, captions=captions))
        words = [row.name, *([f"class {row.label}"] if row.label is not None else []), kind.describe(row, opened)]
        parts.append(heading(", ".join(words)))
    return (stack(parts) if parts else heading("no image could be read")), len(parts) // 2


def spread(n_rows: int, limit: int) -> list[int]:
    """Up to ``limit`` places in 0..n_rows-1, evenly spread, because many data sets are sorted by class; all with 0."""
    count = min(n_rows, limit or n_rows)
    return [number * n_rows // count for number in range(count)]


def stored_rows(part: Part, source: Source, places: Iterable[int]) -> Iterator[Row]:
    """Rows of a part that lies here."""
    features = part.dataset.features
    table = part.dataset.select_columns([name for name in _columns(source) if name in features])
    for place in places:
        (row,) = part.rows_of([place])
        yield _row(part.describe(row), part.split, row, table[row], source, features)


def stream_rows(source: Source, split: str, limit: int) -> Iterator[Row]:
    """The first rows of a stream; all with 0."""
    stream, features = source.splits[split], source.splits[split].features or {}
    if features:
        stream = stream.select_columns([name for name in _columns(source) if name in features])
    for number, values in enumerate(islice(stream, limit or None)):
        yield _row(f"{source.name}, split {split!r}, row {number}", split, number, values, source, features)


def file_mode(value: Any) -> str:
    """The Pillow mode of an image that was not decoded; it can be."""
    if isinstance(value, Image.Image):
        return value.mode
    with Image.open(io.BytesIO(value["bytes"]) if value.get("bytes") else value["path"], formats=FORMATS) as image:
        return str(image.mode)


def letterbox(image: Image.Image, side: int) -> Tensor:
    """The whole image in the middle of a square, shrunk, or enlarged by a whole number: uint8 (3, side, side)."""
    longest = max(image.size)
    width, height = (
        pixels * (side // longest) if longest <= side else max(1, round(pixels * side / longest))
        for pixels in image.size
    )
    method = Image.Resampling.NEAREST if longest <= side else Image.Resampling.LANCZOS
    square = Image.new("RGB", (side, side), _MAT)
    square.paste(image.resize((width, height), method), ((side - width) // 2, (side - height) // 2))
    return _tensor(square)


def _usable(data: ImageDataModule, kind: Kind, n_images: int) -> Iterator[tuple[Row, Any]]:
    """Training rows that can be used, and what they hold: evenly spread, of streams the first."""
    division, fraction = data.division, data.val_fraction
    assert division is not None
    if data.opened.streaming:
        rows = stream_rows(division.source, division.train, limit=0)
        if division.val is None and fraction > 0:
            kept = HoldOut("image", fraction, held_out=False)
            rows = filter(lambda row: kept({"image": row.value}), rows)
    else:
        part = data.parts["train"]
        places = spread(len(part), n_images)
        others = (place for place in range(len(part)) if place not in places)  # in the place of bad ones
        rows = stored_rows(part, data.opened, chain(places, others))
    opened = ((row, kind.open(row)) for row in islice(rows, MAX_STAND_INS + n_images))
    return islice((pair for pair in opened if not isinstance(pair[1], BadImage)), n_images)


def _row(place: str, split: str, number: int, values: Mapping[str, Any], source: Source, features: Any) -> Row:
    value, label = values[source.image_column], values.get(source.label_column or "")
    path = value.get("path") if isinstance(value, Mapping) else None
    names = getattr(features.get(source.label_column), "names", None)
    if names is not None and label is not None:
        label = names[label] if 0 <= label < len(names) else None
    name = "/".join(Path(path).parts[-2:]) if path else f"{split}, row {number}"
    return Row(place + (f" ({path})" if path else ""), name, value, None if label is None else str(label))


def _columns(source: Source) -> list[str]:
    return [name for name in (source.image_column, source.label_column) if name is not None]


def _enlarged(squares: Tensor) -> Tensor:
    """Every pixel a square, so that images become about ``CELL`` pixels high."""
    factor = max(1, CELL // squares.shape[-1])
    return squares.repeat_interleave(factor, dim=-1).repeat_interleave(factor, dim=-2)


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, H, W)
