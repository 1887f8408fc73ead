"""Network and palette out of a Lightning checkpoint written by this package's modules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.weights.names import check_keys

STAMP = "lightning_igpt"  # the checkpoint key under which the modules say what they are
PREFIX = "network."
COLORS = "palette_colors"


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Open a checkpoint with torch's safe loader: tensors and plain values only, no code runs.

    Raises:
        ValueError: The file is damaged, holds Python objects, or was not written by this package.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be opened as a checkpoint: {error}") from error
    if not isinstance(checkpoint, dict) or STAMP not in checkpoint:
        raise ValueError(f"{path} was not written by a lightning_igpt module (its state holds no {STAMP!r} entry)")
    return checkpoint


def load_checkpoint(path: Path) -> tuple[ImageGPT, Palette]:
    """The network and palette that a PretrainModule, ProbeModule or FineTuneModule saved.

    Raises:
        ValueError: As for read_checkpoint, or parameters are missing.
    """
    return from_checkpoint(read_checkpoint(path), str(path))


def from_checkpoint(checkpoint: Mapping[str, Any], name: str) -> tuple[ImageGPT, Palette]:
    """As load_checkpoint, from the checkpoint's contents; ``name`` is for messages."""
    try:
        state, config = checkpoint["state_dict"], ImageGPTConfig.resolve(checkpoint[STAMP]["network"])
        state[COLORS], checkpoint[STAMP]["palette_sha256"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{name} is damaged: it lacks {error}") from error
    weights = {key.removeprefix(PREFIX): value for key, value in state.items() if key.startswith(PREFIX)}
    with torch.device("meta"):
        network = ImageGPT(config)
    check_keys(network.state_dict(), weights, name)
    # Copied, because the file is only mapped: it may be replaced while the network is in use.
    network.load_state_dict({key: value.to(torch.float32, copy=True) for key, value in weights.items()}, assign=True)
    return network.requires_grad_(True), _palette(checkpoint, network.config, name)


def _palette(checkpoint: Mapping[str, Any], config: ImageGPTConfig, name: str) -> Palette:
    palette, expected = Palette(checkpoint["state_dict"][COLORS]), checkpoint[STAMP]["palette_sha256"]
    if palette.sha256 != expected or len(palette) != config.vocab_size:
        raise ValueError(
            f"{name} is damaged: it holds {len(palette)} colours with the hash {palette.sha256[:12]}, but was written "
            f"with {config.vocab_size} colours and the hash {expected[:12]}"
        )
    return palette
