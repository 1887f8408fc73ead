"""One door for every place images come from: the hub, folders, Parquet, saved or in-memory data sets, the digits."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import datasets
from torch import Tensor

from lightning_igpt.data.columns import class_names_of, encode_labels, find_image_column, find_label_column
from lightning_igpt.data.digits import load_digits
from lightning_igpt.data.folders import list_files, open_image_folder
from lightning_igpt.images import SUFFIXES

if TYPE_CHECKING:
    ImageSource: TypeAlias = str | Path | datasets.Dataset | datasets.DatasetDict
else:
    # What the command line sees. A union with classes would let a config file name, and so import, any module.
    ImageSource: TypeAlias = str

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class Source:
    """Opened images.

    Args:
        name: What messages call it.
        splits: The splits by name; the image column gives ``{"bytes", "path"}``, nothing is decoded yet.
        image_column: The column of images.
        label_column: The column of labels, or None.
        class_names: The classes of the training split, or None without labels.
    """

    name: str
    splits: dict[str, datasets.Dataset]
    image_column: str
    label_column: str | None
    class_names: list[str] | None

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


def open_source(
    source: ImageSource,
    *,
    name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    need_labels: bool = False,
    train_split: str | None = None,
) -> Source:
    """Open images wherever they are.

    Args:
        source: "digits"; a hub id "owner/name"; a folder of images; a Parquet file or a folder of them; a folder
            written by ``save_to_disk``; or a ``datasets.Dataset`` or ``DatasetDict``. A path that exists wins over a
            hub id.
        name: Configuration of a data set that has several.
        revision: Branch, tag or commit on the hub.
        image_column: Column of images; needed where not exactly one column has the type Image.
        label_column: Column of labels; needed where not exactly one column is a ClassLabel.
        need_labels: Raise where there are no labels.
        train_split: The split that decides the classes; default: ``train``, or else the first.

    Raises:
        FileNotFoundError: The path does not exist.
        TypeError: ``source`` is a stream, or of no known type.
        ValueError: Nothing usable is there; the message says what was looked for.
    """
    splits, where = _open(source, name=name, revision=revision)
    splits = {split: dataset.with_format(None) for split, dataset in splits.items()}
    train = splits.get(train_split or "train", next(iter(splits.values())))
    image_column = find_image_column(train.features, image_column, where=where)
    found, class_names = _find_labels(train, label_column, needed=need_labels, where=where)
    splits = {split: _undecoded(dataset, image_column, where) for split, dataset in splits.items()}
    return Source(where, splits, image_column, found, class_names)


def _open(source: ImageSource, *, name: str | None, revision: str | None) -> tuple[dict[str, datasets.Dataset], str]:
    if isinstance(source, datasets.DatasetDict):
        if not source:
            raise ValueError("the DatasetDict is empty: it has no splits")
        return dict(source), f"the DatasetDict of {', '.join(source)}"
    if isinstance(source, datasets.Dataset):
        return {"train": source}, f"the Dataset of {len(source)} rows"
    if isinstance(source, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise TypeError(
            "a stream cannot be read in an order that resumes; load it with streaming=False, or materialise a part: "
            "datasets.Dataset.from_list(list(stream.take(100_000)), features=stream.features)"
        )
    if not isinstance(source, str | Path):
        raise TypeError(f"source is a {type(source).__name__}; it takes a string, a path, a Dataset or a DatasetDict")
    if source == "digits":
        return dict(load_digits()), "digits"
    path = Path(source).expanduser()
    with _quiet():
        if path.exists():
            opened = _open_path(path, name)
        elif isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix != ".parquet":
            opened = _open_hub(source, name, revision)
        else:
            raise _not_found(source, path)
    return ({"train": opened} if isinstance(opened, datasets.Dataset) else dict(opened)), str(source)


def _open_path(path: Path, name: str | None) -> datasets.Dataset | datasets.DatasetDict:
    if path.is_file():
        if path.suffix != ".parquet":
            raise ValueError(f"{path} is a file that is not Parquet; give a .parquet file or a folder")
        return datasets.load_dataset("parquet", data_files=str(path))
    if any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(str(path))
    if any(file.name in _METADATA for file in list_files(path, frozenset({".csv", ".jsonl", ".parquet"}))):
        return datasets.load_dataset("imagefolder", data_dir=str(path))
    images, tables = list_files(path, SUFFIXES), list_files(path, frozenset({".parquet"}))
    if images and tables:
        raise ValueError(
            f"{path} holds {len(images)} images and {len(tables)} Parquet files; give a folder of one kind"
        )
    if images:
        return open_image_folder(path, images)
    if tables:
        return datasets.load_dataset(str(path), name)
    raise ValueError(
        f"{path} holds no images ({' '.join(sorted(SUFFIXES))}), no Parquet files, and no data set written by "
        "save_to_disk, in it or below"
    )


def _open_hub(source: str, name: str | None, revision: str | None) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(source, name, revision=revision)
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


def _find_labels(
    train: datasets.Dataset, wanted: str | None, *, needed: bool, where: str
) -> tuple[str | None, list[str] | None]:
    column = find_label_column(train.features, wanted, needed=needed, where=where)
    if column is None:
        return None, None
    try:
        return column, class_names_of(train, column)
    except ValueError:
        if needed or wanted is not None:
            raise
        return None, None


def _undecoded(dataset: datasets.Dataset, column: str, where: str) -> datasets.Dataset:
    if column not in dataset.features:
        raise ValueError(f"a split of {where} has no column {column!r}; its columns: {', '.join(dataset.features)}")
    with _quiet():
        return dataset.cast_column(column, datasets.Image(decode=False))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars where nobody watches: in a log file every redraw is a line."""
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
