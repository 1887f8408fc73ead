"""Data sets of palette ids: made once from images, stored anywhere ``datasets`` stores things, self-describing.

The column ``tokens`` holds a picture's ids; the column ``palette`` names the colours, by their SHA-256.

Not here: the function over one batch (``palette.py``).
"""

from __future__ import annotations

import re
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

import datasets
import torch

from lightning_igpt.data.columns import find_image_column
from lightning_igpt.palette import PALETTE_COLUMN, Colors, Palette

TOKENS_COLUMN = "tokens"

DataSet: TypeAlias = datasets.Dataset | datasets.IterableDataset
DataSets = TypeVar(
    "DataSets", datasets.Dataset, datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict
)


class TokenMark(NamedTuple):
    """What the ids of a data set mean."""

    sha256: str  # of the palette
    image_size: int  # side of the pictures in pixels


def tokenize(
    dataset: DataSets,
    palette: Palette | str | Path | Colors = "openai",
    *,
    size: int = 32,
    image_column: str | None = None,
    num_proc: int | None = None,
    batch_size: int = 1000,
) -> DataSets:
    """Replace the images of a data set by palette ids.

    The middle square of each image is resized and quantised. Every other column stays. ``datasets`` keeps the result in
    its cache, where a second call finds it; ``save_to_disk``, ``to_parquet`` and ``push_to_hub`` keep it for good.

    Args:
        dataset: Images: a Dataset, or a DatasetDict, of which every split is tokenised. A stream becomes a stream.
        palette: Whatever ``Palette.load`` takes.
        size: Side of the pictures in pixels.
        image_column: Column of images; needed where not exactly one column has the type Image.
        num_proc: Processes that work at the same time; a stream takes none.
        batch_size: Images that a process reads at a time.

    Returns:
        A data set of the same kind. In place of the images it has ``tokens``, size * size integers of 16 bits in raster
        order, and ``palette``, a ClassLabel whose one name is the SHA-256 of the colours; rows of a stream hold the
        name itself.

    Raises:
        BadImageError: An image cannot be used; the message names its row and path.
        TypeError: Not a data set.
        ValueError: There is no column of images, the data are tokenised already, or an option is out of range.
    """
    palette = Palette.load(palette)
    # Before datasets starts its processes, each of which would otherwise build the table of colours for itself.
    palette.quantize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
    options: dict[str, Any] = {"image_column": image_column, "num_proc": num_proc, "batch_size": batch_size}
    if not isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        return _tokenize(dataset, palette, size, where="the data set", **options)
    return type(dataset)(
        {
            split: _tokenize(part, palette, size, where=f"the split {split!r}", **options)
            for split, part in dataset.items()
        }
    )


def is_tokenised(features: datasets.Features) -> bool:
    """Whether there is a column ``tokens`` of lists of integers."""
    number = getattr(features.get(TOKENS_COLUMN), "feature", None)
    return isinstance(number, datasets.Value) and "int" in number.dtype


def marked_palette(data: datasets.Features | DataSet) -> TokenMark:
    """Read which palette and picture size the ids of a data set belong to.

    Args:
        data: A data set, or its features where these say it all, as those of ``tokenize`` do.

    Raises:
        ValueError: There are no ids, nothing tells their palette, they belong to several, or they fill no square.
    """
    features = data if isinstance(data, datasets.Features) else data.features
    rows = data if isinstance(data, datasets.Dataset) else None
    if not is_tokenised(features):
        raise ValueError(f"there is no column {TOKENS_COLUMN!r} of integers; the columns are {', '.join(features)}")
    return TokenMark(_sha256(features, rows), _image_size(features, rows))


def _tokenize(
    dataset: DataSet,
    palette: Palette,
    size: int,
    *,
    where: str,
    image_column: str | None,
    num_proc: int | None,
    batch_size: int,
) -> DataSet:
    column = _image_column(dataset, image_column, num_proc, where=where)
    transform = palette.transform(column, size)
    dataset = dataset.with_format(None).cast_column(column, datasets.Image(decode=False))
    features = _features(dataset.features, column, palette, size)
    if isinstance(dataset, datasets.Dataset) and not len(dataset):  # map would leave such a split as it is
        return datasets.Dataset.from_dict({name: [] for name in features}, features=features, split=dataset.split)
    options = {"batch_size": batch_size, "with_indices": True, "remove_columns": [column], "features": features}
    if num_proc is not None:
        options["num_proc"] = num_proc
    result = dataset.map(transform, batched=True, **options)
    result.info.description = (
        f"Pictures of {size} x {size} pixels as ids 0..{len(palette) - 1} of an Image GPT palette of {len(palette)} "
        f"colours, in raster order. SHA-256 of the palette: {palette.sha256}"
    )
    return result


def _image_column(dataset: DataSet, wanted: str | None, num_proc: int | None, *, where: str) -> str:
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        raise TypeError(
            f"tokenize takes a Dataset or a DatasetDict, not a {type(dataset).__name__}; datasets.load_dataset opens "
            "files, folders and data sets of the hub"
        )
    features = dataset.features
    if features is None:
        raise ValueError(f"{where} is a stream of unknown columns; name them by stream.cast(features)")
    if num_proc is not None and isinstance(dataset, datasets.IterableDataset):
        raise ValueError(f"num_proc is {num_proc}, but {where} is a stream; the workers of its DataLoader share it")
    if is_tokenised(features):
        raise ValueError(f"{where} is tokenised already: its columns are {', '.join(features)}")
    if taken := [name for name in (TOKENS_COLUMN, PALETTE_COLUMN) if name in features]:
        raise ValueError(f"{where} has a column {taken[0]!r} of its own, which would be lost; rename it")
    return find_image_column(features, wanted, where=where)


def _features(features: datasets.Features, column: str, palette: Palette, size: int) -> datasets.Features:
    return datasets.Features(
        {
            **{name: feature for name, feature in features.items() if name != column},
            TOKENS_COLUMN: datasets.List(datasets.Value("uint16"), length=size * size),
            PALETTE_COLUMN: datasets.ClassLabel(names=[palette.sha256]),
        }
    )


def _sha256(features: datasets.Features, rows: datasets.Dataset | None) -> str:
    feature = features.get(PALETTE_COLUMN)
    if isinstance(feature, datasets.ClassLabel):
        hashes = list(feature.names)
    elif feature is None:
        raise ValueError(
            f"nothing says which palette the column {TOKENS_COLUMN!r} belongs to: there is no column "
            f"{PALETTE_COLUMN!r} that names it. Make the data set with lightning_igpt.tokenize, or by "
            "map(palette.transform(), batched=True), which both write it"
        )
    elif rows is None:
        raise ValueError(f"only the rows of the column {PALETTE_COLUMN!r} name the palette; a Dataset is needed here")
    else:
        hashes = rows.select_columns([PALETTE_COLUMN]).with_format("arrow")[:][PALETTE_COLUMN].unique().to_pylist()
    if wrong := [value for value in hashes if not re.fullmatch("[0-9a-f]{64}", str(value))]:
        raise ValueError(f"the column {PALETTE_COLUMN!r} should hold the SHA-256 of a palette; it holds {wrong[0]!r}")
    if len(hashes) != 1:
        listed = ", ".join(value[:12] for value in hashes)
        raise ValueError(f"tokens of {len(hashes)} palettes ({listed}) are in one data set; tokenise it anew with one")
    return str(hashes[0])


def _image_size(features: datasets.Features, rows: datasets.Dataset | None) -> int:
    length = getattr(features[TOKENS_COLUMN], "length", -1)
    if length < 0:
        if not rows:
            raise ValueError(f"the column {TOKENS_COLUMN!r} has no fixed length and no rows, so no picture size")
        length = len(rows.with_format(None)[0][TOKENS_COLUMN])
    size = isqrt(length)
    if not length or size * size != length:
        raise ValueError(f"rows of {length} tokens fill no square picture; the nearest is {size} x {size} = {size**2}")
    return size
