"""Put weights and optimiser back to a checkpoint while a run goes on; FiniteGuard's way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_igpt.callbacks.online_probe import OnlineProbe

WHOLE = (SingleDeviceStrategy, DDPStrategy)  # where every process holds all weights, and files go through CheckpointIO


def check_rewind(trainer: Trainer) -> None:
    """Raise where a run could not go back.

    Raises:
        ValueError: Its strategy, checkpoint plugin or callbacks do not allow it.
    """
    strategy, io = trainer.strategy, trainer.strategy.checkpoint_io
    if not isinstance(strategy, WHOLE):
        raise ValueError(f"rewind works on one device and with DDP, not with {type(strategy).__name__}; switch it off")
    if not hasattr(io, "last"):
        raise ValueError(
            f"rewind needs to know the last checkpoint, and {type(io).__name__} does not tell: use make_trainer, or "
            "plugins=AtomicCheckpointIO()"
        )
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(one, (WeightAveraging, StochasticWeightAveraging)):
            raise ValueError(f"rewind does not reach the averages of {type(one).__name__}; use one or the other")


def last_checkpoint(trainer: Trainer) -> tuple[str | Path | None, str]:
    """The last file that was written or resumed from, where that is known, and this in words, on all processes."""
    strategy: Any = trainer.strategy
    last = strategy.broadcast(getattr(strategy.checkpoint_io, "last", None))
    if last is not None:
        return last, f"The last good checkpoint is {last}"
    if isinstance(strategy, WHOLE) and hasattr(strategy.checkpoint_io, "last"):
        return None, "No checkpoint was written so far"
    return None, "The checkpoints that this run wrote are good"


def read(trainer: Trainer, path: str | Path) -> tuple[dict[str, Any], str]:
    """A checkpoint, and what is in the way of going back to it, if anything."""
    try:
        checkpoint = trainer.strategy.checkpoint_io.load_checkpoint(path)
    except Exception as error:  # whatever it is, the other processes must hear of it
        return {}, f"it cannot be read: {error}"
    return checkpoint, "" if "optimizer_states" in checkpoint else "it holds weights alone, without the optimiser"


def put_back(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Take weights and the optimisers' moments from a checkpoint; drop gradients.

    Learning rates and other settings of the optimisers stay as they are, and so do schedules.
    """
    now = (optimizer.state_dict()["param_groups"] for optimizer in trainer.optimizers)
    pairs = zip(checkpoint["optimizer_states"], now, strict=True)
    states = [{**state, "param_groups": groups} for state, groups in pairs]
    trainer.strategy.load_model_state_dict(checkpoint, strict=trainer.lightning_module.strict_loading)
    trainer.strategy.load_optimizer_state_dict({"optimizer_states": states})
    for optimizer in trainer.optimizers:
        optimizer.zero_grad()
    for one in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(one, OnlineProbe):  # it has learned from the features of bad weights
            one.load_state_dict(checkpoint["callbacks"].get(one.state_key, {}))
