"""What tells one data set from another: counts, labels, the names and sizes of files, a sample of their bytes.

Nothing is decoded and no stream is read, so that it costs a fraction of a second. The same images give the same digest
in any folder, on any machine and in any process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]

from lightning_igpt.data.folders import list_files
from lightning_igpt.data.locations import Rows
from lightning_igpt.data.sources import Source
from lightning_igpt.images import SUFFIXES

SAMPLE = 64  # rows of a split whose bytes are looked at
MOST_FILES = 100_000  # of a split whose sizes are asked for; a network file system takes a while for each
STREAMED = SUFFIXES | {".parquet", ".arrow", ".tar", ".csv", ".jsonl"}


def fingerprint(given: Sequence[Any], sources: Sequence[Source]) -> str:
    """A digest that changes when the images or their labels do, as far as can be told without reading them all.

    Of every split: its name, its number of rows, all labels, and

    - where rows name image files: all names, relative to the folder that holds them all, and the sizes of the files (of
      100,000 evenly spaced ones where there are more), so that a file rewritten with as many bytes goes unnoticed;
    - where rows hold files or tokens: the bytes of 64 evenly spaced rows, so that a change between them goes unnoticed;
    - of a stream: names and sizes of the local files it is read from; else the names of its splits, columns and remote
      files, and the numbers of shards and rows as far as they are known. No row of it is read.

    Args:
        given: What the user named, one for each source.
        sources: The same, opened.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for place, source in zip(given, sources, strict=True):
        if place == "digits":  # they are the same wherever they are built, but their PNG files need not be
            parts: list[Any] = [place]
        elif source.streaming:
            parts = _stream_parts(place, source)
        else:
            parts = _stored_parts(source)
        digest.update(repr([source.class_names, source.tokens and tuple(source.tokens), parts]).encode())
    return digest.hexdigest()


def _stored_parts(source: Source) -> list[Any]:
    files = {split: _files(rows, source.image_column) for split, rows in source.splits.items()}
    root = _common_folder([path for paths in files.values() for path in paths])
    parts: list[Any] = []
    for split, rows in sorted(source.splits.items()):
        held = [] if files[split] else [_digest(_bytes(value)) for value in _sample(rows, source.image_column)]
        inside = _named(files[split], root) if files[split] else held
        parts.append([split, len(rows), _digest(_labels(rows, source.label_column)), inside])
    return parts


def _stream_parts(place: Any, source: Source) -> list[Any]:
    path = Path(place).expanduser() if isinstance(place, str | Path) else None
    if path is not None and path.exists():
        files = [path / name for name in list_files(path, STREAMED)] if path.is_dir() else [path]
        return [_named([str(file) for file in files], str(path if path.is_dir() else path.parent))]
    return [
        [
            split,
            stream.num_shards,
            sorted(stream.features or ()),
            {name: info.num_examples for name, info in sorted((stream.info.splits or {}).items())},
            _remote_files(stream),
        ]
        for split, stream in sorted(source.splits.items())
    ]


def _files(rows: Rows, column: str) -> list[str]:
    """The paths of the images where the rows hold nothing else, as a look at a sample of them tells; else none."""
    sample = _sample(rows, column) if isinstance(rows.features[column], datasets.Image) else []
    if not sample or any(value is None or value["bytes"] is not None for value in sample):
        return []
    images = rows.select_columns([column]).with_format("arrow")[:][column]
    return [path or "" for path in pc.struct_field(images, "path").to_pylist()]


def _named(paths: Sequence[str], root: str) -> str:
    """A digest of names below a folder, in their order, and of sizes."""
    names = [path.removeprefix(root).replace(os.sep, "/") for path in paths]
    sizes = [_size(paths[number]) for number in _spaced(len(paths), MOST_FILES)]
    return _digest(repr([names, sizes]).encode())


def _sample(rows: Rows, column: str) -> list[Any]:
    """What evenly spaced rows hold."""
    if not len(rows):
        return []
    values: list[Any] = (
        rows.select_columns([column]).with_format("arrow")[_spaced(len(rows), SAMPLE)][column].to_pylist()
    )
    return values


def _bytes(value: Any) -> bytes:
    if not isinstance(value, dict):
        return b"" if value is None else np.asarray(value, np.int64).tobytes()  # tokens
    content = value["bytes"]
    return str(_size(value["path"] or "")).encode() if content is None else bytes(content)


def _labels(rows: Rows, column: str | None) -> bytes:
    if column is None or column not in rows.features:
        return b""
    labels = rows.select_columns([column]).with_format("arrow")[:][column]
    if pa.types.is_integer(labels.type) and not labels.null_count:
        numbers: bytes = labels.to_numpy().astype("<i8").tobytes()
        return numbers
    return repr(labels.to_pylist()).encode()


def _remote_files(stream: datasets.IterableDataset) -> list[str]:
    """The addresses that a stream is read from; those on the hub name the commit."""
    stage = getattr(stream, "_ex_iterable", None)
    while (inner := getattr(stage, "ex_iterable", None)) is not None:
        stage = inner
    lists = [value for value in (getattr(stage, "kwargs", None) or {}).values() if isinstance(value, list)]
    return [name for names in lists for name in names if isinstance(name, str) and "://" in name]


def _common_folder(paths: Sequence[str]) -> str:
    """The folder that holds all files; empty where there is none."""
    try:
        return os.path.commonpath({os.path.dirname(path) for path in paths})  # noqa: PTH120 - Path takes seconds
    except ValueError:  # no paths, or not all are absolute
        return ""


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 - as above
    except (OSError, ValueError):  # it will be told of when it is read
        return -1


def _spaced(n: int, most: int) -> list[int]:
    """Up to ``most`` evenly spaced numbers below n, the first and the last among them."""
    return list(range(n)) if n <= most else [number * (n - 1) // (most - 1) for number in range(most)]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
