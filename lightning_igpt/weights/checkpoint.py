"""Network and palette out of a Lightning checkpoint written by this package's modules, and the best one of a run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.weights.card import ModelCard
from lightning_igpt.weights.files import TorchFile, read_torch
from lightning_igpt.weights.native import COLORS, HEAD, check_palette, read_network

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

    Raises:
        ValueError: The file is damaged, holds Python objects, or was not written by this package.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a sharded checkpoint; join its parts first: "
            f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        )
    checkpoint = read_torch(path)
    if not isinstance(checkpoint, dict) or STAMP not in checkpoint:
        raise ValueError(f"{path} was not written by a lightning_igpt module (its state holds no {STAMP!r} entry)")
    return checkpoint


def load_checkpoint(path: Path) -> Content:
    """What a PretrainModule, ProbeModule or FineTuneModule saved.

    Raises:
        ValueError: As for read_checkpoint, or parameters are missing.
    """
    checkpoint, where = read_checkpoint(path), str(path)
    try:
        state, config = checkpoint["state_dict"], ImageGPTConfig.resolve(checkpoint[STAMP]["network"])
        colors, sha256 = state[COLORS], checkpoint[STAMP]["palette_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is damaged: it lacks or garbles {error}") from error
    palette = check_palette(colors, config, sha256, where)
    # Lightning's WeightAveraging puts the average into state_dict and the raw weights elsewhere.
    network = read_network(config, TorchFile(path, lambda content: content["state_dict"]), where, prefix=PREFIX)
    head = state.get(HEAD)
    hparams = checkpoint.get("hyper_parameters") or {}
    return Content(
        network,
        palette,
        None if head is None else head.to(torch.float32, copy=True),
        None if head is None else hparams.get("class_names"),
        _card(checkpoint),
        "averaging_state" in checkpoint,
    )


def best_checkpoint(folder: Path) -> tuple[Path, str]:
    """(the best checkpoint of the newest run in a folder, why it was taken).

    The best is what a ModelCheckpoint that monitors a metric kept as such; without one, the checkpoint with the best
    validation among those that lie beside the newest; without any validation, the newest.

    Raises:
        FileNotFoundError: The folder holds no checkpoint.
    """
    found = sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder} holds neither config.json (Hugging Face layout) nor a .ckpt file (a run)")
    newest = found[-1]
    checkpoint = read_checkpoint(newest)
    for state in (checkpoint.get("callbacks") or {}).values():
        if isinstance(state, Mapping) and state.get("monitor") and state.get("best_model_path"):
            best = newest.parent / Path(str(state["best_model_path"])).name  # the run may have been moved
            if best.exists():
                return best, f"the best in {state['monitor']} of {folder}"
            log.warning("%s, the best in %s, is gone; another checkpoint is taken", best, state["monitor"])
    metric, sign = (NATS, 1) if checkpoint[STAMP].get("class") == "PretrainModule" else (ACCURACY, -1)
    values = {path: _validation(path).get(metric) for path in found if path.parent == newest.parent}
    rated = {path: sign * value for path, value in values.items() if value is not None}
    if len(rated) > 1:
        best = min(rated, key=lambda path: (rated[path], -found.index(path)))
        return best, f"the best in {metric} ({values[best]:.4f}) of {folder}"
    return newest, f"the newest in {folder}"


def _validation(path: Path) -> Mapping[str, Any]:
    """The validation metrics of the very weights that a checkpoint holds; empty if they were not measured."""
    stamp = read_checkpoint(path)[STAMP]
    validation = stamp.get("validation") or {}
    return validation if validation.get("step") == stamp.get("steps") else {}


def _card(checkpoint: Mapping[str, Any]) -> ModelCard:
    stamp = checkpoint[STAMP]
    validation = stamp.get("validation") or {}
    return ModelCard(
        data=stamp.get("data"),
        steps=stamp.get("steps"),
        nats_per_pixel=validation.get(NATS),
        accuracy=validation.get(ACCURACY),
        measured_at=validation.get("step"),
    )
