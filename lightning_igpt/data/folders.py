"""What a path holds: image files by folder names, Parquet, Arrow, WebDataset shards, or a saved data set.

``datasets`` has a loader for folders of images too. It makes a split of any folder or file called "train" or "test",
also where that is a class, and then leaves the other images out silently; so such folders are read here.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import datasets
from lightning.pytorch.utilities import rank_zero_warn

from lightning_igpt.images import SUFFIXES

# Folder names that mean a split, and what the split is called: one of the names ``splits.py`` looks for.
SPLIT_NAMES = {name: name for name in ("train", "validation", "valid", "val", "dev", "test")}
SPLIT_NAMES |= {"training": "train", "eval": "validation", "evaluation": "validation", "testing": "test"}
UNREADABLE = {".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".raw", ".psd", ".svg"}
TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}  # suffix: what ``datasets`` calls it
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


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
    """Open a file or a folder as a Dataset or a DatasetDict; Parquet, Arrow and tars as streams if ``streaming``.

    Raises:
        ValueError: Nothing usable is there; the message says what was looked for.
    """
    if path.is_file():
        return _open_file(path, streaming)
    if any((path / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return datasets.load_from_disk(str(path))
    if any(file.name in _METADATA for file in list_files(path, {".csv", ".jsonl", ".parquet"})):
        return datasets.load_dataset("imagefolder", data_dir=str(path))
    kinds = {"image": SUFFIXES, "Parquet": {".parquet"}, "Arrow": {".arrow"}, "WebDataset": {".tar"}}
    files = {kind: paths for kind, suffixes in kinds.items() if (paths := list_files(path, suffixes))}
    unreadable = list_files(path, UNREADABLE)
    problem = f"{len(unreadable)} images in formats that are not read ({', '.join(sorted(_suffixes(unreadable)))})"
    if len(files) > 1:
        counts = " and ".join(f"{len(paths)} {kind} files" for kind, paths in files.items())
        raise ValueError(f"{path} holds {counts}; give a folder of one kind")
    if "image" in files:
        if unreadable:
            rank_zero_warn(f"{path} also holds {problem}; they are left out. Convert them to JPEG or PNG to use them")
        return open_image_folder(path, files["image"])
    if "Arrow" in files:  # by the folder alone ``datasets`` does not recognize these
        return datasets.load_dataset("arrow", data_dir=str(path), streaming=streaming)
    if files:
        return datasets.load_dataset(str(path), name, streaming=streaming)
    if unreadable:
        raise ValueError(f"{path} holds {problem}; convert them to JPEG or PNG")
    raise ValueError(
        f"{path} holds no images ({' '.join(sorted(SUFFIXES))}), no Parquet, Arrow or WebDataset (.tar) files, and no "
        "data set written by save_to_disk, at any depth"
    )


def _open_file(path: Path, streaming: bool) -> Any:
    suffix = path.suffix.lower()
    if suffix in SUFFIXES | UNREADABLE:
        raise ValueError(f"{path} is a single image; give the folder that holds your images, as JPEG or PNG")
    if suffix not in TABLES:
        raise ValueError(f"{path} is no Parquet file, Arrow file or WebDataset tar; give one, or a folder")
    return datasets.load_dataset(TABLES[suffix], data_files={"train": str(path)}, streaming=streaming)


def _suffixes(files: list[Path]) -> set[str]:
    return {file.suffix.lower() for file in files}


def list_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """Files below ``folder`` with one of ``suffixes``, relative to it and sorted; hidden ones are left out.

    Links are followed, but no folder is read twice, so a link to a parent folder does not multiply the files.
    """
    files: list[Path] = []
    seen: set[tuple[int, int]] = set()
    starts = [folder]
    for start in starts:  # links are appended: a folder also reached without one keeps its own name, so its class
        for place, folders, names in os.walk(start):
            status = Path(place).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            starts += [Path(place, name) for name in folders if Path(place, name).is_symlink()]
            visible = (Path(place, name) for name in names if not name.startswith("."))
            files += [path.relative_to(folder) for path in visible if path.suffix.lower() in suffixes]
    return sorted(files)


def open_image_folder(folder: Path, files: list[Path]) -> datasets.DatasetDict:
    """Read the layout of a folder of images; the files stay where they are.

    ``<split>/<class>/...``, ``<class>/...``, ``<split>/...`` and loose files are understood. Sub-folders are splits
    where all of them are called ``train`` (``training``), ``validation`` (``valid``, ``val``, ``dev``; ``eval`` and
    ``evaluation`` become ``validation``) or ``test`` (``testing``), in any case. Below that, the first folders are
    classes where every image of a split is in one and there are two or more.

    Raises:
        ValueError: Some sub-folders are named after splits and others are not, two name the same split, or splits lie
            inside other folders.
    """
    top = {path.parts[0] if len(path.parts) > 1 else "" for path in files}
    named = sorted(name for name in top if name.lower() in SPLIT_NAMES)
    if len(top) == 1 and "" not in top and not named:  # one folder around everything
        (lone,) = top
        return open_image_folder(folder / lone, [path.relative_to(lone) for path in files])
    if not named:
        inner = {SPLIT_NAMES.get(path.parts[1].lower()): path for path in files if len(path.parts) > 2}
        if "train" in inner and len(inner.keys() - {None}) > 1:
            raise ValueError(
                f"{folder} has splits inside other folders ({inner['train']}); put the splits outermost, as in "
                "train/cat/, or its test images would be trained on"
            )
        return _to_datasets(folder, {"train": [(path, path) for path in files]})
    if others := sorted({path.parts[0] + "/" * (len(path.parts) > 1) for path in files if path.parts[0] not in named}):
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise ValueError(
            f"{folder} has folders named after splits ({', '.join(named)}) and other images next to them ({shown}). "
            f"Where {named[0]} is a split, move the other images into train/, or away; where it is a class, rename it "
            "or give a DatasetDict"
        )
    if len({SPLIT_NAMES[name.lower()] for name in named}) < len(named):
        raise ValueError(f"{folder} has several folders for one split ({', '.join(named)}); merge them")
    splits = defaultdict(list)
    for path in files:
        splits[SPLIT_NAMES[path.parts[0].lower()]].append((path, path.relative_to(path.parts[0])))
    return _to_datasets(folder, splits)


def _to_datasets(folder: Path, splits: dict[str, list[tuple[Path, Path]]]) -> datasets.DatasetDict:
    # A split of loose files has no labels, as the test images of many competitions; the others keep theirs.
    labeled = {split for split, paths in splits.items() if all(len(below.parts) > 1 for _, below in paths)}
    classes = {below.parts[0] for split in labeled for _, below in splits[split]}
    result = datasets.DatasetDict()
    for split, paths in splits.items():
        columns = {"image": [str(folder / path) for path, _ in paths]}
        features = datasets.Features({"image": datasets.Image(decode=False)})
        if split in labeled and len(classes) > 1:
            columns["label"] = [below.parts[0] for _, below in paths]
            features["label"] = datasets.ClassLabel(names=sorted(set(columns["label"])))
        result[split] = datasets.Dataset.from_dict(columns, features=features)
    return result
