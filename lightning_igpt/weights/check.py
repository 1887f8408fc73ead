"""Are two networks the same? Logits to compare by eye and by number, here and in transformers."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_igpt.model import ImageGPT, KVCache
from lightning_igpt.palette import Palette
from lightning_igpt.weights import huggingface

POSITIONS = 16  # enough to see every weight at work but those of later positions
RANDOM_POSITIONS = 256


class Comparison(NamedTuple):
    """Largest absolute difference and largest absolute logit of what was compared."""

    difference: float
    largest: float
    logits: int


@torch.no_grad()
def check_logits(network: ImageGPT) -> Tensor:
    """Logits of the first pixels of a fixed picture, float32 (P, K): equal for equal networks."""
    config = network.config
    tokens = torch.arange(config.n_positions)[None] * 7 % config.vocab_size  # (1, T)
    training = network.training
    network.eval()
    try:
        if config.objective == "bert":
            masked = torch.arange(config.n_positions)[None] % 3 == 0
            logits: Tensor = network(tokens, masked=masked)
            return logits[0, :POSITIONS].float()
        return _prefix_logits(network, tokens, POSITIONS)[0]
    finally:
        network.train(training)


@torch.no_grad()
def compare_with_transformers(network: ImageGPT, palette: Palette, head: Tensor | None = None) -> Comparison:
    """Compare with transformers' ImageGPT on random tokens, both on the CPU in float32.

    A network with a class head is compared by its class logits, on a whole picture; another by its colour logits.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        ValueError: The network is one of BERT's, which transformers cannot run.
    """
    if network.config.objective == "bert":
        raise ValueError("transformers cannot run a BERT network, so there is nothing to compare with")
    try:
        from transformers import ImageGPTForCausalImageModeling, ImageGPTForImageClassification
    except ModuleNotFoundError as error:
        message = 'the comparison needs transformers: pip install "lightning-igpt[hf]"'
        raise ModuleNotFoundError(message) from error
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save_folder(Path(folder), network, palette, head)
        kind = ImageGPTForCausalImageModeling if head is None else ImageGPTForImageClassification
        theirs = kind.from_pretrained(folder).eval()
    config = network.config
    length = config.n_positions if head is not None else min(RANDOM_POSITIONS, config.n_positions)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (1, config.n_positions), generator=generator)
    start = torch.full((1, 1), config.vocab_size)
    expected = theirs(torch.cat([start, tokens[:, : length - 1]], 1)).logits
    network.eval()
    found = _prefix_logits(network, tokens, length) if head is None else network.hidden(tokens).mean(1) @ head.T
    difference = (found - expected).abs().max().item()
    return Comparison(difference, expected.abs().max().item(), expected.numel())


def _prefix_logits(network: ImageGPT, tokens: Tensor, length: int) -> Tensor:
    """Logits (B, length, K) of the first pixels, at the cost of those alone."""
    length = min(length, network.config.n_positions)
    logits: Tensor = network(tokens[:, : length - 1], cache=KVCache(network.config, len(tokens)))
    return logits.float()
