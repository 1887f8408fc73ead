"""Checkpoint files: how they are written, so that they are whole or absent."""

from lightning_igpt.checkpointing.atomic import AtomicCheckpointIO
from lightning_igpt.checkpointing.sharded import (
    AtomicFSDPStrategy,
    AtomicModelParallelStrategy,
    check_complete,
    finish_swaps,
    is_complete,
    with_whole_shards,
)

__all__ = [
    "AtomicCheckpointIO",
    "AtomicFSDPStrategy",
    "AtomicModelParallelStrategy",
    "check_complete",
    "finish_swaps",
    "is_complete",
    "with_whole_shards",
]
