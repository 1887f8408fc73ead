"""A local folder of image files as splits and labels, by the names of its sub-folders.

``datasets`` has a loader for this too. It takes any folder or file called "train" or "test" for a split, also where
that is a class, and then leaves the other images out without a word; so the folder is read here.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path

import datasets
from lightning.pytorch.utilities import rank_zero_warn

from lightning_igpt.images import SUFFIXES

# Folder names that mean a split, and what the split is called: one of the names ``splits.py`` looks for.
SPLIT_NAMES = {name: name for name in ("train", "validation", "valid", "val", "dev", "test")} | {
    "training": "train",
    "eval": "validation",
    "evaluation": "validation",
    "testing": "test",
}
UNREADABLE = frozenset(
    {".heic", ".heif", ".avif", ".jp2", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".raw", ".psd", ".svg"}
)


def list_files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """Files below ``folder`` with one of ``suffixes``, relative to it and sorted; hidden ones are left out.

    Links are followed, but no folder is read twice, so a link to a folder above does not multiply the files.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    starts = [folder]
    for start in starts:  # links join at the end: a folder also reached without one keeps its own name, so its class
        for place, folders, files in os.walk(start):
            status = Path(place).stat()
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            starts += [Path(place, name) for name in folders if Path(place, name).is_symlink()]
            found += [
                Path(place, name).relative_to(folder)
                for name in files
                if not name.startswith(".") and Path(name).suffix.lower() in suffixes
            ]
    return sorted(found)


def open_image_folder(folder: Path, files: list[Path] | None = None) -> datasets.DatasetDict:
    """Read the layout of a folder of images; the files stay where they are.

    ``<split>/<class>/...``, ``<class>/...``, ``<split>/...`` and loose files are understood. Sub-folders are splits
    where all of them are called ``train`` (``training``), ``validation`` (``valid``, ``val``, ``dev``; ``eval`` and
    ``evaluation`` become ``validation``) or ``test`` (``testing``), in any case. Below that, the first folders are
    classes where every image of a split is in one and there are two or more. Warns of images in formats that are not
    read.

    Args:
        folder: The folder.
        files: Its images, as ``list_files`` gives them.

    Raises:
        ValueError: A sub-folder is named after a split and other images are beside it, two name the same split, or
            splits lie inside other folders.
    """
    unreadable = Counter(path.suffix.lower() for path in list_files(folder, UNREADABLE))
    if unreadable:
        rank_zero_warn(
            f"{folder} also holds {unreadable.total()} images in formats that are not read "
            f"({', '.join(sorted(unreadable))}); they are left out. Convert them to JPEG or PNG to use them"
        )
    return _read_layout(folder, list_files(folder, SUFFIXES) if files is None else files)


def _read_layout(folder: Path, files: list[Path]) -> datasets.DatasetDict:
    top = {path.parts[0] if len(path.parts) > 1 else "" for path in files}
    named = sorted(name for name in top if name.lower() in SPLIT_NAMES)
    if len(top) == 1 and "" not in top and not named:  # one folder around everything
        lone = top.pop()
        return _read_layout(folder / lone, [path.relative_to(lone) for path in files])
    if not named:
        _check_no_inner_splits(folder, files)
        return _to_datasets(folder, {"train": [(path, path) for path in files]})
    _check_split_folders(folder, named, files)
    splits = defaultdict(list)
    for path in files:
        splits[SPLIT_NAMES[path.parts[0].lower()]].append((path, path.relative_to(path.parts[0])))
    return _to_datasets(folder, splits)


def _check_no_inner_splits(folder: Path, files: list[Path]) -> None:
    inner = {SPLIT_NAMES.get(path.parts[1].lower()) for path in files if len(path.parts) > 2}
    if "train" in inner and len(inner - {None}) > 1:
        example = next(path for path in files if len(path.parts) > 2 and path.parts[1].lower() in SPLIT_NAMES)
        raise ValueError(
            f"{folder} has splits inside other folders ({example}); put the splits outermost, as in "
            f"{example.parts[1]}/{example.parts[0]}/, or its test images would be trained on"
        )


def _check_split_folders(folder: Path, named: list[str], files: list[Path]) -> None:
    others = sorted({path.parts[0] + "/" * (len(path.parts) > 1) for path in files if path.parts[0] not in named})
    if others:
        shown = ", ".join(others[:5]) + (f" and {len(others) - 5} more" if len(others) > 5 else "")
        raise ValueError(
            f"{folder} has folders named after splits ({', '.join(named)}) and other images beside them ({shown}). "
            f"Where {named[0]} is a split, move the other images into train/, or away; where it is a class, rename it "
            "or give a DatasetDict"
        )
    for split, count in Counter(SPLIT_NAMES[name.lower()] for name in named).items():
        if count > 1:
            same = [name for name in named if SPLIT_NAMES[name.lower()] == split]
            raise ValueError(f"{folder} has {count} folders for the split {split!r} ({', '.join(same)}); merge them")


def _to_datasets(folder: Path, splits: dict[str, list[tuple[Path, Path]]]) -> datasets.DatasetDict:
    # A split of loose files has no labels, as the test images of many competitions; the others keep theirs.
    labelled = {split for split, paths in splits.items() if all(len(below.parts) > 1 for _, below in paths)}
    classes = {below.parts[0] for split in labelled for _, below in splits[split]}
    result = datasets.DatasetDict()
    for split, paths in splits.items():
        columns = {"image": [str(folder / path) for path, _ in paths]}
        features = datasets.Features({"image": datasets.Image(decode=False)})
        if split in labelled and len(classes) > 1:
            columns["label"] = [below.parts[0] for _, below in paths]
            features["label"] = datasets.ClassLabel(names=sorted(set(columns["label"])))
        result[split] = datasets.Dataset.from_dict(columns, features=features)
    return result
