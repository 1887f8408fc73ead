"""Images for the verbs that take some: a file, a folder, or any source of the data modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_igpt.data.readers import OnBadImage
from lightning_igpt.data.sources import open_source
from lightning_igpt.images import SUFFIXES, BadImageError, decode, resize_center_crop
from lightning_igpt.progress import track

SPLITS = ("test", "validation", "valid", "val", "dev", "train")  # tried in this order: unseen images first


class Images(NamedTuple):
    """Images of one size with a name each."""

    pixels: Tensor  # uint8 (N, 3, S, S)
    names: list[str]


def read_images(
    source: str,
    size: int,
    *,
    split: str | None = None,
    limit: int | None = None,
    on_bad_image: OnBadImage = "error",
) -> Images:
    """The first images of a source, resized so that the shorter side fits and cut from the centre.

    Args:
        source: An image file, or what the data modules take: a folder, Parquet, a hub id, "digits".
        size: Side S of the result.
        split: Which split; default the first of test, validation and train that is there.
        limit: How many at most.
        on_bad_image: error, or skip, which prints the images that cannot be read and leaves them out.

    Raises:
        FileNotFoundError: There is no such path.
        ValueError: There are no images, the split does not exist, or an image cannot be decoded.
    """
    originals = read_originals(source, split=split, limit=limit, on_bad_image=on_bad_image)
    resized = [(np.array(resize_center_crop(image, size)), name) for image, name in originals]
    pixels = torch.from_numpy(np.stack([image for image, _ in resized])).permute(0, 3, 1, 2)
    return Images(pixels.contiguous(), [name for _, name in resized])


def read_originals(
    source: str, *, split: str | None = None, limit: int | None = None, on_bad_image: OnBadImage = "error"
) -> Iterator[tuple[Image.Image, str]]:
    """The first images of a source as they are, upright and in RGB, each with its name; arguments as ``read_images``.

    Raises:
        FileNotFoundError, ValueError: As ``read_images``.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"asked for {limit} images; it takes 1 at least")
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() in SUFFIXES:
        rows, names = [{"bytes": path.read_bytes(), "path": str(path)}], [path.name]
    else:
        opened = open_source(source)
        opened.need_images()
        found = split or next((name for name in SPLITS if name in opened.splits), next(iter(opened.splits)))
        if found not in opened.splits:
            raise ValueError(f"{opened.name} has no split {found!r}; it has {', '.join(opened.splits)}")
        dataset = opened.splits[found]
        rows = dataset[: limit or len(dataset)][opened.image_column]
        names = [_name(row, found, number) for number, row in enumerate(rows)]
    if not rows:
        raise ValueError(f"{source} holds no images")
    n_read = 0
    for row, name in track(zip(rows, names, strict=True), "reading images", len(rows)):
        try:
            image = decode(row)
        except BadImageError as error:
            if on_bad_image == "error":
                raise ValueError(f"{name}: {error}") from error
            print(f"left out {name}: {error}")
            continue
        n_read += 1
        yield image, name
    if not n_read:
        raise ValueError(f"none of the {len(rows)} images of {source} can be read")


def _name(row: Mapping[str, Any], split: str, number: int) -> str:
    return "/".join(Path(str(row["path"])).parts[-2:]) if row.get("path") else f"{split}-{number:05d}"
