"""Checkpoint files that are whole or absent, and the choice of the checkpoint that an interrupted run continues from.

Lightning 2.6 writes to the folder for temporary files and moves the file from there: where that is on another file
system, a kill during the move destroys the previous checkpoint too.
"""

import errno
import logging
import math
import os
import pickle
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_igpt.files import counted, replacing
from lightning_igpt.weights.checkpoint import Moment, checkpoints_in, newest_first
from lightning_igpt.weights.safety import check_intact, check_local, plain, read_torch

log = logging.getLogger(__name__)

KINDS: dict[str, type] = {"loops": dict, "state_dict": dict, "callbacks": dict, "global_step": int}
KINDS |= {"optimizer_states": list, "lr_schedulers": list}  # what a run continues
_runs: WeakKeyDictionary[Trainer, Moment] = WeakKeyDictionary()


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write next to the target, flush to the disk, compare checksums, then rename; read with torch's safe loader.

    Addresses with a protocol, such as ``s3://``, are written by Lightning's own means.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save a checkpoint so that ``path`` holds the whole new file or, where OSError says why, the old one."""
        checkpoint = make_plain(dict(checkpoint))
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        with replacing(target, target.with_name(f".{target.name}.tmp")) as temporary:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            try:
                check_intact(temporary)
            except ValueError as error:
                raise OSError(errno.EIO, str(error)) from error
        if os.name != "nt":  # make the rename itself survive a power cut; Windows cannot open a folder
            descriptor = os.open(target.parent, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, loc: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load tensors and plain values; ValueError for damage, for Python objects unless ``weights_only=False``."""
        safely = weights_only is not False
        if safely:
            check_local(path)
        if not safely or "://" in str(path):
            return super().load_checkpoint(path, map_location, safely)
        check_intact(Path(path))
        checkpoint: dict[str, Any] = read_torch(Path(path), map_location, mmap=False)
        return checkpoint


def find_checkpoint(where: str | Path | Trainer, module: LightningModule | None = None) -> Path | None:
    """The newest checkpoint that a run can continue from, for ``trainer.fit(ckpt_path=...)``.

    Of several runs it is that of the last to start, and of a run the one with most optimizer steps since it was last
    resumed, whatever the times of the files. Those that are damaged, hold no optimizer, or are another network's or
    palette's are skipped with a warning.

    Args:
        where: The run's trainer, for the folders of its loggers and ModelCheckpoints, and what runs in its
            ``default_root_dir`` left there under other loggers; or a folder, searched with all below it.
        module: The module that continues; None compares no network.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        ValueError: There are checkpoints, and a run can continue from none of them; the message says why.
    """
    errors: list[str] = []
    for path in _candidates(where):
        try:
            check_resumable(path, module)
        except Exception as error:  # a file may hold anything, and fail anywhere
            reason = str(error) if isinstance(error, (ValueError, OSError)) else f"it is damaged ({error!r})"
            log.warning("%s is skipped: %s", path, reason)
            errors.append(f"{path}: {reason}")
        else:
            return path
    if errors:
        text = f"no run can resume from {counted(len(errors), 'checkpoint')} there, such as {errors[0]}"
        raise ValueError(f"{text}. To start a new run, use another folder (default_root_dir) or remove them")
    return None


def check_resumable(path: Path, module: LightningModule | None = None) -> None:
    """Raise ValueError where a checkpoint is damaged, without optimizer, or of another class, network or palette."""
    check_intact(path)
    checkpoint = read_torch(path)
    if not isinstance(checkpoint, dict) or not KINDS.keys() <= checkpoint.keys():
        raise ValueError(f"{path} holds weights, but not the optimizer; start a new run from it with pretrained=")
    wrong = [name for name, kind in KINDS.items() if not isinstance(checkpoint[name], kind)]
    if wrong:
        raise ValueError(f"{path} is damaged: its {', '.join(wrong)} cannot be read; use another checkpoint")
    check: Any = getattr(module, "check_checkpoint", None)
    if check is not None:
        check(checkpoint)


class SteadyCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that lets a validation due at the same step run first, so that a resumed run owes none."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, and no validation follows."""
        if not validation_follows(trainer, batch_idx):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if it is time; ModelCheckpoint itself saves nothing in sanity checks and evaluations."""
        super().on_train_batch_end(trainer, pl_module, None, None, 0)


def validation_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether Lightning validates after this batch."""
    every, batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or (every and (trainer.current_epoch + 1) % every):
        return False
    if batches in (None, float("inf")):
        return trainer.is_last_batch
    return (1 + (batch_idx if every else trainer.fit_loop.total_batch_idx)) % batches == 0


def run_of(trainer: Trainer, earlier: Any = None) -> dict[str, Any]:
    """A note for checkpoints on the run that writes them: that of the checkpoint ``earlier``, where it resumes one.

    A clock that is set back does not make the checkpoints of a resumed run older than those it resumed from.
    """
    said = None if earlier is None else Moment.of(earlier)
    if said and said.started:
        _runs[trainer] = said._replace(fits=said.fits + 1)
    run = _runs.setdefault(trainer, Moment(time.time(), 0, 0))
    return {"started": run.started, "fits": run.fits, "root": Path(trainer.default_root_dir).absolute().name}


def make_plain(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Put plain values, which open with ``weights_only=True``, in place of objects; warn of those that have none."""
    for owner in (LightningModule, LightningDataModule):  # the class of OmegaConf's hyperparameters
        if isinstance(checkpoint.get(owner.CHECKPOINT_HYPER_PARAMS_TYPE), type):
            del checkpoint[owner.CHECKPOINT_HYPER_PARAMS_TYPE]
    with suppress(RecursionError):  # a state that contains itself stays as it is
        checkpoint.update(plain(checkpoint, _warn))
    return checkpoint


def _warn(key: str, value: Any) -> Any:
    saved, why = value, "weights_only=True refuses, so that no run can resume from it"
    try:
        pickle.dumps(value)
    except Exception as error:
        saved, why = repr(value), f"cannot be saved ({error}), only its text is"
    what = f"{key} in the checkpoint is a {type(value).__module__}.{type(value).__qualname__}, which {why}"
    warnings.warn(f"{what}; keep a plain value there: text, a number, a list, a dict or a tensor", stacklevel=2)
    return saved


def _candidates(where: str | Path | Trainer) -> list[Path]:
    """What may be continued, newest first; under other loggers only checkpoints of this root, and of no older run."""
    if isinstance(where, (str, os.PathLike)):
        if not str(where).strip() or "://" in str(where):
            raise ValueError(f"{str(where)!r} is no folder or file here; name one, or give ckpt_path instead")
        place = Path(where).expanduser()
        return [place] if place.is_file() else list(newest_first(checkpoints_in(place)))
    root = Path(where.default_root_dir).absolute()
    logs = [(Path(logger.save_dir or root).absolute(), str(logger.name or "")) for logger in where.loggers]
    named = [getattr(callback, "dirpath", None) for callback in where.checkpoint_callbacks]
    folders = [folder for place, name in logs for folder in ([place / name] if name else place.glob("version_*"))]
    folders += [root / "checkpoints"]
    folders += [Path(folder).absolute() for folder in named if folder and "://" not in str(folder)]
    own = {path for folder in folders for path in checkpoints_in(folder)} | set(checkpoints_in(root, "*.ckpt"))
    patterns = [f"{levels}{inner}*.ckpt" for levels in ("*/", "*/*/") for inner in ("", "checkpoints/**/")]
    places = {root, *(place for place, _ in logs)}
    patterns.append("*/*/*/checkpoints/**/*.ckpt")  # of a logger's folder below the root, or a name with a slash
    others = {path for place in places for pattern in patterns for path in checkpoints_in(place, pattern)}
    moments = newest_first(own | others)
    runs = {moments[path].started for path in own} - {math.inf}
    joins = {path for path, at in moments.items() if at.root == root.name and (not runs or at.started in runs)}
    return [path for path in moments if path in own | joins]
