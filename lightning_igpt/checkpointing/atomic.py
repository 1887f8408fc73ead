"""Checkpoint files that are whole or absent.

Lightning 2.6 writes a checkpoint to the folder for temporary files and moves it from there. Where that folder is on
another file system, a kill during the move destroys the previous checkpoint too.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_igpt.checkpointing.complete import ASIDE, beside, standing
from lightning_igpt.checkpointing.intact import check_intact
from lightning_igpt.checkpointing.shards import is_shards, join_shards

log = logging.getLogger(__name__)

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORGOTTEN = 3600.0  # seconds after which a temporary file of another machine is taken for one of a dead process


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write beside the target, flush to the disk, read back against checksums, then rename; read with the safe loader.

    Folders of shards, which sharded runs save, are loaded too. Temporary files that killed processes left in the folder
    are removed before the first save there. Addresses with a protocol, such as ``s3://``, are written by Lightning's
    own means.

    Attributes:
        last: The file that was last saved or loaded whole by this process.
    """

    last: Path | None = None
    joins_shards = True

    def __init__(self) -> None:
        super().__init__()
        self._cleaned: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint so that ``path`` holds either the old file or the whole new one.

        Raises:
            OSError: The folder cannot be written, the disk is full, or it gives back other bytes than were written; the
                old file is as it was.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        temporary = target.with_name(f".{target.name}.tmp.{socket.gethostname()}.{os.getpid()}")
        try:
            self._prepare(target.parent)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            check_intact(temporary)
            _replace(temporary, target)
            sync_folder(target.parent)
        except (OSError, RuntimeError, ValueError) as error:  # torch makes a RuntimeError of a write that failed
            raise _explained(error, target, temporary) from error
        finally:
            temporary.unlink(missing_ok=True)
        self.last = target

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load tensors and plain values; a file that holds anything else is refused, wherever it lies.

        Args:
            path: A file; or a folder of shards, which are joined.
            map_location: Where to put the tensors of a file; those of a folder come on the CPU.
            weights_only: False lets a file run code, but never a folder.

        Raises:
            ValueError: It is damaged, or a folder that is not whole.
        """
        if "://" not in str(path):
            found = Path(standing(path))
            if found.is_dir():
                checkpoint = join_shards(found)
                self.last = Path(path)
                return checkpoint
            if found.is_file():
                check_intact(found)
                self.last = Path(path)
        return super().load_checkpoint(path, map_location, weights_only is None or weights_only)

    def _prepare(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if folder not in self._cleaned:
            self._cleaned.add(folder)
            remove_stale(folder)


def _replace(temporary: Path, target: Path) -> None:
    """Let a file take its place, be it that of a folder of shards, which no rename can do at one stroke."""
    if target.is_symlink() or not is_shards(target):
        temporary.replace(target)
        return
    aside = beside(target, ASIDE)
    if aside.exists():
        shutil.rmtree(aside)
    target.rename(aside)
    temporary.replace(target)
    shutil.rmtree(aside)


def remove_stale(folder: Path) -> None:
    """Remove the temporary files of saves that were killed."""
    for path in folder.glob(".*.tmp.*.*"):
        host, _, process = path.name.partition(".tmp.")[2].rpartition(".")
        try:
            if host == socket.gethostname() and process.isdigit():
                dead = int(process) == os.getpid() or not _alive(int(process))
            else:
                dead = time.time() - path.stat().st_mtime > FORGOTTEN
            if dead:
                path.unlink(missing_ok=True)
                log.info("removed %s, which a save that was killed had left", path)
        except OSError as error:  # it is another run's concern, or gone
            log.warning("%s is left as it is: %s", path, error)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's process
        return True
    return True


def _explained(error: Exception, target: Path, temporary: Path) -> OSError:
    """The error with what the user needs to know; where the disk is full, with both numbers."""
    kept = "; the checkpoint that lay there is as it was" if target.exists() else ""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    number = cause.errno if cause is not None else None
    reason = str(error) if cause is None else cause.strerror or str(cause)
    if number in FULL:
        written = temporary.stat().st_size if temporary.exists() else 0
        free = shutil.disk_usage(target.parent).free
        reason = f"{reason}: {written:,} bytes of it were written, {free:,} are free; make room, or save elsewhere"
    return OSError(number or errno.EIO, f"{target} could not be saved{kept}. {reason}")


def sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut. Windows cannot open a folder and needs no such thing."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
