"""Network and palette out of a Lightning checkpoint written by this package's modules, and the best one of a run."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.weights.card import ModelCard
from lightning_igpt.weights.native import COLORS, HEAD, Pretrained, check_head, check_palette, read_network
from lightning_igpt.weights.safety import read_torch, tensors_in

log = logging.getLogger(__name__)

STAMP = "lightning_igpt"  # the checkpoint key under which the modules say what they are
PREFIX = "network."
NATS, ACCURACY = "val/nats_per_pixel", "val/accuracy"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's tensors and plain values; ValueError for damage, objects, and other programs' files."""
    checkpoint = read_torch(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(STAMP), dict):
        raise ValueError(f"{path} was not written by a lightning_igpt module (its state holds no {STAMP!r} entry)")
    return checkpoint


def load_checkpoint(path: Path) -> Pretrained:
    """What one of our modules saved; ValueError where the file is damaged or another program's."""
    checkpoint, where = read_checkpoint(path), str(path)
    try:
        config, sha256 = ImageGPTConfig.resolve(checkpoint[STAMP]["network"]), checkpoint[STAMP]["palette_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is damaged: missing or wrong in its metadata: {error}") from error
    # Lightning's WeightAveraging puts the average into state_dict and the raw weights elsewhere.
    state = tensors_in(checkpoint.get("state_dict"), path)
    palette = check_palette(state.get(COLORS), config, sha256, where)
    network = read_network(config, state, where, prefix=PREFIX)
    head = check_head(state[HEAD], config.n_embd, where) if HEAD in state else None
    names = None if head is None else _class_names(checkpoint, len(head))
    origin = f"checkpoint {path}" + (" (averaged weights)" if "averaging_state" in checkpoint else "")
    return Pretrained(network, palette, origin, head, names, _card(checkpoint[STAMP]), path)


def best_checkpoint(folder: Path) -> tuple[Path, str]:
    """(the best checkpoint of the newest run in a folder, why it was chosen).

    The best is what a ModelCheckpoint that monitors a validation metric kept as such; without one, the checkpoint with
    the best validation of that run; without any validation, the newest. What cannot be read is skipped with a warning.
    """
    moments = newest_first(checkpoints_in(folder))
    if not moments:
        raise FileNotFoundError(f"{folder} holds neither config.json (Hugging Face layout) nor a .ckpt file (a run)")
    readable: dict[Path, dict[str, Any]] = {}
    for path in moments:
        try:
            readable[path] = read_checkpoint(path)
        except (ValueError, OSError) as error:
            log.warning("%s is skipped: %s", path, error)
    if not readable:
        read_checkpoint(next(iter(moments)))  # which raises
    newest, *_ = readable
    run = [path for path in readable if moments[path].started == moments[newest].started]
    for state in _mapping(readable[newest].get("callbacks")).values():
        monitor, kept = _mapping(state).get("monitor"), _mapping(state).get("best_model_path")
        if isinstance(monitor, str) and monitor.startswith("val/") and kept:
            ending = Path(str(kept)).parts[::-1]  # the run may have been moved since
            best = max(run, key=lambda path: len(os.path.commonprefix([path.parts[::-1], ending])))  # noqa: RUF071
            if best.name == ending[0]:
                return best, f"the best in {monitor} of {folder}"
    # A checkpoint may be saved before the validation of its step; a later one then has its result.
    results = [_mapping(readable[path][STAMP].get("validation")) for path in run]
    metric, sign = (NATS, 1) if any(NATS in result for result in results) else (ACCURACY, -1)
    measured = {result.get("step"): result[metric] for result in results if metric in result}
    steps = {path: readable[path][STAMP].get("steps") for path in run}
    values = {path: measured[step] for path, step in steps.items() if step in measured}
    if len(values) > 1:
        best = min(values, key=lambda path: sign * values[path])
        return best, f"the best in {metric} ({values[best]:.4f}) of {folder}"
    return newest, f"the newest in {folder}"


class Moment(NamedTuple):
    """When a checkpoint was written, by what it says itself: clocks differ, and copies have new times."""

    started: float  # when its run started, in seconds since 1970; equal for all checkpoints of a run, 0 if unknown
    fits: float  # how often that had been resumed
    step: float
    root: str | None = None  # name of the run's default_root_dir

    @classmethod
    def of(cls, checkpoint: Mapping[str, Any]) -> Moment:
        """What a checkpoint says."""
        stamp = checkpoint.get(STAMP) or {}
        run, step = stamp.get("run") or {}, checkpoint.get("global_step", stamp.get("steps"))
        return cls(float(run.get("started", 0)), float(run.get("fits", 0)), float(step), run.get("root"))


def checkpoints_in(folder: Path, pattern: str = "**/*.ckpt") -> list[Path]:
    """The checkpoints in a folder and below it, without hidden ones."""
    return [path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith(".")]


def newest_first(paths: Iterable[Path]) -> dict[Path, Moment]:
    """Checkpoints by run, resumption and optimizer step; what cannot be read comes first, so that it is reported."""
    moments: dict[Path, Moment] = {}
    for path in paths:
        try:
            moment = Moment.of(read_torch(path))  # version 0.1 did not note the run
            moments[path] = moment if moment.started else moment._replace(started=path.parent.stat().st_mtime)
        except Exception:  # a file may hold anything, and fail anywhere
            moments[path] = Moment(math.inf, 0, 0)
    # With equal moments the name decides, not the order of the folder: processes on other machines must agree.
    return dict(sorted(moments.items(), key=lambda item: (*(-number for number in item[1][:3]), str(item[0]))))


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _class_names(checkpoint: Mapping[str, Any], n_classes: int) -> list[str] | None:
    """The names that training knew, with numbers for classes beyond them."""
    names = _mapping(checkpoint.get("hyper_parameters")).get("class_names")
    if not isinstance(names, (list, tuple)):
        return None
    return [*map(str, names[:n_classes]), *(f"LABEL_{number}" for number in range(len(names), n_classes))]


def _card(stamp: Mapping[str, Any]) -> ModelCard:
    values = {name: stamp.get(name) for name in ("data", "steps", "origin", "resize")}
    validation = _mapping(stamp.get("validation"))
    names = {"nats_per_pixel": NATS, "accuracy": ACCURACY, "measured_at": "step"}
    return ModelCard.read(values | {field: validation.get(name) for field, name in names.items()})
