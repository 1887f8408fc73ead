"""From the name of a place (a path, a hub id, "digits") to data sets or streams, whatever they hold."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import datasets

from lightning_igpt.data.digits import load_digits
from lightning_igpt.data.folders import UNREADABLE, list_files, open_image_folder
from lightning_igpt.images import SUFFIXES

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # suffix: what ``datasets`` calls it
_KINDS = {".parquet": "Parquet", ".arrow": "Arrow", ".tar": "WebDataset"}
_STREAM_SHARDS = 64  # of data sets that lie here as a whole; their rows are shuffled within shards and blocks


def open_location(
    source: str | Path, *, name: str | None = None, revision: str | None = None, streaming: bool = False
) -> dict[str, Rows]:
    """Open what lies at a path, on the hub, or in this package.

    Args:
        source: "digits"; a hub id "owner/name"; a folder of images, of Parquet or Arrow files or of WebDataset shards,
            or one such file; a folder written by ``save_to_disk``. A path that exists wins over a hub id.
        name: Configuration of a data set that has several.
        revision: Branch, tag or commit on the hub.
        streaming: Read the hub, Parquet, Arrow and WebDataset as they arrive, without a copy of the whole first.

    Returns:
        The splits by name; streams if ``streaming``.

    Raises:
        FileNotFoundError: The path does not exist.
        ValueError: Nothing usable is there; the message says what was looked for.
    """
    path = Path(source).expanduser()
    with quiet():
        if source == "digits":
            opened = load_digits()
        elif path.exists():
            opened = _open_path(path, name, streaming)
        elif isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix not in _TABLES:
            opened = _open_hub(source, name, revision, streaming)
        else:
            raise _not_found(source, path)
    if isinstance(opened, datasets.Dataset | datasets.IterableDataset):
        opened = {"train": opened}
    return {split: as_stream(rows) if streaming else rows for split, rows in opened.items()}


def as_stream(rows: Rows) -> datasets.IterableDataset:
    """A data set that lies here as a stream of up to 64 shards; a stream as it is."""
    if isinstance(rows, datasets.IterableDataset):
        return rows
    if not len(rows):
        raise ValueError(f"the split {str(rows.split)!r} has no rows, so it cannot be read as a stream")
    return rows.to_iterable_dataset(num_shards=min(_STREAM_SHARDS, len(rows)))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars where nobody watches: in a log file every redraw is a line."""
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def _open_path(path: Path, name: str | None, streaming: bool) -> datasets.DatasetDict | datasets.Dataset:
    if path.is_file():
        if path.suffix.lower() in SUFFIXES:
            raise ValueError(f"{path} is a single image; give the folder in which your images lie")
        if path.suffix.lower() in UNREADABLE:
            raise ValueError(f"{path} is an image in a format that is not read; convert it to JPEG or PNG")
        if path.suffix not in _TABLES:
            raise ValueError(
                f"{path} is a file that is not Parquet, Arrow or a WebDataset tar; give such a file, or a folder"
            )
        return datasets.load_dataset(_TABLES[path.suffix], data_files={"train": str(path)}, streaming=streaming)
    if any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(str(path))
    if any(file.name in _METADATA for file in list_files(path, frozenset({".csv", ".jsonl", ".parquet"}))):
        return datasets.load_dataset("imagefolder", data_dir=str(path))
    found = {_KINDS[suffix]: list_files(path, frozenset({suffix})) for suffix in _TABLES}
    found = {"image": list_files(path, SUFFIXES), **found}
    found = {kind: files for kind, files in found.items() if files}
    if len(found) > 1:
        counts = " and ".join(f"{len(files)} {kind} files" for kind, files in found.items())
        raise ValueError(f"{path} holds {counts}; give a folder of one kind")
    if "image" in found:
        return open_image_folder(path, found["image"])
    if found:
        (files,) = found.values()
        kind = _TABLES[files[0].suffix]
        if kind == "arrow":  # by name alone ``datasets`` does not know these
            return datasets.load_dataset(kind, data_dir=str(path), streaming=streaming)
        return datasets.load_dataset(str(path), name, streaming=streaming)
    if unreadable := list_files(path, UNREADABLE):
        kinds = ", ".join(sorted({file.suffix.lower() for file in unreadable}))
        raise ValueError(
            f"{path} holds {len(unreadable)} images, but in formats that are not read ({kinds}); convert them to JPEG "
            "or PNG"
        )
    raise ValueError(
        f"{path} holds no images ({' '.join(sorted(SUFFIXES))}), no Parquet, Arrow or WebDataset (.tar) files, and no "
        "data set written by save_to_disk, in it or below"
    )


def _open_hub(source: str, name: str | None, revision: str | None, streaming: bool) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(source, name, revision=revision, streaming=streaming)
    except Exception as error:  # missing, gated, offline, unknown configuration: each has its own class
        raise ValueError(
            f"cannot open {source!r}: no such folder here, and as a data set on the Hugging Face hub it failed with "
            f"{type(error).__name__}: {error}\nCheck the name and the connection; a private or gated data set needs "
            "a login, one with several configurations needs config_name. HF_HUB_OFFLINE=1 uses earlier downloads only"
        ) from error


def _not_found(source: str | Path, path: Path) -> Exception:
    if isinstance(source, str) and re.fullmatch(r"[\w-]+", source):
        return ValueError(
            f"source is {source!r}: no file or folder of that name is here, and data sets on the Hugging Face hub are "
            "called 'owner/name'. The only embedded data are 'digits'"
        )
    return FileNotFoundError(f"source is {str(source)!r}, but there is no file or folder {path.absolute()}")
