"""Sharded checkpoints, which are folders with a file for every process, that are whole or absent.

Lightning 2.6 writes them in place: the list of tensors of the older checkpoint stays until the new one's is there, and
Lightning's own state comes after both, so that a kill can leave a folder that opens, with parts of two steps in it.
Here a save goes into a folder of its own, ``.NAME.shards.tmp``. Once all of it is on the disk it gets a mark,
``COMPLETE.json``; then the old folder is renamed to ``.NAME.shards.old``, the new one takes its place, and the old one
is removed. At every moment one of the three is whole, and loading finds it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.model_parallel import _load_checkpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy, StrategyRegistry
from lightning.pytorch.strategies.parallel import ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from lightning_igpt.checkpointing.atomic import AtomicCheckpointIO, sync_folder
from lightning_igpt.checkpointing.complete import ASIDE, MARK, TEMPORARY, beside, sha256_of, standing
from lightning_igpt.checkpointing.shard_safety import EXTRA, INDEX, check_opens_safely, check_shards
from lightning_igpt.checkpointing.shards import ShardsFile, is_shards
from lightning_igpt.checkpointing.spread import read_whole, spread_flat, spread_fully_sharded

log = logging.getLogger(__name__)


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
            place = Path(self.broadcast(filepath))
            if is_shards(place) and isinstance(self.checkpoint_io, AtomicCheckpointIO):
                Strategy.save_checkpoint(self, checkpoint, place, storage_options)  # FSDP's removes the folder first
            else:
                super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        from torch.distributed.checkpoint.api import CheckpointException  # some builds of torch have none

        target = Path(self.broadcast(filepath))
        temporary = beside(target, TEMPORARY)
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
        path = Path(standing(self.broadcast(checkpoint_path)))
        trusted = weights_only is False
        if path.is_dir() and trusted:
            checkpoint = super().load_checkpoint(path, weights_only=False)
        elif path.is_dir():
            checkpoint = self._load_shards(path, self._checked(path).key)
        else:
            if not trusted:
                check_opens_safely(path)
            checkpoint = read_whole(path, len(self._trained), trusted)
            self._spread(checkpoint)
        if self._trained:
            # Lightning would not show the module's hooks what shards say of learning rates and the like.
            checkpoint["optimizer_states"] = [
                {"state": {}, "param_groups": [_settings(group) for group in optimizer.param_groups]}
                for optimizer in self._trained
            ]
        return checkpoint

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: load_optimizer_state_dict takes the settings, which the module may have changed."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take the settings of the optimisers; load_checkpoint has loaded their moments already."""
        for optimizer, state in zip(self._trained, checkpoint["optimizer_states"], strict=True):
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group.update(_settings(saved))

    @property
    def _trained(self) -> list[torch.optim.Optimizer]:
        module = self.lightning_module
        fitting = module is not None and module.trainer.state.fn == TrainerFn.FITTING
        return list(self.optimizers) if fitting else []

    def _target(self) -> tuple[Any, list[torch.optim.Optimizer], bool]:
        """What a checkpoint is loaded into: module and optimisers; and whether its names must be the module's."""
        module: Any = self.lightning_module
        return self.model, self._trained, module.strict_loading

    def _checked(self, folder: Path) -> ShardsFile:
        """The shards, once each process has compared its share of them with its checksums."""
        problem: Exception | None = None
        try:
            shards, wanted = ShardsFile(folder), len(self._trained)
            if wanted not in (0, shards.n_optimizers):
                raise ValueError(
                    f"{folder} holds the states of {shards.n_optimizers} optimisers, but the run has {wanted}; start a "
                    "new run from its weights with pretrained="
                )
            shards.check_intact(self.global_rank, self.world_size)
        except Exception as error:  # whatever it is, the other processes must hear of it
            problem = error
        if not self.reduce_boolean_decision(problem is None):
            raise problem or ValueError(f"{folder} cannot be loaded, as another process found")
        return shards

    def _load_shards(self, folder: Path, key: str) -> dict[str, Any]:
        """Load weights and optimisers from a folder that calls the module's part ``key``; return what else it holds."""
        return super().load_checkpoint(folder, weights_only=True)

    def _spread(self, checkpoint: dict[str, Any]) -> None:
        """Load weights and optimisers from the checkpoint of a file."""
        raise NotImplementedError

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
    """Lightning's FSDPStrategy, whose checkpoints with ``state_dict_type="sharded"`` are whole or absent.

    It loads files of every strategy of Lightning's but DeepSpeed's, and folders of its own kind.
    """

    def _load_shards(self, folder: Path, key: str) -> dict[str, Any]:
        if key != "model":
            raise ValueError(
                f"{folder} was not saved by FSDPStrategy, which cannot load it; make one file of it first: "
                f"lightning-igpt convert {folder} FILE.ckpt --to lightning"
            )
        return super()._load_shards(folder, key)

    def _spread(self, checkpoint: dict[str, Any]) -> None:
        spread_flat(*self._target(), checkpoint, self.world_size)


class AtomicModelParallelStrategy(WholeShards, ModelParallelStrategy):
    """Lightning's ModelParallelStrategy, whose checkpoints are whole or absent.

    It loads the folders and files of every strategy of Lightning's but DeepSpeed's, whatever the number of processes.
    """

    def _load_shards(self, folder: Path, key: str) -> dict[str, Any]:
        optimizers = {f"optimizer_{number}": optimizer for number, optimizer in enumerate(self._trained)}
        module, _, strict = self._target()
        return _load_checkpoint(folder, {key: module, **optimizers}, strict=strict, weights_only=True)

    def _spread(self, checkpoint: dict[str, Any]) -> None:
        spread_fully_sharded(*self._target(), checkpoint)


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


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def saves_folders(strategy: Strategy) -> bool:
    """Whether a strategy was told to save sharded checkpoints."""
    asked = getattr(strategy, "_state_dict_type", None), getattr(strategy, "_save_distributed_checkpoint", None)
    return asked[0] == "sharded" or asked[1] is True


def finish_swaps(folder: str | Path) -> None:
    """Put right what a kill in mid-save left: what is whole gets its name back, parts are removed.

    One process calls it, before it looks for the newest checkpoint, while no other program saves to the folder.

    Args:
        folder: Where checkpoints lie. It need not exist.
    """
    for suffix in (TEMPORARY, ASIDE):
        for path in sorted(Path(folder).glob(f".*{suffix}")):
            _finish_swap(path.with_name(path.name[1 : -len(suffix)]))


def _make_room(target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    _finish_swap(target)


def _finish_swap(target: Path) -> None:
    temporary, aside = beside(target, TEMPORARY), beside(target, ASIDE)
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
    aside = beside(target, ASIDE)
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
        "sha256": {name: sha256_of(folder / name) for name in (INDEX, EXTRA)},
    }
    (folder / MARK).write_text(json.dumps(content, indent=1), encoding="utf-8")
    for name in (*names, MARK):
        with (folder / name).open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
