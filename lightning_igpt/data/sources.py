"""One entry for every place images come from, and what is known of them before any is decoded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import datasets
from torch import Tensor

from lightning_igpt.data.columns import (
    TOKENS_COLUMN,
    TokenMark,
    class_names_of,
    encode_labels,
    find_image_column,
    find_label_column,
    is_tokenized,
    marked_palette,
    mode_of,
)
from lightning_igpt.data.embedded import EMBEDDED
from lightning_igpt.data.folders import TABLES, open_path, quiet
from lightning_igpt.files import shown
from lightning_igpt.palette import PALETTE_COLUMN

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset

if TYPE_CHECKING:
    ImageSource: TypeAlias = (
        str | Path | datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset | datasets.IterableDatasetDict
    )
else:
    # What the command line sees. A union with classes would let a config file name, and so import, any module; numbers
    # and truth values get here to be refused in one sentence.
    ImageSource: TypeAlias = str | int | float | bool

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_STREAM_SHARDS = 64  # of datasets that are stored here as a whole


@dataclass(frozen=True)
class Source:
    """Opened images, or tokens made of them."""

    name: str  # what messages call it
    splits: dict[str, Rows]  # by name; the image column gives {"bytes", "path"}, nothing is decoded yet
    image_column: str  # or that of tokens
    label_column: str | None
    class_names: list[str] | None  # of the training split; None without labels
    tokens: TokenMark | None = None  # palette and size; None for images
    streaming: bool = False  # the splits are streams, which have no length and are read in their own order
    remote: bool = False  # whether rows may name images by addresses on the network

    def labels(self, split: str) -> Tensor:
        """Class numbers of a split, int64 (rows,), aligned with ``class_names``."""
        where = f"{self.name}, split {split!r}"
        dataset = self.splits[split]
        if self.label_column is None or self.class_names is None or self.label_column not in dataset.features:
            raise ValueError(f"{where} has no labels")
        return encode_labels(dataset, self.label_column, self.class_names, where=where)

    def need_images(self) -> None:
        """Raise ValueError where there are tokens instead."""
        if self.tokens is not None:
            raise ValueError(f"{self.name} holds tokens, from which images cannot be recovered; give the images")


def open_source(
    source: ImageSource,
    *,
    name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    need_labels: bool = False,
    train_split: str | None = None,
    streaming: bool = False,
) -> Source:
    """Open images wherever they are; the options are those of ``ImageDataModule``.

    A path that exists takes precedence over a hub id. The classes are those of ``train_split``, or else of ``train``
    or of the first split.
    """
    name_of(source)
    with quiet():
        opened, where = _open(source, name, revision, streaming)
    if streaming:
        stored = {split: rows for split, rows in opened.items() if isinstance(rows, datasets.Dataset)}
        if empty := [split for split, rows in stored.items() if not len(rows)]:
            raise ValueError(f"the split {empty[0]!r} has no rows, so it cannot be read as a stream")
        for split, rows in stored.items():
            opened[split] = rows.to_iterable_dataset(num_shards=min(_STREAM_SHARDS, len(rows)))
    splits = {split: rows.with_format(None) for split, rows in opened.items()}
    base = re.split(r"[\[+]", train_split or "train")[0].strip()
    train = splits.get(base, next(iter(splits.values())))
    features, mark = train.features or _first(train, where).features, None  # a stream's may be unknown
    if image_column is None and is_tokenized(features):
        column, mark = TOKENS_COLUMN, _find_mark(splits, where)
        features = datasets.Features({key: kind for key, kind in features.items() if key != PALETTE_COLUMN})
    else:
        column = find_image_column(features, image_column, where=where)
        splits = {split: _undecoded(rows, column, where) for split, rows in splits.items()}
    labels, classes = find_label_column(features, label_column, needed=need_labels, where=where), None
    if labels is not None:
        try:
            classes = class_names_of(train, labels)
        except ValueError:
            if need_labels or label_column is not None:
                raise
            labels = None
    # A stranger's file must not make this machine open addresses; a column of strings holds nothing else.
    trusted = not isinstance(source, str | Path) or isinstance(features[column], datasets.Value)
    remote = image_column is not None and trusted
    streams = isinstance(train, datasets.IterableDataset)
    return Source(where, splits, column, labels, classes, mark, streams, remote)


def name_of(source: Any) -> str:
    """A source in words: the name of a place, or the type of an object in memory."""
    if isinstance(source, bool | int | float):
        raise TypeError(
            f"source is {source!r}, but it takes a name or a path; YAML reads 007 as 7 and on as True: quote it, as in "
            "source: '007'"
        )
    return str(source) if isinstance(source, str | Path) else type(source).__name__


def _open(source: Any, name: str | None, revision: str | None, streaming: bool) -> tuple[dict[str, Rows], str]:
    """The splits by name, and what messages call them all."""
    where = shown(source)
    if isinstance(source, str | Path):
        path = Path(source).expanduser()
        if source in EMBEDDED:
            source = EMBEDDED[str(source)]()
        elif path.exists() and str(source).strip():
            source = open_path(path, name, streaming=streaming)
        elif isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix not in TABLES:
            source = _open_hub(source, name, revision, streaming)
        elif isinstance(source, str) and re.fullmatch(r"[\w-]+|\s*", source):
            raise ValueError(
                f"source is {source!r}: no file or folder of that name is here, and datasets on the Hugging Face hub "
                f"are called 'owner/name'. The embedded data are {' and '.join(map(repr, EMBEDDED))}"
            )
        else:
            raise FileNotFoundError(f"source is {str(source)!r}: there is no file or folder {shown(path.absolute())}")
    elif isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        where = f"the {type(source).__name__} of {', '.join(source)}"
    elif isinstance(source, datasets.Dataset | datasets.IterableDataset):
        where = f"the Dataset of {len(source)} rows" if isinstance(source, datasets.Dataset) else "the IterableDataset"
    else:
        raise TypeError(
            f"source is a {type(source).__name__}; it takes a string, a path, or a Dataset, DatasetDict, "
            "IterableDataset or IterableDatasetDict of Hugging Face datasets"
        )
    if isinstance(source, datasets.Dataset | datasets.IterableDataset):
        return {"train": source}, where
    if not source:
        raise ValueError(f"the {type(source).__name__} is empty: it has no splits")
    return dict(source), where


def _open_hub(source: str, name: str | None, revision: str | None, streaming: bool) -> Any:
    try:
        return datasets.load_dataset(source, name, revision=revision, streaming=streaming)
    except Exception as error:  # missing, gated, offline, unknown configuration: each has its own class
        raise ValueError(
            f"cannot open {source!r}: no such folder here, and as a dataset on the Hugging Face hub it failed with "
            f"{type(error).__name__}: {error}\nCheck the name and the connection; a private or gated dataset needs "
            "a login, one with several configurations needs config_name. HF_HUB_OFFLINE=1 uses earlier downloads only"
        ) from error


def _first(stream: datasets.IterableDataset, where: str) -> datasets.Dataset:
    rows = list(stream.take(1))
    if not rows:
        raise ValueError(f"{where} has no rows")
    return datasets.Dataset.from_list(rows, features=stream.features)


def _find_mark(splits: dict[str, Rows], where: str) -> TokenMark:
    """Palette and size of the tokens, which must be the same in every split."""
    marks: dict[str, TokenMark] = {}
    for split, rows in splits.items():
        place = f"{where}, split {split!r}"
        stored = _first(rows, place) if isinstance(rows, datasets.IterableDataset) else rows
        try:
            marks |= {split: marked_palette(stored)} if len(stored) else {}
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if not marks:
        raise ValueError(f"{where} has no rows")
    if len(set(marks.values())) > 1:
        listed = ", ".join(f"{split}: {mark.sha256[:12]} at {mark.image_size} pixels" for split, mark in marks.items())
        raise ValueError(f"the splits of {where} are tokens of different palettes or sizes ({listed}); make them again")
    return next(iter(marks.values()))


def _undecoded(rows: Rows, column: str, where: str) -> Rows:
    if rows.features is None:  # a stream that was mapped gives what its function makes
        return rows
    if column not in rows.features:
        raise ValueError(f"a split of {where} has no column {column!r}; its columns: {', '.join(rows.features)}")
    with quiet():
        return rows.cast_column(column, datasets.Image(mode=mode_of(rows, column), decode=False))
