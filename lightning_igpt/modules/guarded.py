"""A LightningModule whose checkpoints never run code, whatever trainer, strategy or call opens them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule

from lightning_igpt.weights.safety import check_opens_safely

Guarded = TypeVar("Guarded", bound="GuardedModule")
if TYPE_CHECKING:
    class_only = classmethod
else:  # Lightning's decorator, which has a private name; calling its method on an instance would load nothing into it
    class_only = type(vars(LightningModule)["load_from_checkpoint"])


class GuardedModule(LightningModule):
    """Checks checkpoints before Lightning opens them.

    A subclass with a ``setup`` of its own calls this one. An explicit ``weights_only=False`` is respected: it is the
    word of who wrote the program, not of who made the file. Lightning 2.6 does not pass that word on to DeepSpeed's,
    FSDP's and ModelParallel's strategies; there an attribute says it: ``strategy.weights_only = False``.
    """

    def setup(self, stage: str) -> None:
        guard_loading(self.trainer.strategy)

    @class_only
    def load_from_checkpoint(
        cls: type[Guarded],
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Guarded:
        """As Lightning's, but addresses, which it would open with plain pickle, are refused.

        Raises:
            ValueError: Opening the checkpoint could run code, or it is damaged.
        """
        if weights_only is None:
            weights_only = True
            if isinstance(checkpoint_path, str | Path):
                check_opens_safely(checkpoint_path)
                _check_is_file(checkpoint_path)
        return super().load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict, weights_only=weights_only, **kwargs
        )


def _check_is_file(path: str | Path) -> None:
    if Path(path).is_dir():
        raise ValueError(
            f"{path} is a folder of shards, and load_from_checkpoint takes files: use pretrained= for its weights, "
            f"ckpt_path= to go on with the run, or lightning-igpt convert {path} FILE.ckpt --to lightning"
        )


def guard_loading(strategy: Any) -> None:
    """Let a trainer's strategy check each checkpoint before it opens it, from now on."""
    load = strategy.load_checkpoint
    if not (isinstance(load, partial) and load.func is _load_checked):
        strategy.load_checkpoint = partial(_load_checked, strategy, load)  # a partial can be sent to other processes


def _load_checked(strategy: Any, load: Any, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
    """A moment lies between check and loading: check_opens_safely says whom it keeps out, and whom not."""
    if weights_only is None:
        weights_only = getattr(strategy, "weights_only", None)
    if weights_only is not False:
        weights_only = True
        if _needs_check(strategy):
            check_opens_safely(checkpoint_path)
            _check_joins(strategy, checkpoint_path)
    return load(checkpoint_path, weights_only=weights_only)


def _needs_check(strategy: Any) -> bool:
    if strategy.restore_checkpoint_after_setup:  # FSDP and its like open files themselves
        return not getattr(strategy, "checks_checkpoints", False)  # those of lightning_igpt.checkpointing do
    return isinstance(_reader(strategy), TorchCheckpointIO)  # another one may keep a format of its own


def _check_joins(strategy: Any, path: Any) -> None:
    """Raise where a strategy that shards nothing would be given a folder of shards and cannot read it."""
    whole = not strategy.restore_checkpoint_after_setup
    if whole and Path(path).is_dir() and not getattr(_reader(strategy), "joins_shards", False):
        raise ValueError(
            f"{path} is a folder of shards, which {type(strategy).__name__} cannot join by itself: use make_trainer, "
            "give the Trainer plugins=AtomicCheckpointIO() of lightning_igpt.checkpointing, or make one file of it: "
            f"lightning-igpt convert {path} FILE.ckpt --to lightning"
        )


def _reader(strategy: Any) -> Any:
    io = strategy.checkpoint_io
    while (inner := getattr(io, "checkpoint_io", None)) is not None:  # such as AsyncCheckpointIO
        io = inner
    return io
