"""A local folder of image files as splits and labels, by the names of its sub-folders.

``datasets`` has a loader for this too. It takes any folder or file called "train" or "test" for a split, also where
that is a class, and then leaves the other images out without a word; so the folder is read here.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import datasets

from lightning_igpt.data.images import SUFFIXES

SPLIT_NAMES = ("train", "validation", "valid", "val", "dev", "test")


def list_files(folder: Path, suffixes: frozenset[str]) -> list[Path]:
    """Files below ``folder`` with one of ``suffixes``, relative to it and sorted; hidden ones are left out."""
    found = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(place, name).relative_to(folder)
            for name in files
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes
        ]
    return sorted(found)


def open_image_folder(folder: Path, files: list[Path] | None = None) -> datasets.DatasetDict:
    """Read the layout of a folder of images; the files stay where they are.

    ``<split>/<class>/...``, ``<class>/...``, ``<split>/...`` and loose files are understood. Sub-folders are splits
    where all of them are called ``train``, ``validation`` (``valid``, ``val``, ``dev``) or ``test``. Below that, the
    first folders are classes where every image of a split is in one and there are two or more.

    Args:
        folder: The folder.
        files: Its images, as ``list_files`` gives them.

    Raises:
        ValueError: Some sub-folders are named after splits and some are not.
    """
    files = list_files(folder, SUFFIXES) if files is None else files
    top = {path.parts[0] if len(path.parts) > 1 else "" for path in files}
    named = sorted(name for name in top if name.lower() in SPLIT_NAMES)
    if len(top) == 1 and "" not in top and not named:  # one folder around everything
        lone = top.pop()
        return open_image_folder(folder / lone, [path.relative_to(lone) for path in files])
    if len(named) > 1 and len(named) < len(top):
        raise ValueError(
            f"{folder} has sub-folders named after splits ({', '.join(named)}) and other images beside them; "
            "give one of the sub-folders, or move the other images away"
        )
    if len(named) < len(top):
        return _to_datasets(folder, {"train": [(path, path) for path in files]})
    splits = defaultdict(list)
    for path in files:
        splits[path.parts[0].lower()].append((path, path.relative_to(path.parts[0])))
    return _to_datasets(folder, splits)


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
