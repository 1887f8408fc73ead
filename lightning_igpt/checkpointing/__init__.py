"""Checkpoint files: how they are written, so that they are whole or absent, and which one a run goes on from."""

from lightning_igpt.checkpointing.atomic import AtomicCheckpointIO
from lightning_igpt.checkpointing.complete import check_complete, is_complete, standing
from lightning_igpt.checkpointing.consolidate import consolidate_checkpoint
from lightning_igpt.checkpointing.resume import check_resumable, find_checkpoint
from lightning_igpt.checkpointing.sharded import (
    AtomicFSDPStrategy,
    AtomicModelParallelStrategy,
    finish_swaps,
    with_whole_shards,
)

__all__ = [
    "AtomicCheckpointIO",
    "AtomicFSDPStrategy",
    "AtomicModelParallelStrategy",
    "check_complete",
    "check_resumable",
    "consolidate_checkpoint",
    "find_checkpoint",
    "finish_swaps",
    "is_complete",
    "standing",
    "with_whole_shards",
]
