"""Checkpoint files: how they are written, so that they are whole or absent."""

from lightning_igpt.checkpointing.atomic import AtomicCheckpointIO

__all__ = ["AtomicCheckpointIO"]
