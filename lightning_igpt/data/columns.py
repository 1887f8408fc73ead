"""Which column holds images, tokens or labels, and labels as class numbers that mean the same in every split."""

import re
from collections.abc import Iterable, Mapping, Sequence
from math import isqrt
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_igpt.palette import PALETTE_COLUMN, Palette

TOKENS_COLUMN = "tokens"
VARIANTS_COLUMN = "variants_of"  # rows of equal values are near-copies, which a hold-out keeps together
# What other people call them, the likelier first; png and so on, and cls, are WebDataset's.
IMAGE_NAMES = ("image", "images", "img", "pixel_values", "picture", "photo", "png", "jpg", "jpeg", "webp", "input")
LABEL_NAMES = ("label", "labels", "fine_label", "target", "targets", "cls", "class", "category")
MAX_CLASSES = 1_000_000  # beyond this a column of integers holds ids of something else
HIDDEN = "; -1 marks the hidden labels of a benchmark's test split"


class TokenMark(NamedTuple):
    """What the ids of a dataset mean."""

    sha256: str  # of the palette
    image_size: int  # side of the pictures in pixels

    @property
    def tokens_per_pixel(self) -> int:
        """3 of the palette ``rgb``, else 1."""
        return 3 if self.sha256 == Palette.load("rgb").sha256 else 1


def is_tokenized(features: Mapping[str, Any]) -> bool:
    """Whether there is a column ``tokens`` of lists of integers."""
    number = getattr(features.get(TOKENS_COLUMN), "feature", None)
    return isinstance(number, datasets.Value) and "int" in number.dtype


def marked_palette(rows: datasets.Dataset) -> TokenMark:
    """Read which palette and picture size the ids of a dataset belong to."""
    if not is_tokenized(rows.features):
        raise ValueError(f"there is no column {TOKENS_COLUMN!r} of integers; the columns are {_listed(rows.features)}")
    feature = rows.features.get(PALETTE_COLUMN)
    if feature is None:
        cure = "make the dataset with lightning_igpt.tokenize, or by map(palette.transform(), batched=True)"
        raise ValueError(f"there is no column {PALETTE_COLUMN!r} that names the palette of {TOKENS_COLUMN!r}; {cure}")
    named = isinstance(feature, datasets.ClassLabel)
    hashes = list(feature.names) if named else _read(rows, PALETTE_COLUMN).unique().to_pylist()
    if wrong := [value for value in hashes if not re.fullmatch("[0-9a-f]{64}", str(value))]:
        raise ValueError(f"the column {PALETTE_COLUMN!r} should hold the SHA-256 of a palette; it holds {wrong[0]!r}")
    if len(hashes) != 1:
        listed = ", ".join(value[:12] for value in hashes)
        raise ValueError(f"tokens of {len(hashes)} palettes ({listed}) are in one dataset; tokenize it with one")
    length = getattr(rows.features[TOKENS_COLUMN], "length", -1)
    if length < 0:
        length = len(rows.with_format(None)[0][TOKENS_COLUMN]) if len(rows) else 0
    each = TokenMark(str(hashes[0]), 0).tokens_per_pixel
    size = isqrt(length // each)
    if not length or each * size * size != length:
        nearest = f"{size} x {size}{f' x {each}' * (each > 1)} = {each * size**2}"
        raise ValueError(f"rows of {length} tokens fill no square picture; the nearest is {nearest}")
    return TokenMark(str(hashes[0]), size)


def find_image_column(features: datasets.Features, wanted: str | None, *, where: str) -> str:
    """Name the column of images: ``wanted``, the only one of type Image, or the first of ``IMAGE_NAMES`` that fits."""
    if wanted is not None:
        _check_column(features, wanted, "image_column", where)
        if not (isinstance(features[wanted], datasets.Image) or _can_hold_images(features[wanted])):
            cure = "image_column takes a column of type Image, of encoded bytes, of paths, or {bytes, path}"
            raise ValueError(f"column {wanted!r} of {where} has type {features[wanted]}, which holds no images; {cure}")
        return wanted
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    candidates = images or [name for name, feature in features.items() if _can_hold_images(feature)]
    known = [name for name in IMAGE_NAMES if name in candidates and (images or name != "input")]  # that may be a text
    if len(images) != 1 and known:
        return known[0]
    if len(images) != 1:
        problem = f"several columns of images ({_listed(images)})" if images else "no column of type Image"
        raise ValueError(f"{where} has {problem}; set image_column. Its columns: {_listed(features)}")
    return str(images[0])


def mode_of(rows: datasets.Dataset | datasets.IterableDataset, column: str) -> str | None:
    """Pillow's mode that ``datasets.Image(mode=...)`` asks for."""
    return getattr((rows.features or {}).get(column), "mode", None)


def find_label_column(features: datasets.Features, wanted: str | None, *, needed: bool, where: str) -> str | None:
    """Name the column of labels: ``wanted``, the only ClassLabel, or the first of ``LABEL_NAMES``, or None.

    Of several ClassLabels it is the first that is in ``LABEL_NAMES``; without any, the integers of such a name, or,
    where labels are needed, the strings.
    """
    if wanted is not None:
        _check_column(features, wanted, "label_column", where)
        if not (_is_integer(features[wanted]) or _is_string(features[wanted])):
            kind = f"column {wanted!r} of {where} has the type {features[wanted]}"
            raise ValueError(f"{kind}; labels are ClassLabel, integers or strings")
        return wanted
    labels = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    known = [name for name in LABEL_NAMES if name in (labels or features)]
    if len(labels) != 1:
        integers = [name for name in known if _is_integer(features[name])]
        chosen = integers[:1] or [name for name in known if needed and _is_string(features[name])][:1]
        if labels and chosen:
            rank_zero_info(f"labels of {where}: column {chosen[0]!r}; label_column can select {_listed(labels)}")
        labels = chosen or labels
    if len(labels) == 1:
        return str(labels[0])
    if not needed:
        return None
    if labels:
        raise ValueError(f"{where} has several columns of labels ({_listed(labels)}); set label_column to one of them")
    if known:  # of a type that says which are labels
        return find_label_column(features, known[0], needed=needed, where=where)
    cure = "set label_column, or for a folder of images put each class into a sub-folder (two or more)"
    raise ValueError(f"{where} has no labels: no ClassLabel and no 'label' among {_listed(features)}; {cure}")


def _check_column(features: datasets.Features, name: str, option: str, where: str) -> None:
    if name not in features:
        raise ValueError(f"{option} is {name!r}, but {where} has the columns {_listed(features)}")


def class_names_of(dataset: datasets.Dataset | datasets.IterableDataset, column: str) -> list[str]:
    """Classes of a split by number: a ClassLabel's names, sorted strings, or "0" to the largest number."""
    feature = (dataset.features or {}).get(column)
    if isinstance(feature, datasets.ClassLabel):
        return list(feature.names)
    if isinstance(dataset, datasets.IterableDataset):
        cure = f"name them: stream.cast_column({column!r}, datasets.ClassLabel(names=[...]))"
        raise ValueError(f"the classes in column {column!r} of a stream cannot be counted in advance; {cure}")
    values = _read(dataset, column).unique().drop_null().to_pylist()
    if _is_string(feature):
        return sorted(values)
    largest = max(values, default=-1)
    if largest >= MAX_CLASSES:
        raise ValueError(f"column {column!r} has numbers up to {largest}; class numbers run from 0 without large gaps")
    return [str(number) for number in range(largest + 1)]


def encode_labels(dataset: datasets.Dataset, column: str, class_names: Sequence[str], *, where: str) -> Tensor:
    """Labels as numbers into the training split's ``class_names``, int64 (rows,), matched by name.

    A split that lacks a class may number the others differently.
    """
    values = _read(dataset, column)
    if values.null_count:
        row = values.is_null().index(True).as_py()
        raise ValueError(f"{where} has no {column!r} in {values.null_count} of {len(values)} rows, such as row {row}")
    feature = dataset.features[column]
    if _is_string(feature):
        distinct, numbers = np.unique(np.array(values.to_pylist(), dtype=object), return_inverse=True)
        names = distinct.tolist()
    else:
        numbers = values.to_numpy().astype(np.int64)
        names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else list(class_names)
        outside = np.flatnonzero((numbers < 0) | (numbers >= len(names)))
        if len(outside):
            label = numbers[outside[0]]
            hint = HIDDEN if label == -1 else ""
            text = f"{len(outside)} of {len(numbers)} labels of {where} are outside 0..{len(names) - 1}"
            raise ValueError(f"{text}, the first is {label} in row {outside[0]}{hint}")
    number_of = {name: number for number, name in enumerate(class_names)}
    used = [names[number] for number in np.unique(numbers)]
    if unknown := [name for name in used if name not in number_of]:
        text = f"{where} has the classes {_listed(unknown)}, which the training split does not have"
        raise ValueError(f"{text}; it has {_listed(class_names)}")
    table = np.array([number_of.get(name, -1) for name in names], dtype=np.int64)
    return torch.from_numpy(table[numbers])


def _read(dataset: datasets.Dataset, column: str) -> Any:  # pyarrow.ChunkedArray
    return dataset.select_columns([column]).with_format("arrow")[:][column]


def _can_hold_images(feature: object) -> bool:
    if isinstance(feature, dict):
        return set(feature) == {"bytes", "path"}
    return isinstance(feature, datasets.Value) and feature.dtype in {"binary", "large_binary", "string", "large_string"}


def _is_integer(feature: object) -> bool:
    return isinstance(feature, datasets.Value | datasets.ClassLabel) and "int" in feature.dtype


def _is_string(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in {"string", "large_string"}


def _listed(names: Iterable[str], limit: int = 20) -> str:
    names = [repr(name) for name in names]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
