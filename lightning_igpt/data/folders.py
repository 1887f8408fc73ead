"""What a path holds: image files by folder names, Parquet, Arrow, WebDataset shards, or a saved dataset.

``datasets`` has a loader for folders of images too. It makes a split of any folder or file called "train" or "test",
also where that is a class, and then leaves the other images out silently; so such folders are read here.
"""

import contextlib
import glob
import os
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
from lightning.pytorch.utilities import rank_zero_warn

from lightning_igpt.data.columns import LABEL_NAMES
from lightning_igpt.data.downsampled import open_npz
from lightning_igpt.files import counted, shown
from lightning_igpt.images import SUFFIXES

# Words that mean a split, and what the split is called: one of the names ``splits.py`` looks for.
SPLIT_NAMES = {name: name for name in ("train", "validation", "valid", "val", "dev", "test")}
SPLIT_NAMES |= {"training": "train", "eval": "validation", "evaluation": "validation", "testing": "test"}
SPLIT_NAMES |= {"trn": "train", "validate": "validation", "tst": "test"}
_PLAIN = "set|data(?:set)?|images?|imgs?|photos?|pictures?|samples?|split"  # words that say nothing
_SPLIT = re.compile(rf"(?<![^\W\d_])({'|'.join(SPLIT_NAMES)})(?:{_PLAIN})?(?![^\W\d_])")
_NOTHING = re.compile(rf"(?<![^\W\d_])(?:{_PLAIN})(?![^\W\d_])|[\W\d_]")
_SHARD = re.compile(r"(\w+)-\d{5}-of-\d{5}.*")  # as on the hub; what comes first is the split
_CARD = re.compile("^(configs|dataset_info):", re.M)
UNREADABLE = {".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".raw", ".psd", ".svg"}
TABLES = {".parquet": "Parquet", ".arrow": "Arrow", ".tar": "WebDataset"}
_KINDS = dict.fromkeys(SUFFIXES, "image") | dict.fromkeys(UNREADABLE, "unreadable") | TABLES
_KINDS |= dict.fromkeys((".json", ".csv", ".jsonl"), "other") | {".npz": "npz"}
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


class DamagedDataError(ValueError):
    """Data are not those that were written."""


def check_files(files: Sequence[str]) -> None:
    """Raise DamagedDataError where a file of Arrow's stream format ends early, which pyarrow does not report."""
    for file in files:
        with pa.memory_map(file) as data:
            for _ in pa.ipc.open_stream(data):
                pass
            if data.tell() != data.size():
                raise DamagedDataError(f"{file} is damaged: it ends at byte {data.tell()} of {data.size()}; restore it")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of ``datasets`` in log files, where every redraw is a line."""
    if sys.stderr.isatty() or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def open_path(path: Path, name: str | None = None, *, streaming: bool = False) -> Any:
    """Open a file or a folder as a Dataset or a DatasetDict; Parquet, Arrow and tars as streams if ``streaming``."""
    suffix = path.suffix.lower()
    if path.is_file() and suffix in TABLES:
        return datasets.load_dataset(TABLES[suffix].lower(), data_files=[_literal(path)], streaming=streaming)
    if path.is_file() and suffix == ".npz":
        return open_npz([path])
    if not path.is_dir():
        kind = "a single image" if suffix in SUFFIXES | UNREADABLE else "no Parquet file, Arrow file or WebDataset tar"
        raise ValueError(f"{shown(path)} is {kind}; give the folder that holds your images, as JPEG or PNG")
    files: dict[str, list[Path]] = defaultdict(list)
    for file in list_files(path, _KINDS):
        files[_KINDS[file.suffix.lower()]].append(file)
    others, unreadable, archives = (files.pop(kind, []) for kind in ("other", "unreadable", "npz"))
    names = {(file.parent, file.name) for file in others}
    if saved := {
        place for place, name in names if name == "dataset_dict.json"
        or (name == "state.json" and (place, "dataset_info.json") in names)
    }:  # fmt: skip
        if left := [file for group in files.values() for file in group if not saved & set(file.parents)]:
            rank_zero_warn(f"{shown(path)} holds datasets written by save_to_disk, and {_listed(left)}, left out")
        return _open_saved(path, saved)
    if files.keys() & {"image", "WebDataset"}:  # next to which Parquet may hold metadata, by img2dataset for each tar
        tables = files.pop("Parquet", [])
        others += (about := [file for file in tables if _describes(path / file)])
        files |= {"Parquet": tables} if len(about) < len(tables) else {}
    suffixes = _listed({file.suffix.lower() for file in unreadable})
    problem = f"{counted(len(unreadable), 'image')} in formats that are not read ({suffixes})"
    if len(files) > 1:
        counts = " and ".join(counted(len(paths), f"{kind} file") for kind, paths in files.items())
        raise ValueError(f"{shown(path)} holds {counts}; give a folder of one kind")
    if "image" in files:
        if unreadable:
            rank_zero_warn(f"{shown(path)} also holds {problem}, left out; convert them to JPEG or PNG")
        return open_image_folder(path, files["image"], [file for file in others if file.name in _METADATA])
    if files:
        return _open_tables(path, next(iter(files.values())), name, streaming)
    if archives:
        return open_npz([path / file for file in archives])
    if unreadable:
        raise ValueError(f"{shown(path)} holds {problem}; convert them to JPEG or PNG")
    kinds = "Parquet, Arrow or WebDataset (.tar) files, and no dataset written by save_to_disk, at any depth"
    raise ValueError(f"{shown(path)} holds no images ({' '.join(sorted(SUFFIXES))}), no {kinds}")


def _open_saved(path: Path, saved: set[Path]) -> Any:
    """What ``save_to_disk`` wrote into ``path``, or into folders of it that are named after splits."""
    _literal(path)
    tops = {place for place in saved if not saved & set(place.parents)}  # those within are splits of a DatasetDict
    check_files([str(file) for place in saved for file in (path / place).glob("data-*.arrow")])
    if len(tops) == 1:
        return datasets.load_from_disk(str(path / tops.pop()))
    splits = splits_of({place.as_posix() for place in tops}, path)
    parts = {split: datasets.load_from_disk(str(path / place)) for place, split in splits.items()}
    if not parts or any(isinstance(part, datasets.DatasetDict) for part in parts.values()):
        raise ValueError(f"{shown(path)} holds several datasets written by save_to_disk ({_listed(tops)}); give one")
    return datasets.DatasetDict(parts)


def _open_tables(path: Path, files: list[Path], name: str | None, streaming: bool) -> Any:
    """Every one of the files, in splits by the words in their names; or those that the card in README.md names."""
    card = path / "README.md"
    if name is not None or (card.is_file() and _CARD.search(card.read_text("utf-8", "replace"))):
        if _literal(path) != str(path.absolute()):
            raise ValueError(f"datasets reads {shown(path)} as a pattern, because of *, ? or [ in it; rename it")
        read = datasets.load_dataset_builder(str(path), name).config.data_files or {}
        names = {os.path.realpath(file) for files in read.values() for file in files}
        if name is None and (left := [file for file in files if os.path.realpath(path / file) not in names]):
            rank_zero_warn(f"{shown(card)} leaves out {_listed(left)}")
        return datasets.load_dataset(str(path), name, streaming=streaming)
    shards = [_SHARD.fullmatch(file.stem) for file in files]
    if all(shards) and len({shard[1] for shard in shards if shard}) > 1:
        splits = {file: shard[1] for file, shard in zip(files, shards, strict=True) if shard}
    else:
        words = {file: _read_name(file.with_suffix("").as_posix())[0] for file in files}
        others = [file for file, named in words.items() if len(named) != 1]
        if others and set().union(*words.values()) - {"train"}:
            text = f"{shown(path)} has files named after splits ({_listed(words.keys() - set(others)) or 'none'})"
            cure = "name every file after its split, as train-0.parquet, or move it away"
            raise ValueError(f"{text} and others ({_listed(others)}); {cure}")
        splits = {file: min(named, default="train") for file, named in words.items()}
    data_files: dict[str, list[str]] = defaultdict(list)
    for file, split in splits.items():
        data_files[split].append(_literal(path / file))
    return datasets.load_dataset(TABLES[files[0].suffix.lower()].lower(), data_files=data_files, streaming=streaming)


def _literal(path: Path) -> str:
    """A path for ``datasets``, which takes it as a pattern, expands variables and opens chains of file systems."""
    text = str(path.absolute())
    if "::" in text or os.path.expandvars(text) != text or not _is_utf8(text):
        raise ValueError(f"datasets cannot read {shown(path)}: '::', '$' and bytes that are not UTF-8; rename it")
    return glob.escape(text)


def _is_utf8(text: str) -> bool:
    return text.encode("utf-8", "replace").decode() == text


def _describes(table: Path) -> bool:
    """Whether a Parquet file is about images in a tar or a folder of its name, or in its folder."""
    return table.name in _METADATA or table.with_suffix(".tar").is_file() or table.with_suffix("").is_dir()


def _listed(names: Collection[object]) -> str:
    texts = sorted(shown(name) for name in names)
    return ", ".join(texts[:5]) + (f" and {len(texts) - 5} more" if len(texts) > 5 else "")


def _read_name(name: str) -> tuple[set[str], str]:
    """The splits that words of a name mean, and the words that mean something else."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()
    return {SPLIT_NAMES[word] for word in _SPLIT.findall(words)}, _NOTHING.sub("", _SPLIT.sub(" ", words))


def splits_of(names: Collection[str], folder: Path, loose: Collection[str] = ()) -> dict[str, str]:
    """Which split each folder's name means (``training_set``, ``val2017``); empty where they are not names of splits.

    ``seg_train`` and ``seg_test`` are such names because they differ in that word only.
    """
    read = {name: (min(named), rest) for name in names for named, rest in [_read_name(name)] if len(named) == 1}
    groups = defaultdict(set)
    for split, rest in read.values():
        groups[rest].add(split)
    named = sorted(name for name, (_, rest) in read.items() if not rest or len(groups[rest]) > 1)
    others = [*loose, *(f"{name}/" for name in set(names) - set(named))]
    if named and others:
        text = f"{shown(folder)} has folders named after splits ({_listed(named)}) and others ({_listed(others)})"
        cure = f"if {named[0]} is a split, move the others into train/, or away; if it is a class, rename it"
        raise ValueError(f"{text}; {cure}")
    if others and len(read) == len(names) > 1 and not loose:
        cure = "name splits train, validation and test, and classes without these words, or give a DatasetDict"
        raise ValueError(f"the folders of {shown(folder)} ({_listed(names)}) may be splits or classes; {cure}")
    splits = {name: read[name][0] for name in named}
    if len(set(splits.values())) < len(splits):
        raise ValueError(f"{shown(folder)} has several folders for one split ({_listed(named)}); merge them")
    return splits


def list_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Visible files below ``folder`` with one of ``suffixes``, relative and sorted.

    Links are followed, but no folder is read twice, so a link to a parent folder does not multiply the files.
    """
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [folder], list[Path]()
    while folders or links:  # links last: a folder also reached without one keeps its own name, so its class
        place = folders.pop() if folders else links.pop(0)
        status = place.stat()
        visible = [] if (status.st_dev, status.st_ino) in seen else list(os.scandir(place))
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(visible, key=lambda entry: entry.name):
            path = place / entry.name
            if entry.is_dir() and not entry.name.startswith("."):
                (links if entry.is_symlink() else folders).append(path)
            elif path.suffix.lower() in suffixes and not entry.name.startswith("."):
                files.append(path.relative_to(folder))
    return sorted(files)


def open_image_folder(folder: Path, files: list[Path], metadata: Collection[Path] = ()) -> datasets.DatasetDict:
    """Read the layout of a folder of images; the files stay where they are.

    ``<split>/<class>/...``, ``<class>/...``, ``<split>/...`` and loose files are understood. Sub-folders are splits
    where all of their names are those of splits (:func:`splits_of`). Below that, the first folders are classes where
    every image of a split is in one and there are two or more. A split that metadata files describe has the images
    that they name, and their columns.
    """
    rows, base = _read_metadata(folder, metadata), Path()
    if unknown := rows and rows.keys() - {os.path.normpath(folder / path) for path in files}:
        raise ValueError(f"a metadata file of {shown(folder)} names {shown(min(unknown))}, but there is no such image")
    below = {path: path for path in files}  # what of each path may be splits and classes
    while True:
        top = {path.parts[0] for path in below.values() if len(path.parts) > 1}
        loose = {path.name for path in below.values() if len(path.parts) == 1}
        named = splits_of(top, folder / base, loose)
        if named or loose or len(top) != 1:
            break
        base /= top.pop()  # one folder around everything
        below = {path: inner.relative_to(inner.parts[0]) for path, inner in below.items()}
    if not named:
        inside = [_read_name(name) for name in {inner.parts[1] for inner in below.values() if len(inner.parts) > 2}]
        if {"train"} < set().union(*(named for named, rest in inside if len(named) == 1 and not rest)):
            cure = "put the splits outermost, as in train/cat/, or its test images would be trained on"
            raise ValueError(f"{shown(folder)} has splits inside other folders ({_listed(top)}); {cure}")
        return _to_datasets(folder, {"train": list(below.items())}, rows)
    splits = defaultdict(list)
    for path, inner in below.items():
        first, rest = inner.parts[0], inner.relative_to(inner.parts[0])
        again = len(rest.parts) > 2 and _read_name(rest.parts[0]) == _read_name(first)  # train/train/cat/
        splits[named[first]].append((path, rest.relative_to(rest.parts[0]) if again else rest))
    return _to_datasets(folder, splits, rows)


def _to_datasets(
    folder: Path, splits: dict[str, list[tuple[Path, Path]]], rows: dict[str, list[dict[str, Any]]]
) -> datasets.DatasetDict:
    # A split of loose files has no labels, as the test images of many competitions; the others keep theirs.
    labeled = {split for split, paths in splits.items() if all(len(below.parts) > 1 for _, below in paths)}
    classes = {below.parts[0] for split in labeled for _, below in splits[split]}
    result = datasets.DatasetDict()
    for split, paths in splits.items():
        files = {folder / path: below.parts[0] for path, below in paths}
        described = [(path, row) for path in files for row in rows.get(os.path.normpath(path), [])]
        images = described or [(path, {}) for path in files]
        if left := files.keys() - {path for path, _ in images}:
            rank_zero_warn(f"left out {counted(len(left), 'image')} without metadata, such as {shown(min(left))}")
        names = dict.fromkeys(name for _, row in images for name in row)
        columns: dict[str, list[Any]] = {name: [row.get(name) for _, row in images] for name in names}
        try:
            features = datasets.Dataset.from_dict(columns).features
        except Exception as error:  # of pyarrow, several
            raise ValueError(f"the metadata of {shown(folder)} mixes types in a column: {shown(error)}") from error
        # A dataset holds UTF-8 only, an address escapes other bytes.
        columns["image"] = [str(path) if _is_utf8(str(path)) else path.absolute().as_uri() for path, _ in images]
        features["image"] = datasets.Image(decode=False)
        if split in labeled and len(classes) > 1 and not names.keys() & set(LABEL_NAMES):
            columns["label"] = [shown(files[path]) for path, _ in images]
            features["label"] = datasets.ClassLabel(names=sorted(set(columns["label"])))
        result[split] = datasets.Dataset.from_dict(columns, features=features)
    return result


def _read_metadata(folder: Path, files: Collection[Path]) -> dict[str, list[dict[str, Any]]]:
    """The rows of metadata files, without their file names, by the path of the image."""
    result: dict[str, list[dict[str, Any]]] = defaultdict(list)
    kinds = {".csv": "csv", ".jsonl": "json", ".parquet": "parquet"}
    for path in (folder / file for file in files):
        # In a CSV file, None may be a class.
        options: dict[str, Any] = {"keep_default_na": False, "na_values": [""]} if path.suffix == ".csv" else {}
        try:
            rows = datasets.load_dataset(kinds[path.suffix], data_files=[_literal(path)], split="train", **options)
        except Exception as error:  # wraps those of pandas and pyarrow
            reason = shown(error.__cause__ or error)
            raise ValueError(f"{shown(path)} cannot be read: {reason}; repair or rename it") from error
        key = next((name for name in ("file_name", *rows.column_names) if name.endswith("file_name")), "")
        if key not in rows.column_names:
            rank_zero_warn(f"{shown(path)} is left out: its columns {_listed(rows.column_names)} have no file_name")
            continue
        for row in rows.to_list():
            result[os.path.normpath(path.parent / str(row.pop(key)))].append(row)
    return result
