"""Network and palette out of a Lightning checkpoint written by this package's modules, and the best one of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.weights.card import ModelCard
from lightning_igpt.weights.complete import check_complete, checkpoints_among, standing
from lightning_igpt.weights.files import TensorFile, TorchFile, check_head, read_torch
from lightning_igpt.weights.intact import tensor_sums
from lightning_igpt.weights.native import COLORS, HEAD, check_palette, read_network
from lightning_igpt.weights.safety import EXTRA, check_shards
from lightning_igpt.weights.shards import ShardsFile

log = logging.getLogger(__name__)

STAMP = "lightning_igpt"  # the checkpoint key under which the modules say what they are
PREFIX = "network."
NATS, ACCURACY = "val/nats_per_pixel", "val/accuracy"


class Content(NamedTuple):
    """What a checkpoint holds for later use; head and class_names are None but for fine-tuned networks."""

    network: ImageGPT
    palette: Palette
    head: Tensor | None  # (C, D)
    class_names: list[str] | None
    card: ModelCard
    averaged: bool  # the weights are a running average, as Lightning's WeightAveraging saves them


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Open a checkpoint with torch's safe loader: tensors and plain values only, no code runs.

    Args:
        path: A file; or a folder of shards, of which all comes but the weights and the optimisers' states.

    Raises:
        ValueError: It is damaged or not whole, holds Python objects, or was not written by this package.
    """
    if path.is_dir():
        check_shards(path)
        check_complete(path)
        checkpoint = read_torch(path / EXTRA)
    else:
        tensor_sums(path)  # what tells one checkpoint from another is compared with its checksum, tensors are not yet
        checkpoint = read_torch(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(STAMP), dict):
        raise ValueError(f"{path} was not written by a lightning_igpt module (its state holds no {STAMP!r} entry)")
    return checkpoint


def load_checkpoint(path: Path) -> Content:
    """What a PretrainModule, ProbeModule or FineTuneModule saved.

    Args:
        path: A file, or a folder of shards, of which nothing is read but these tensors.

    Raises:
        ValueError: As for read_checkpoint, or parameters are missing.
    """
    path = Path(standing(path))
    checkpoint, where = read_checkpoint(path), str(path)
    try:
        config, sha256 = ImageGPTConfig.resolve(checkpoint[STAMP]["network"]), checkpoint[STAMP]["palette_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is damaged: it lacks or garbles {error}") from error
    # Lightning's WeightAveraging puts the average into state_dict and the raw weights elsewhere.
    file: TensorFile = ShardsFile(path) if path.is_dir() else TorchFile(path, _state_dict)
    if COLORS not in file.names:
        raise ValueError(f"{where} is damaged: it lacks {COLORS}")
    palette = check_palette(file.read([COLORS])[COLORS], config, sha256, where)
    network = read_network(config, file, where, prefix=PREFIX)
    head = check_head(file.read([HEAD])[HEAD], config.n_embd, where) if HEAD in file.names else None
    names = None if head is None else _class_names(checkpoint, len(head))
    return Content(network, palette, head, names, _card(checkpoint), "averaging_state" in checkpoint)


def best_checkpoint(folder: Path) -> tuple[Path, str]:
    """(the best checkpoint of the newest run in a folder, why it was taken).

    The best is what a ModelCheckpoint that monitors a validation metric kept as such; without one, the checkpoint with
    the best validation among those that lie beside the newest; without any validation, the newest. What cannot be read
    is passed over with a warning.

    Raises:
        FileNotFoundError: The folder holds no checkpoint.
        ValueError: None of them can be read.
    """
    found = sorted(checkpoints_among(folder.rglob("*.ckpt*")), key=lambda path: -Path(standing(path)).stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder} holds neither config.json (Hugging Face layout) nor a .ckpt file (a run)")
    newest, checkpoint = _first_readable(found)
    for state in _mapping(checkpoint.get("callbacks")).values():
        monitor, kept = _mapping(state).get("monitor"), _mapping(state).get("best_model_path")
        if isinstance(monitor, str) and monitor.startswith("val/") and kept:
            best = _moved(Path(str(kept)), found)
            if best is not None:
                return best, f"the best in {monitor} of {folder}"
            log.warning("%s, the best in %s, is gone; another checkpoint is taken", kept, monitor)
    metric, sign = (NATS, 1) if checkpoint[STAMP].get("class") == "PretrainModule" else (ACCURACY, -1)
    values = _validations([path for path in found if path.parent == newest.parent], metric)
    if len(values) > 1:
        best = min(values, key=lambda path: (sign * values[path], found.index(path)))
        return best, f"the best in {metric} ({values[best]:.4f}) of {folder}"
    return newest, f"the newest in {folder}"


def _state_dict(checkpoint: Any) -> Any:
    return _mapping(checkpoint).get("state_dict")


def _first_readable(paths: list[Path]) -> tuple[Path, dict[str, Any]]:
    errors = []
    for path in paths:
        try:
            return path, read_checkpoint(Path(standing(path)))
        except (ValueError, OSError) as error:
            errors.append(error)
            log.warning("%s is passed over: %s", path, error)
    raise ValueError(str(errors[0]) if len(errors) == 1 else f"none of {len(errors)} checkpoints opens: {errors[0]}")


def _moved(recorded: Path, found: list[Path]) -> Path | None:
    """The file that a checkpoint recorded by its path at the time: the one whose path ends most like it."""

    def alike(path: Path) -> int:
        pairs = zip(reversed(path.parts), reversed(recorded.parts), strict=False)
        return next((count for count, (one, other) in enumerate(pairs) if one != other), len(recorded.parts))

    best = max(found, key=alike)
    return best if alike(best) else None


def _validations(paths: list[Path], metric: str) -> dict[Path, float]:
    """What the very weights of each checkpoint gave in validation, where any of the checkpoints says so.

    A checkpoint may be saved before the validation of its step; a later one then tells of it.
    """
    steps, measured = {}, {}
    for path in paths:
        try:
            stamp = read_checkpoint(Path(standing(path)))[STAMP]
        except (ValueError, OSError) as error:
            log.warning("%s is passed over: %s", path, error)
            continue
        validation = _mapping(stamp.get("validation"))
        steps[path] = stamp.get("steps")
        if metric in validation:
            measured[validation.get("step")] = validation[metric]
    return {path: measured[step] for path, step in steps.items() if step in measured}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _class_names(checkpoint: Mapping[str, Any], n_classes: int) -> list[str] | None:
    """The names that training knew, with numbers for classes beyond them."""
    names = _mapping(checkpoint.get("hyper_parameters")).get("class_names")
    if not isinstance(names, (list, tuple)):
        return None
    texts = [str(name) for name in names[:n_classes]]
    return texts + [f"LABEL_{number}" for number in range(len(texts), n_classes)]


def _card(checkpoint: Mapping[str, Any]) -> ModelCard:
    stamp = _mapping(checkpoint[STAMP])
    validation = _mapping(stamp.get("validation"))
    values = {"data": stamp.get("data"), "steps": stamp.get("steps"), "measured_at": validation.get("step")}
    values["origin"] = stamp.get("origin")
    return ModelCard.read(values | {"nats_per_pixel": validation.get(NATS), "accuracy": validation.get(ACCURACY)})
