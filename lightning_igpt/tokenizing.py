"""Images to palette ids as a function over batches of ``datasets``, and the shapes in which ids come back.

Not here: the colours (``palette.py``), whole data sets (``data/tokenize.py``). ``datasets`` is not imported: what it
hands to a function are plain values.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_igpt.images import BadImageError, decode, resize_center_crop

PALETTE_COLUMN = "palette"
_PIXELS = 1 << 22  # quantised at a time, which bounds the memory of large batches

TokenRows: TypeAlias = Tensor | NDArray[Any] | Sequence[Any]


class Quantizer(Protocol):
    """What a palette is here."""

    @property
    def sha256(self) -> str:
        """Identifies the colours."""
        ...

    def quantize(self, images: Tensor) -> Tensor:
        """Map uint8 (B,3,H,W) to int64 (B,H*W)."""
        ...


@dataclass(frozen=True)
class PaletteTransform:
    """Turns batches of images into palette ids, for ``with_transform``, ``set_transform`` and ``map(batched=True)``.

    Equal transforms have equal pickles, so the cache of ``map`` recognises them, in other processes too.

    Args:
        palette: Quantises the pixels.
        image_column: Column of images. Each is a PIL image, ``{"bytes", "path"}`` as ``Image(decode=False)`` gives it,
            the bytes of an image file, a path, or a uint8 array (H,W) or (H,W,3).
        size: Side of the pictures in pixels; larger and oblong images are cut to their middle square and resized.
        tokens_column: Column of ids that is made.

    Raises:
        ValueError: ``size`` is below 1.
    """

    palette: Quantizer
    image_column: str = "image"
    size: int = 32
    tokens_column: str = "tokens"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; a picture has a side of at least 1 pixel")

    def __call__(self, batch: Mapping[str, Any], rows: Sequence[int] | None = None) -> dict[str, Any]:
        """Tokenise one batch.

        A ``dict``, as ``with_transform`` and streams give it, is changed in place and returned: the new columns take
        the place of the images, the others stay, and ``remove_columns`` of a stream applies to them. Of any other
        mapping, as ``Dataset.map`` gives it, only the new columns are returned, which ``map`` adds to those it has;
        the images go by ``remove_columns=["image"]``.

        Args:
            batch: Lists of equal length by column.
            rows: Numbers of the rows for messages, as ``map(with_indices=True)`` gives them.

        Returns:
            ``tokens`` uint16 array (B, size * size) in raster order; ``palette``, for each row the SHA-256 of the
            colours; perhaps other columns, as above.

        Raises:
            BadImageError: An image cannot be used; the message names its place and path.
            TypeError: Not a batch, or an image is of no known type.
            ValueError: There is no such column of images, or the batch is tokenised already.
        """
        images = self._images(batch)
        pixels = np.empty((len(images), self.size, self.size, 3), dtype=np.uint8)
        for place, value in enumerate(images):
            where = f"image {place} of the batch" if rows is None else f"the image in row {rows[place]}"
            pixels[place] = np.asarray(resize_center_crop(_decode(value, where), self.size))
        tokens = self._quantize(pixels)
        columns = {self.tokens_column: tokens, PALETTE_COLUMN: [self.palette.sha256] * len(tokens)}
        if not isinstance(batch, dict):
            return columns
        del batch[self.image_column]
        batch.update(columns)
        return batch

    def _images(self, batch: Mapping[str, Any]) -> Sequence[Any]:
        if not isinstance(batch, Mapping):
            raise TypeError(f"a batch is a mapping of columns, not a {type(batch).__name__}; leave out input_columns")
        names = ", ".join(repr(name) for name in batch)
        if self.tokens_column in batch:
            raise ValueError(
                f"the batch is tokenised already: it has the columns {names}. Leave this transform out, or remove "
                f"{self.tokens_column!r} and {PALETTE_COLUMN!r} first"
            )
        if PALETTE_COLUMN in batch:
            raise ValueError(f"the batch has a column {PALETTE_COLUMN!r} of its own, where the hash goes; rename it")
        if self.image_column not in batch:
            raise ValueError(f"there is no image column {self.image_column!r}; the batch has the columns {names}")
        # A lazy batch of datasets remembers that a column was decoded, and map would then encode the images anew.
        images = copy.copy(batch)[self.image_column]
        if images is None or isinstance(images, Image.Image | Mapping | bytes | str):
            raise TypeError(f"column {self.image_column!r} holds one image, not a batch; use map(..., batched=True)")
        return images  # type: ignore[no-any-return]

    def _quantize(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint16]:
        """uint8 (B, S, S, 3) to ids (B, S * S)."""
        tokens = np.empty((len(pixels), self.size**2), dtype=np.uint16)
        step = max(1, _PIXELS // self.size**2)
        with _one_thread():
            for first in range(0, len(pixels), step):
                part = torch.from_numpy(pixels[first : first + step]).permute(0, 3, 1, 2)  # (b, 3, S, S)
                tokens[first : first + step] = self.palette.quantize(part).numpy()
        return tokens


def token_rows(tokens: TokenRows) -> Tensor:
    """Ids as ``datasets`` may give them, as one tensor.

    Args:
        tokens: (B,T) or a single row (T,): a tensor, an array, or lists of numbers or rows.

    Returns:
        (B,T) of the type it had.

    Raises:
        ValueError: The rows differ in length.
    """
    if not isinstance(tokens, Tensor):
        try:
            array = np.array(tokens)  # a copy: arrays of datasets are read-only
        except ValueError as error:
            raise ValueError(f"rows of tokens must all have the same length: {error}") from error
        tokens = torch.from_numpy(array if array.size else array.astype(np.int64))
    if tokens.ndim == 1:
        return tokens[None] if len(tokens) else tokens.view(0, 0)
    return tokens


def side_of(tokens: object, size: int | None = None) -> int:
    """The side in pixels of the pictures that (B,T) ids fill.

    Raises:
        TypeError: The tokens are no integer tensor.
        ValueError: They are not of shape (B,T), or T is not the square of ``size``, or of any number without it.
    """
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise TypeError(f"tokens must be an integer tensor, not {kind_of(tokens)}")
    if tokens.ndim != 2:
        raise ValueError(f"tokens must have shape (B, T), not {tuple(tokens.shape)}")
    size = isqrt(tokens.shape[1]) if size is None else size
    if size * size != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens do not fill a square picture of {size} x {size} pixels")
    return size


def kind_of(value: object) -> str:
    """The type of a value, for messages."""
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _decode(value: Any, where: str) -> Image.Image:
    path = value if isinstance(value, str | Path) else value.get("path") if isinstance(value, Mapping) else None
    where = f"{where} ({path})" if path else where
    try:
        return decode(_readable(value))
    except BadImageError as error:
        raise BadImageError(f"{where}: {error}") from error
    except TypeError as error:
        raise TypeError(f"{where} is {error}") from error


def _readable(value: Any) -> Mapping[str, Any] | Image.Image | None:
    """The value in one of the forms that ``decode`` takes."""
    if value is None or isinstance(value, Mapping | Image.Image):
        return value
    if isinstance(value, bytes):
        return {"bytes": value}
    if isinstance(value, str | Path):
        return {"path": str(value)}
    if not isinstance(value, np.ndarray):
        raise TypeError(
            f"{kind_of(value)}; images are PIL images, {{bytes, path}}, bytes, paths or uint8 arrays, as a data set "
            "with_format(None) gives them"
        )
    if value.dtype != np.uint8 or not (value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3)):
        raise TypeError(f"an array {value.dtype} {value.shape}; arrays must be uint8 (H, W) or (H, W, 3)")
    return Image.fromarray(value)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep torch to this thread.

    ``map(num_proc=...)`` forks, and OpenMP's pool of threads does not survive that: a parallel loop in the new process
    waits for ever for threads that only the old one has.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
