"""Find out before training whether checkpoints can be saved at all."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

log = logging.getLogger(__name__)


class DiskCheck(Callback):
    """Before training, write a small file into every folder where checkpoints will lie, and look at the free space.

    A folder that cannot be written, or a disk without room for one checkpoint beside the one it replaces, stops the run
    before any work is lost. Quotas are seen by the file system only when they are reached.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look.

        Raises:
            OSError: A folder cannot be written, or the disk has not enough room.
        """
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        size = checkpoint_bytes(pl_module)
        kept = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint) and one.save_top_k]
        for folder in sorted({str(one.dirpath) for one in kept if one.dirpath and "://" not in str(one.dirpath)}):
            check_folder(Path(folder), size)


def checkpoint_bytes(module: LightningModule) -> int:
    """Bytes of a checkpoint with Adam's two moments of every trained parameter."""
    trained = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    return 2 * trained + int(sum(value.numel() * value.element_size() for value in module.state_dict().values()))


def check_folder(folder: Path, size: int) -> None:
    """Raise unless a file of ``size`` bytes can be written into a folder, which is made if it does not exist.

    Raises:
        OSError: It cannot be written, or there is not enough room.
    """
    probe = folder / f".written.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"checkpoints will be written here")
    except OSError as error:
        raise OSError(
            error.errno,
            f"nothing can be saved in {folder}: {error.strerror}. Make it writable, or choose another "
            "default_root_dir (or dirpath of ModelCheckpoint)",
        ) from error
    finally:
        _remove(probe)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(
            f"a checkpoint takes about {size:,} bytes, but {folder} has {free:,} free; make room, or choose another "
            "default_root_dir"
        )


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.debug("%s was not removed: %s", path, error)
