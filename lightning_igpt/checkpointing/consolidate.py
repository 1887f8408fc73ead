"""One file from a folder of shards."""

from __future__ import annotations

from pathlib import Path

from lightning_igpt.checkpointing.atomic import AtomicCheckpointIO
from lightning_igpt.checkpointing.complete import standing
from lightning_igpt.checkpointing.shards import is_shards, join_shards


def consolidate_checkpoint(folder: str | Path, file: str | Path) -> None:
    """Make one file of a checkpoint that a sharded run saved as a folder, with all that a run needs to go on from it.

    One process does it, without GPU or torch.distributed, in as much memory as the folder takes on the disk. The file
    is whole or absent, as AtomicCheckpointIO writes it; the folder stays. There is no need of it to resume: every
    strategy of Lightning's but FSDPStrategy loads the folder itself.

    Args:
        folder: What FSDPStrategy or ModelParallelStrategy saved.
        file: Where to; its name ends in ``.ckpt``.

    Raises:
        ValueError: ``folder`` is no folder of shards, is not whole, is damaged, or could run code; or the file's name
            does not end in .ckpt.
        OSError: The file cannot be written.
    """
    place, target = Path(standing(Path(folder).expanduser())), Path(file).expanduser()
    if not is_shards(place):
        raise ValueError(f"{folder} is no folder of shards, as a sharded run saves it; nothing is there to be joined")
    if target.suffix != ".ckpt":
        raise ValueError(f"file is {file}; the name of a checkpoint ends in .ckpt")
    if target.is_dir():
        raise ValueError(f"{file} is a folder; name a file")
    AtomicCheckpointIO().save_checkpoint(join_shards(place), target)
