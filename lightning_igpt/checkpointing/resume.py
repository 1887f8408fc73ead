"""Which checkpoint an interrupted run goes on from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule

from lightning_igpt.checkpointing.sharded import check_complete, standing
from lightning_igpt.weights.files import read_torch
from lightning_igpt.weights.intact import check_intact
from lightning_igpt.weights.safety import EXTRA

log = logging.getLogger(__name__)


def find_checkpoint(folder: str | Path, module: LightningModule | None = None) -> Path | None:
    """The newest checkpoint below a folder that a run can go on from, for ``trainer.fit(ckpt_path=...)``.

    Those that are damaged, that hold no optimiser, or that are another network's or palette's are passed over with a
    warning.

    Args:
        folder: The run's ``default_root_dir``, or any folder of it.
        module: The module that shall go on. None leaves it to the trainer to find out whether it fits.

    Returns:
        None where there is no checkpoint at all.

    Raises:
        ValueError: There are checkpoints, and none of them will do; the message says why.
    """
    found = [(path, Path(standing(path)).stat().st_mtime) for path in _candidates(Path(folder).expanduser())]
    errors: list[str] = []
    for path, _ in sorted(found, key=lambda pair: -pair[1]):
        try:
            check_resumable(path, module)
        except (ValueError, OSError) as error:
            log.warning("%s is passed over: %s", path, error)
            errors.append(str(error))
        else:
            return path
    if errors:
        raise ValueError(
            f"none of the {len(errors)} checkpoints in {folder} can be continued: {errors[0]}. To start anew, use "
            "another folder (default_root_dir) or remove them"
        )
    return None


def check_resumable(path: Path, module: LightningModule | None = None) -> None:
    """Raise unless a run can go on from a checkpoint.

    Raises:
        ValueError: It is damaged, was saved without the optimiser, or by another class, network or palette.
    """
    needed = {"loops", "state_dict", "optimizer_states"}
    place = Path(standing(path))
    if place.is_dir():
        check_complete(place)
        checkpoint, needed = read_torch(place / EXTRA), {"loops"}  # the rest lies in the shards
    else:
        check_intact(path)
        checkpoint = read_torch(path)
    if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
        raise ValueError(f"{path} holds weights, but not the optimiser; start a new run from it with pretrained=")
    check: Any = getattr(module, "check_checkpoint", None)
    if check is not None:
        check(checkpoint)


def _candidates(folder: Path) -> list[Path]:
    """Files and folders of shards. Names with a dot are unfinished saves, and links may lead nowhere."""
    named = [path for path in folder.rglob("*.ckpt") if not path.name.startswith(".")]
    # Where a kill came between two renames, the folder of shards has another name for the moment.
    named += [path.with_name(path.name[1:].split(".shards.")[0]) for path in folder.rglob(".*.ckpt.shards.*")]
    return [path for path in dict.fromkeys(named) if Path(standing(path)).exists()]
