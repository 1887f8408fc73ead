"""Which checkpoint an interrupted run goes on from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_igpt.checkpointing.complete import checkpoints_among, standing
from lightning_igpt.checkpointing.intact import check_intact
from lightning_igpt.checkpointing.shard_safety import EXTRA
from lightning_igpt.checkpointing.shards import ShardsFile
from lightning_igpt.weights.safety import read_torch

log = logging.getLogger(__name__)


def find_checkpoint(where: str | Path | Trainer, module: LightningModule | None = None) -> Path | None:
    """The newest checkpoint that a run can go on from, for ``trainer.fit(ckpt_path=...)``.

    Those that are damaged, that hold no optimiser, or that are another network's or palette's are passed over with a
    warning.

    Args:
        where: The run's trainer, which tells where its loggers and its ModelCheckpoints save; or a folder, which is
            searched with all below it.
        module: The module that shall go on. None leaves it to the trainer to find out whether it fits.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        ValueError: There are checkpoints, and none of them will do; the message says why.
    """
    errors: list[str] = []
    # With equal times the name decides, not the order of the folder: processes on other machines must agree.
    for path in sorted(_candidates(where), key=lambda path: (-_time_of(path), str(path))):
        try:
            check_resumable(path, module)
        except Exception as error:  # what is in there may be anything, and fail anywhere
            reason = str(error) if isinstance(error, (ValueError, OSError)) else f"it is damaged ({error!r})"
            log.warning("%s is passed over: %s", path, reason)
            errors.append(f"{path}: {reason}")
        else:
            return path
    if errors:
        raise ValueError(
            f"none of the {len(errors)} checkpoints there can be continued; the newest is {errors[0]}. To start anew, "
            "use another folder (default_root_dir) or remove them"
        )
    return None


def check_resumable(path: Path, module: LightningModule | None = None) -> None:
    """Raise unless a run can go on from a checkpoint.

    Raises:
        ValueError: It is damaged, was saved without the optimiser, or by another class, network or palette.
    """
    needed = {"loops", "state_dict", "optimizer_states", "lr_schedulers"}
    place = Path(standing(path))
    if place.is_dir():
        shards = ShardsFile(place)
        shards.check_intact()
        checkpoint = read_torch(place / EXTRA)
        needed -= {"state_dict"} if shards.names else set()
        needed -= {"optimizer_states"} if shards.n_optimizers else set()
    else:
        check_intact(path)
        checkpoint = read_torch(path)
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise ValueError(f"{path} holds weights, but not the optimiser; start a new run from it with pretrained=")
    kinds = {"loops": dict, "state_dict": dict, "optimizer_states": list, "lr_schedulers": list, "callbacks": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name, kind()), kind)]
    if wrong or not isinstance(checkpoint["loops"], dict):
        raise ValueError(f"{path} is damaged: what it says of {', '.join(wrong)} makes no sense")
    check: Any = getattr(module, "check_checkpoint", None)
    if check is not None:
        check(checkpoint)


def _time_of(path: Path) -> float:
    """When it was written; 0 for what was removed meanwhile."""
    try:
        return Path(standing(path)).stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _candidates(where: str | Path | Trainer) -> list[Path]:
    """Files and folders of shards."""
    if isinstance(where, Trainer):
        # Not all below the root, which may be a folder of many runs.
        places = [place for folder in _folders(where) for place in folder.rglob("*.ckpt*")]
        places += Path(where.default_root_dir).glob("*.ckpt*")
    else:
        places = list(Path(where).expanduser().rglob("*.ckpt*"))
    return checkpoints_among(places)


def _folders(trainer: Trainer) -> list[Path]:
    """Where ModelCheckpoint saves: where it was told to, or in the logger's folder, whatever its version."""
    told = [getattr(one, "dirpath", None) for one in trainer.checkpoint_callbacks]
    roots = [(one.save_dir or trainer.default_root_dir, one.name or "") for one in trainer.loggers]
    folders = [Path(trainer.default_root_dir) / "checkpoints", *(Path(root) / str(name) for root, name in roots)]
    return folders + [Path(folder) for folder in told if folder and "://" not in str(folder)]
