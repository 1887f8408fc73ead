"""One door for every place images come from, and what is known of them before any is decoded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
from torch import Tensor

from lightning_igpt.data.columns import class_names_of, encode_labels, find_image_column, find_label_column
from lightning_igpt.data.locations import Rows, as_stream, open_location, quiet
from lightning_igpt.data.tokenize import TOKENS_COLUMN, TokenMark, is_tokenised, marked_palette
from lightning_igpt.palette import PALETTE_COLUMN

if TYPE_CHECKING:
    OneSource: TypeAlias = (
        str | Path | datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset | datasets.IterableDatasetDict
    )
    ImageSource: TypeAlias = OneSource | Sequence[OneSource]
else:
    # What the command line sees. A union with classes would let a config file name, and so import, any module.
    OneSource: TypeAlias = str
    ImageSource: TypeAlias = str | list[str]


@dataclass(frozen=True)
class Source:
    """Opened images, or tokens made of them.

    Args:
        name: What messages call it.
        splits: The splits by name; the image column gives ``{"bytes", "path"}``, nothing is decoded yet.
        image_column: The column of images, or of tokens.
        label_column: The column of labels, or None.
        class_names: The classes of the training split, or None without labels.
        tokens: Palette and size of the tokens; None where there are images.
        streaming: The splits are streams, which have no length and are read in their own order.
    """

    name: str
    splits: dict[str, Rows]
    image_column: str
    label_column: str | None
    class_names: list[str] | None
    tokens: TokenMark | None = None
    streaming: bool = False

    def labels(self, split: str) -> Tensor:
        """Class numbers of a split, int64 (rows,), aligned with ``class_names``.

        Raises:
            ValueError: The split has no labels, or some are missing, hidden (-1), out of range or unknown to training.
        """
        where = f"{self.name}, split {split!r}"
        dataset = self.splits[split]
        if self.label_column is None or self.class_names is None or self.label_column not in dataset.features:
            raise ValueError(f"{where} has no labels")
        return encode_labels(dataset, self.label_column, self.class_names, where=where)

    def need_images(self) -> None:
        """Raise ValueError where there are tokens instead."""
        if self.tokens is not None:
            raise ValueError(f"{self.name} holds tokens, from which the images cannot be had again; give the images")

    def with_split(self, name: str, rows: Rows) -> Source:
        """The same source with one split more."""
        return replace(self, splits={**self.splits, name: rows})


def open_source(
    source: OneSource,
    *,
    name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    need_labels: bool = False,
    train_split: str | None = None,
    streaming: bool = False,
) -> Source:
    """Open images wherever they are.

    Args:
        source: "digits"; a hub id "owner/name"; a folder of images, of Parquet or Arrow files or of WebDataset shards,
            or one such file; a folder written by ``save_to_disk``; or an object of ``datasets``: Dataset, DatasetDict,
            IterableDataset, IterableDatasetDict. A path that exists wins over a hub id.
        name: Configuration of a data set that has several.
        revision: Branch, tag or commit on the hub.
        image_column: Column of images; needed where not exactly one column has the type Image.
        label_column: Column of labels; needed where not exactly one column is a ClassLabel.
        need_labels: Raise where there are no labels.
        train_split: The split that decides the classes; default: ``train``, or else the first.
        streaming: Read rows as they arrive.

    Raises:
        FileNotFoundError: The path does not exist.
        TypeError: ``source`` is of no known type.
        ValueError: Nothing usable is there; the message says what was looked for.
    """
    splits, where = _open(source, name, revision, streaming)
    splits = {split: rows.with_format(None) for split, rows in splits.items()}
    base = re.split(r"[\[+]", train_split or "train")[0].strip()
    train = splits.get(base, next(iter(splits.values())))
    features = _features(train, where)
    mark = None
    if image_column is None and is_tokenised(features):
        image_column, mark = TOKENS_COLUMN, _find_mark(splits, where)
        features = datasets.Features({key: kind for key, kind in features.items() if key != PALETTE_COLUMN})
    else:
        image_column = find_image_column(features, image_column, where=where)
    column, classes = _find_labels(train, features, label_column, needed=need_labels, where=where)
    if mark is None:
        splits = {split: _undecoded(rows, image_column, where) for split, rows in splits.items()}
    is_stream = isinstance(train, datasets.IterableDataset)
    return Source(where, splits, image_column, column, classes, mark, is_stream)


def as_list(source: ImageSource) -> list[Any]:
    """The sources that a user names by one or by a list of several."""
    return list(source) if isinstance(source, (list, tuple)) else [source]


def name_of(source: ImageSource) -> str:
    """A source in words: names of places, and the types of what lies in memory."""
    return " + ".join(str(one) if isinstance(one, str | Path) else type(one).__name__ for one in as_list(source))


def _open(source: OneSource, name: str | None, revision: str | None, streaming: bool) -> tuple[dict[str, Rows], str]:
    if isinstance(source, str | Path):
        return open_location(source, name=name, revision=revision, streaming=streaming), str(source)
    if isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        if not source:
            raise ValueError(f"the {type(source).__name__} is empty: it has no splits")
        opened, where = dict(source), f"the {type(source).__name__} of {', '.join(source)}"
    elif isinstance(source, datasets.Dataset):
        opened, where = {"train": source}, f"the Dataset of {len(source)} rows"
    elif isinstance(source, datasets.IterableDataset):
        opened, where = {"train": source}, "the IterableDataset"
    else:
        raise TypeError(
            f"source is a {type(source).__name__}; it takes a string, a path, or a Dataset, DatasetDict, "
            "IterableDataset or IterableDatasetDict of Hugging Face datasets"
        )
    return {split: as_stream(rows) if streaming else rows for split, rows in opened.items()}, where


def _features(rows: Rows, where: str) -> datasets.Features:
    """The columns and their types; a stream that does not tell them is asked for its first row."""
    if rows.features is not None:
        return rows.features
    first = list(rows.take(1))
    if not first:
        raise ValueError(f"{where} has no rows")
    return datasets.Dataset.from_list(first).features


def _find_mark(splits: dict[str, Rows], where: str) -> TokenMark:
    """Palette and size of the tokens, which must be the same in every split."""
    marks = {split: _mark_of(rows, f"{where}, split {split!r}") for split, rows in splits.items() if _has_rows(rows)}
    if not marks:
        raise ValueError(f"{where} has no rows")
    if len(set(marks.values())) > 1:
        found = ", ".join(f"{split}: {mark.sha256[:12]} at {mark.image_size} pixels" for split, mark in marks.items())
        raise ValueError(f"the splits of {where} are tokens of different palettes or sizes ({found}); make all anew")
    return next(iter(marks.values()))


def _mark_of(rows: Rows, where: str) -> TokenMark:
    try:
        if isinstance(rows, datasets.IterableDataset):
            rows = datasets.Dataset.from_list(list(rows.take(1)), features=rows.features)
        return marked_palette(rows)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _has_rows(rows: Rows) -> bool:
    return isinstance(rows, datasets.IterableDataset) or len(rows) > 0


def _find_labels(
    train: Rows, features: datasets.Features, wanted: str | None, *, needed: bool, where: str
) -> tuple[str | None, list[str] | None]:
    column = find_label_column(features, wanted, needed=needed, where=where)
    if column is None:
        return None, None
    try:
        return column, class_names_of(train, column)
    except ValueError:
        if needed or wanted is not None:
            raise
        return None, None


def _undecoded(rows: Rows, column: str, where: str) -> Rows:
    if rows.features is None:  # a stream that was mapped gives what its function makes
        return rows
    if column not in rows.features:
        raise ValueError(f"a split of {where} has no column {column!r}; its columns: {', '.join(rows.features)}")
    with quiet():
        return rows.cast_column(column, datasets.Image(decode=False))
