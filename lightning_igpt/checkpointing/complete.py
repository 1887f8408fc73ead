"""Whether a folder of shards is a whole checkpoint, and where it lies after a kill.

Not here: how one is written (``checkpointing/sharded.py``), and what is read from it (``shards.py``).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from lightning_igpt.checkpointing.shard_safety import EXTRA, INDEX, check_opens_safely
from lightning_igpt.weights.safety import read_json

log = logging.getLogger(__name__)

MARK = "COMPLETE.json"
TEMPORARY, ASIDE = ".shards.tmp", ".shards.old"


def is_complete(folder: str | Path) -> bool:
    """Whether a folder is a whole sharded checkpoint; see check_complete."""
    try:
        check_complete(folder)
    except (ValueError, OSError):
        return False
    return True


def check_complete(folder: str | Path) -> None:
    """Raise unless a folder is a whole sharded checkpoint.

    Every file that its mark names must be there with its size, and the small ones with their hash. A folder without
    a mark was written by Lightning's own strategy: it is accepted, with a warning, where its list of tensors and its
    other state open and no shard is missing or short. That cannot tell a whole one from one in which a kill mixed two
    steps.

    Raises:
        ValueError: Something is missing or differs; the message names it.
        OSError: Something cannot be read.
    """
    folder = Path(folder)
    if (folder / MARK).is_file():
        _check_mark(folder)
        return
    check_opens_safely(folder)
    log.warning("%s has no %s: nothing tells whether a save over an older checkpoint came to its end", folder, MARK)


def standing(path: str | Path) -> str | Path:
    """Where the checkpoint ``path`` lies: there, or beside it where a kill came between two renames."""
    target = Path(path)
    if os.path.lexists(target):
        return path
    temporary, aside = beside(target, TEMPORARY), beside(target, ASIDE)
    return temporary if _is_marked(temporary) else aside if aside.exists() else path


def beside(target: Path, suffix: str) -> Path:
    """The other name of a checkpoint while it is exchanged."""
    return target.with_name(f".{target.name}{suffix}")


def checkpoints_among(places: Iterable[Path]) -> list[Path]:
    """The checkpoints among files and folders, by the names that they were saved under.

    Names with a dot are unfinished saves, and links may lead nowhere. Where a kill came between two renames, a folder
    of shards has another name for the moment.
    """
    places = list(places)
    named = [path for path in places if path.suffix == ".ckpt" and not path.name.startswith(".")]
    hidden = [path for path in places if path.name.startswith(".") and ".ckpt.shards." in path.name]
    named += [path.with_name(path.name[1:].split(".shards.")[0]) for path in hidden]
    return [path for path in dict.fromkeys(named) if Path(standing(path)).exists()]


def sha256_of(path: Path) -> str:
    """The hash of a small file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_mark(folder: Path) -> None:
    mark = read_json(folder / MARK)
    files, sums = mark.get("files"), mark.get("sha256")
    if not isinstance(files, dict) or not isinstance(sums, dict) or not {INDEX, EXTRA} <= files.keys() & sums.keys():
        raise ValueError(f"{folder / MARK} does not say which files belong to the checkpoint")
    for name, size in files.items():
        if Path(name).name != name:
            raise ValueError(f"{folder / MARK} leads out of its folder: {name!r}")
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no whole sharded checkpoint: it holds no {name}")
        found = (folder / name).stat().st_size
        if found != size:
            raise ValueError(f"{folder / name} has {found} bytes, but {size} were written")
    for name in (INDEX, EXTRA):
        if sha256_of(folder / name) != sums[name]:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the one in {MARK}")


def _is_marked(folder: Path) -> bool:
    return (folder / MARK).is_file() and is_complete(folder)
