"""See to it that the processes of a run go on from the same checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer


class SameCheckpoint(Callback):
    """Stop where the processes of a run would go on from different checkpoints, before any of them is opened.

    Each process looks for itself, before they can talk to each other; where machines see different files, they would
    train from different weights, or wait for each other without end.

    Args:
        path: What this process goes on from; None to start anew.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = path

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Compare.

        Raises:
            ValueError: They differ.
        """
        if trainer.world_size == 1 or not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return
        found: list[str | None] = [None] * trainer.world_size
        torch.distributed.all_gather_object(found, None if self.path is None else str(self.path))
        if len(set(found)) > 1:
            told = ", ".join(f"process {rank} {name or 'none'}" for rank, name in enumerate(found))
            raise ValueError(
                f"the processes do not see the same checkpoints ({told}): all machines need the run's folder on a file "
                "system that they share; where they do, start again, for one of them may have looked too early"
            )
