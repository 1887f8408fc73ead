"""Images for the verbs: a file, a folder, or any source of the data modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_igpt.data.sources import Source, open_source
from lightning_igpt.images import SUFFIXES, BadImageError, decode, resize_center_crop

SPLITS = ("test", "validation", "valid", "val", "dev", "train")  # in the order of preference: unseen images first


class Images(NamedTuple):
    """Images of one size, uint8 (N, 3, S, S), with a name each."""

    pixels: Tensor
    names: list[str]


def read_images(
    source: str,
    size: int,
    *,
    split: str | None = None,
    limit: int | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
) -> Images:
    """The first images of a source, cut to the square in the middle and resized.

    Args:
        source: An image file, or a source of the data modules: a folder, Parquet, a hub id, "digits".
        size: Side S of the result.
        split: Which split; default the first of test, validation and train that is there.
        limit: How many at most.
        on_bad_image: error, or skip, which prints the images that cannot be read and leaves them out.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"asked for {limit} images; ask for at least 1")
    rows, names = _rows(source, split, limit)
    images, kept = [], []
    for row, name in zip(rows, names, strict=True):
        try:
            images.append(to_tensor(resize_center_crop(decode(row), size)))
        except BadImageError as error:
            if on_bad_image == "error":
                raise ValueError(f"{name}: {error}") from error
            print(f"left out {name}: {error}")
        else:
            kept.append(name)
    if not images:
        raise ValueError(f"none of the {len(names)} images of {source} can be read")
    return Images(torch.stack(images), kept)


def rows_of(source: Source, split: str, limit: int | None = None) -> Iterator[tuple[str, Any]]:
    """``limit`` of a split's (name, undecoded image), evenly spread, as many data sets are sorted by class; or all."""
    rows = source.splits[split].select_columns([source.image_column])
    count = min(len(rows), limit or len(rows))
    for place in (number * len(rows) // count for number in range(count)):
        value = rows[place][source.image_column]
        yield name_of(value or {}, split, place), value


def images_of(source: Source, split: str, limit: int | None = None) -> Iterator[Image.Image]:
    """The images of ``rows_of``; the BadImageError of one that cannot be decoded names it."""
    for name, value in rows_of(source, split, limit):
        try:
            yield decode(value)
        except BadImageError as error:
            raise BadImageError(f"{source.name}, {name}: {error}") from error


def to_tensor(image: Image.Image) -> Tensor:
    """uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def check_split(source: Source, split: str) -> None:
    """Raise unless the source has the split."""
    if split not in source.splits:
        raise ValueError(f"{source.name} has no split {split!r}; it has {', '.join(source.splits)}")


def name_of(row: Mapping[str, Any], split: str, number: int) -> str:
    """The end of an image's path, or its split and number."""
    return "/".join(Path(str(row["path"])).parts[-2:]) if row.get("path") else f"{split}-{number:05d}"


def _rows(source: str, split: str | None, limit: int | None) -> tuple[list[Any], list[str]]:
    """Undecoded images, and their names."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        return [{"bytes": path.read_bytes(), "path": str(path)}], [path.name]
    opened = open_source(source)
    opened.need_images()
    split = split or next((name for name in SPLITS if name in opened.splits), next(iter(opened.splits)))
    check_split(opened, split)
    dataset = opened.splits[split]
    rows = dataset[: limit or len(dataset)][opened.image_column]
    if not rows:
        raise ValueError(f"{source} holds no images")
    return rows, [name_of(row, split, number) for number, row in enumerate(rows)]
