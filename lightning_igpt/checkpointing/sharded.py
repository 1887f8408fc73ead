"""Sharded checkpoints, which are folders with a file for every process, that are whole or absent.

Lightning 2.6 writes them in place: the list of tensors of the older checkpoint stays until the new one's is there, and
Lightning's own state comes after both, so that a kill can leave a folder that opens, with parts of two steps in it.
Here a save goes into a folder of its own, ``.NAME.shards.tmp``. Once all of it is on the disk it gets a mark,
``COMPLETE.json``; then the old folder is renamed to ``.NAME.shards.old``, the new one takes its place, and the old one
is removed. At every moment one of the three is whole, and loading finds it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.strategies.parallel import ParallelStrategy

from lightning_igpt.checkpointing.atomic import sync_folder
from lightning_igpt.weights.files import read_json
from lightning_igpt.weights.safety import EXTRA, INDEX, check_opens_safely, check_shards

log = logging.getLogger(__name__)

MARK = "COMPLETE.json"
TEMPORARY, ASIDE = ".shards.tmp", ".shards.old"


class WholeShards(ParallelStrategy):
    """Before one of Lightning's strategies in a class's bases, it makes that one's sharded checkpoints whole or absent.

    All processes must see the folder on a file system that they share, as for loading. Checkpoints in one file are
    written as always, through the trainer's CheckpointIO.
    """

    checks_checkpoints = True  # load_checkpoint lets check_opens_safely look first

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint so that ``filepath`` holds either the old folder or the whole new one.

        Raises:
            OSError: The folder cannot be written, here or by another process; the old one is as it was.
            ValueError: What was written cannot be read again, for instance because a callback's state is an object.
        """
        if not saves_folders(self):
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        from torch.distributed.checkpoint.api import CheckpointException  # some builds of torch have none

        target = Path(self.broadcast(filepath))
        temporary = _beside(target, TEMPORARY)
        self._on_first_process(partial(_make_room, target))
        problem: BaseException | None = None
        try:
            super().save_checkpoint(checkpoint, temporary, storage_options)
        except (Exception, CheckpointException) as error:  # torch's is no Exception
            problem = error
        if not self.reduce_boolean_decision(problem is None):  # where one fails alone, the others must not wait for it
            self._on_first_process(partial(_remove, temporary))
            raise problem or OSError(f"{target} is not saved: another process could not write its part")
        self._on_first_process(partial(_put_in_place, temporary, target))

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load a checkpoint that is whole and runs no code.

        Args:
            checkpoint_path: A folder of shards, or a file.
            weights_only: False leaves the checks out.

        Raises:
            ValueError: It is not whole, is damaged, or could run code.
        """
        path = standing(self.broadcast(checkpoint_path))
        if weights_only is not False:
            check_opens_safely(path)
            weights_only = True
            if Path(path).is_dir():
                check_complete(path)
        return super().load_checkpoint(path, weights_only=weights_only)

    def _on_first_process(self, work: Callable[[], None]) -> None:
        """Let the first process work while the others wait; an error there is an error everywhere."""
        problem: Exception | None = None
        if self.is_global_zero:
            try:
                work()
            except Exception as error:
                problem = error
        words = self.broadcast(f"{type(problem).__name__}: {problem}" if problem else None)
        if words is not None:
            raise problem or OSError(f"on the first process: {words}")


class AtomicFSDPStrategy(WholeShards, FSDPStrategy):
    """Lightning's FSDPStrategy, whose checkpoints with ``state_dict_type="sharded"`` are whole or absent."""


class AtomicModelParallelStrategy(WholeShards, ModelParallelStrategy):
    """Lightning's ModelParallelStrategy, whose checkpoints are whole or absent."""


OURS: dict[type[Strategy], type[WholeShards]] = {
    FSDPStrategy: AtomicFSDPStrategy,
    ModelParallelStrategy: AtomicModelParallelStrategy,
}


def with_whole_shards(strategy: str | Strategy, accelerator: Any = "auto") -> str | Strategy:
    """The strategy for a trainer: where a name means one that can write shards, ours with the same settings.

    Args:
        strategy: What ``Trainer`` takes. Other names come back as they are, and so do strategies that were made
            already, with a word in the log where ours would be safer.
        accelerator: What ``Trainer`` takes. Without CUDA, a name comes back as it is: Lightning says what is wrong.
    """
    if isinstance(strategy, str):
        registered = dict(StrategyRegistry).get(strategy.lower(), {})
        has_cuda = accelerator not in ("cpu", "mps", "tpu") and torch.cuda.is_available()
        ours = OURS.get(registered.get("strategy", Strategy)) if has_cuda else None
        return strategy if ours is None else ours(**registered["init_params"])
    ours = OURS.get(type(strategy))
    if ours is not None and saves_folders(strategy):
        log.warning(
            "%s writes sharded checkpoints in place, so that a kill can mix two steps; %s of "
            "lightning_igpt.checkpointing takes the same arguments and does not",
            type(strategy).__name__,
            ours.__name__,
        )
    return strategy


def saves_folders(strategy: Strategy) -> bool:
    """Whether a strategy was told to save sharded checkpoints."""
    asked = getattr(strategy, "_state_dict_type", None), getattr(strategy, "_save_distributed_checkpoint", None)
    return asked[0] == "sharded" or asked[1] is True


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
    temporary, aside = _beside(target, TEMPORARY), _beside(target, ASIDE)
    if os.path.lexists(target):
        return path
    return temporary if _is_marked(temporary) else aside if aside.exists() else path


def finish_swaps(folder: str | Path) -> None:
    """Put right what a kill in mid-save left: what is whole gets its name back, parts are removed.

    One process calls it, before it looks for the newest checkpoint, while no other program saves to the folder.

    Args:
        folder: Where checkpoints lie. It need not exist.
    """
    for suffix in (TEMPORARY, ASIDE):
        for path in sorted(Path(folder).glob(f".*{suffix}")):
            _finish_swap(path.with_name(path.name[1 : -len(suffix)]))


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}{suffix}")


def _make_room(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _finish_swap(target)


def _finish_swap(target: Path) -> None:
    temporary, aside = _beside(target, TEMPORARY), _beside(target, ASIDE)
    found = standing(target)
    if found != target:
        Path(found).rename(target)
        sync_folder(target.parent)
    _remove(temporary)
    _remove(aside)


def _put_in_place(temporary: Path, target: Path) -> None:
    try:
        _mark(temporary)
    except ValueError as error:
        _remove(temporary)
        raise ValueError(f"{target} is not saved, for it could not be loaded again: {error}") from error
    except OSError:
        _remove(temporary)
        raise
    aside = _beside(target, ASIDE)
    if os.path.lexists(target):
        target.rename(aside)
    temporary.rename(target)
    sync_folder(target.parent)
    _remove(aside)


def _mark(folder: Path) -> None:
    """Say in a folder that all of it is on the disk, once it is."""
    names = sorted({INDEX, EXTRA} | {entry.file for entry in check_shards(folder)})
    content = {
        "files": {name: (folder / name).stat().st_size for name in names},
        "sha256": {name: _sha256(folder / name) for name in (INDEX, EXTRA)},
    }
    (folder / MARK).write_text(json.dumps(content, indent=1), encoding="utf-8")
    for name in (*names, MARK):
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


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
        if _sha256(folder / name) != sums[name]:
            raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the one in {MARK}")


def _is_marked(folder: Path) -> bool:
    return (folder / MARK).is_file() and is_complete(folder)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
