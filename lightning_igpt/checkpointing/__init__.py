"""Checkpoint files: how they are written, so that they are whole or absent, and which one a run goes on from."""

from lightning_igpt.checkpointing.atomic import AtomicCheckpointIO
from lightning_igpt.checkpointing.resume import find_checkpoint

__all__ = ["AtomicCheckpointIO", "find_checkpoint"]
