"""Images for the verbs: a file, a folder, or any source of the data modules."""

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from lightning_igpt.files import shown
from lightning_igpt.images import BILINEAR, SUFFIXES, BadImageError, Filter, decode, resize_center_crop
from lightning_igpt.pictures import to_tensor

if TYPE_CHECKING:
    from lightning_igpt.data.sources import Source

SPLITS = ("test", "validation", "valid", "val", "dev", "train")  # in the order of preference: unseen images first


def read_images(source: str, size: int, resize: Filter = BILINEAR, **options: Any) -> tuple[Tensor, list[str]]:
    """The ``squares`` of ``decoded``."""
    return squares(decoded(source, **options), size, resize)


def squares(named: Iterable[tuple[str, Image.Image]], size: int, resize: Filter) -> tuple[Tensor, list[str]]:
    """Images as uint8 (N, 3, S, S), cut to the square in the middle and resized to ``size``, and their names."""
    pairs = [(to_tensor(resize_center_crop(image, size, resize)), name) for name, image in named]
    return torch.stack([image for image, _ in pairs]), [name for _, name in pairs]


def decoded(
    source: str, *, split: str | None = None, limit: int | None = None, on_bad_image: Literal["error", "skip"] = "error"
) -> Iterator[tuple[str, Image.Image]]:
    """Names and images of a file or the first of a source, whose split is by default the first of ``SPLITS``."""
    path = Path(source).expanduser()
    rows = iter([(path.name, {"path": str(path)})])
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        sources = importlib.import_module("lightning_igpt.data.sources")  # 4 s of imports that a file does without
        if path.is_file() and path.suffix.lower() not in sources.TABLES:
            kinds = " ".join(sorted(SUFFIXES | sources.TABLES.keys()))
            raise ValueError(f"{shown(path)} holds no images: a file ends in one of {kinds}; or name a folder")
        opened, split = open_images(source, split)
        rows = rows_of(opened, split, limit, spread=False)
    n_good, n_bad = 0, 0
    for name, value in rows:
        try:
            yield name, decode(value)
            n_good += 1
        except BadImageError as error:
            if on_bad_image == "error":
                raise ValueError(f"{name}: {error}") from error
            print(shown(f"left out {name}: {error}"))
            n_bad += 1
    if not n_good:
        raise ValueError(f"no image of {source} can be read (tried: {n_bad})" if n_bad else f"{source} has no images")


def open_images(source: str, split: str | None = None, **options: Any) -> tuple["Source", str]:
    """A source of images, and the name of the split to read, by default the first of ``SPLITS``."""
    opened = importlib.import_module("lightning_igpt.data.sources").open_source(source, **options)
    opened.need_images()
    split = split or next((name for name in SPLITS if name in opened.splits), next(iter(opened.splits)))
    if split not in opened.splits:
        raise ValueError(f"{opened.name} has no split {split!r}; it has {', '.join(opened.splits)}")
    return opened, split


def rows_of(
    source: "Source", split: str, limit: int | None = None, *, spread: bool = True, start: int = 0
) -> Iterator[tuple[str, Any]]:
    """Names and undecoded images: ``limit`` of a split, evenly spread (datasets are sorted by class) or the first.

    The first ``start`` of them are left out.
    """
    rows = source.splits[split].select_columns([source.image_column])
    count = min(len(rows), limit or len(rows))
    for place in (number * len(rows) // count if spread else number for number in range(start, count)):
        value = rows[place][source.image_column]
        path = (value or {}).get("path")
        yield "/".join(Path(str(path)).parts[-2:]) if path else f"{split}-{place:05d}", value


def images_of(
    source: "Source", split: str, limit: int | None = None, **options: Any
) -> Iterator[tuple[str, Image.Image]]:
    """Names and images of ``rows_of``; the BadImageError of one that cannot be decoded names it."""
    for name, value in rows_of(source, split, limit, **options):
        try:
            yield name, decode(value)
        except BadImageError as error:
            raise BadImageError(f"{source.name}, {name}: {error}; repair or remove it") from error


def fitted(image: Image.Image, side: int) -> Tensor:
    """The whole image on a gray square, with its middle square framed: uint8 (3, side, side)."""
    method = Image.Resampling.NEAREST if max(image.size) <= side else Image.Resampling.LANCZOS
    padded = ImageOps.pad(image, (side, side), method, color=(224, 224, 224))
    left = round(side * (1 - min(image.size) / max(image.size)) / 2)
    for inset, color in ((0, "white"), (1, "black")) if left else ():  # one of which shows on any picture
        ImageDraw.Draw(padded).rectangle([left + inset, left + inset, *[side - 1 - left - inset] * 2], outline=color)
    return to_tensor(padded)
