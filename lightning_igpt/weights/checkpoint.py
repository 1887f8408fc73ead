"""Network and palette out of a Lightning checkpoint written by this package's modules, and the best one of a run."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping
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
    """Open a checkpoint with torch's safe loader: tensors and plain values only, no code runs.

    Raises:
        ValueError: It is damaged, holds Python objects, or was not written by this package.
    """
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
        raise ValueError(f"{where} is damaged: its own description lacks or garbles {error}") from error
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

    Raises:
        FileNotFoundError: The folder holds no checkpoint.
        ValueError: None of them can be read.
    """
    moments = newest_first(checkpoints_in(folder))
    if not moments:
        raise FileNotFoundError(f"{folder} holds neither config.json (Hugging Face layout) nor a .ckpt file (a run)")
    paths = list(moments)
    newest, checkpoint = next(_readable(paths), None) or (paths[0], read_checkpoint(paths[0]))  # which raises
    for state in _mapping(checkpoint.get("callbacks")).values():
        monitor, kept = _mapping(state).get("monitor"), _mapping(state).get("best_model_path")
        if isinstance(monitor, str) and monitor.startswith("val/") and kept:
            ending = Path(str(kept)).parts[::-1]  # the run may have been moved since
            alike = {path: len(os.path.commonprefix([path.parts[::-1], ending])) for path in paths}  # noqa: RUF071
            best = max(paths, key=alike.__getitem__)
            if alike[best]:
                return best, f"the best in {monitor} of {folder}"
            log.warning("%s, the best in %s, is gone; another checkpoint is chosen", kept, monitor)
    metric, values = _validations([path for path in paths if moments[path].started == moments[newest].started])
    if len(values) > 1:
        best = min(values, key=lambda path: (values[path] if metric == NATS else -values[path], paths.index(path)))
        return best, f"the best in {metric} ({values[best]:.4f}) of {folder}"
    return newest, f"the newest in {folder}"


class Moment(NamedTuple):
    """When a checkpoint was written, by what it says itself: clocks differ, and copies have new times."""

    started: float  # when its run started, in seconds since 1970; equal for all checkpoints of a run, 0 if unknown
    fits: float  # how often that had been resumed
    step: float
    root: str | None = None  # name of the run's default_root_dir

    @classmethod
    def of(cls, checkpoint: Any) -> Moment:
        """What a checkpoint, which may hold anything, says; ``started`` is infinite where it knows no step."""
        stamp = _mapping(_mapping(checkpoint).get(STAMP))
        run, step = _mapping(stamp.get("run")), _mapping(checkpoint).get("global_step", stamp.get("steps"))
        started, fits = run.get("started", 0), run.get("fits", 0)
        sane = all(isinstance(value, (int, float)) and 0 <= value < math.inf for value in (started, fits, step))
        return cls(started, fits, step, run.get("root")) if sane else cls(math.inf, 0, 0)


def checkpoints_in(folder: Path, pattern: str = "**/*.ckpt") -> list[Path]:
    """The checkpoints in a folder and below it, without hidden ones."""
    return [path for path in folder.glob(pattern) if path.is_file() and not path.name.startswith(".")]


def newest_first(paths: Iterable[Path]) -> dict[Path, Moment]:
    """Checkpoints by run, resumption and optimizer step; what cannot be read comes first, so that it is reported."""
    moments: dict[Path, Moment] = {}
    starts: dict[Path, float] = {}  # of runs that do not say: when the first file in their folder was written
    for path in paths:
        try:
            moments[path], time = Moment.of(read_torch(path)), path.stat().st_mtime
        except Exception:  # a file may hold anything, and fail anywhere
            moments[path], time = Moment.of(None), math.inf
        starts[_folder(path)] = min(starts.get(_folder(path), math.inf), time)
    known = {path: moment._replace(started=moment.started or starts[_folder(path)]) for path, moment in moments.items()}
    # With equal moments the name decides, not the order of the folder: processes on other machines must agree.
    return dict(sorted(known.items(), key=lambda item: (*(-number for number in item[1][:3]), str(item[0]))))


def _folder(path: Path) -> Path:
    """The folder of a run's checkpoints; a name with a slash makes further ones, as in ``step=3-val/loss=2.ckpt``."""
    return next(parent for parent in path.absolute().parents if "=" not in parent.name)


def _readable(paths: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in paths:
        try:
            yield path, read_checkpoint(path)
        except (ValueError, OSError) as error:
            log.warning("%s is skipped: %s", path, error)


def _validations(paths: list[Path]) -> tuple[str, dict[Path, float]]:
    """(the metric, what the weights of each checkpoint gave in it) in validation, where any of the checkpoints says so.

    A checkpoint may be saved before the validation of its step; a later one then has its result.
    """
    stamps = {path: checkpoint[STAMP] for path, checkpoint in _readable(paths)}
    results = [_mapping(stamp.get("validation")) for stamp in stamps.values()]
    metric = NATS if any(NATS in result for result in results) else ACCURACY  # classifiers measure no nats
    measured = {result.get("step"): result[metric] for result in results if metric in result}
    values = {path: measured[stamp.get("steps")] for path, stamp in stamps.items() if stamp.get("steps") in measured}
    return metric, values


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _class_names(checkpoint: Mapping[str, Any], n_classes: int) -> list[str] | None:
    """The names that training knew, with numbers for classes beyond them."""
    names = _mapping(checkpoint.get("hyper_parameters")).get("class_names")
    if not isinstance(names, (list, tuple)):
        return None
    texts = [str(name) for name in names[:n_classes]]
    return texts + [f"LABEL_{number}" for number in range(len(texts), n_classes)]


def _card(stamp: Mapping[str, Any]) -> ModelCard:
    validation = _mapping(stamp.get("validation"))
    values = {name: stamp.get(name) for name in ("data", "steps", "origin")}
    measured = {"nats_per_pixel": validation.get(NATS), "accuracy": validation.get(ACCURACY)}
    return ModelCard.read(values | measured | {"measured_at": validation.get("step")})
