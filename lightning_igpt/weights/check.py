"""Are two networks the same? Logits to compare by eye and by number, here and in transformers."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.weights import huggingface
from lightning_igpt.weights.native import labels


class Comparison(NamedTuple):
    """Largest absolute difference and largest absolute logit of what was compared."""

    difference: float
    largest: float
    logits: int


@torch.no_grad()
def check_logits(network: ImageGPT) -> Tensor:
    """Logits of the first pixels of a fixed picture, float32 (16, K): equal for equal networks."""
    positions = torch.arange(network.config.n_positions)[None]  # (1, T)
    masked = positions % 3 == 0 if network.config.objective == "bert" else None
    logits: Tensor = network.eval()(positions * 7 % network.config.vocab_size, masked=masked)
    return logits[0, :16].float()


@torch.no_grad()
def compare_with_transformers(network: ImageGPT, palette: Palette, head: Tensor | None = None) -> Comparison:
    """Compare with transformers' ImageGPT on one picture of random tokens, both on the CPU in float32.

    A network with a class head is compared by its class logits, another by its color logits; a BERT network cannot be.
    """
    config = network.config
    if config.objective == "bert":
        raise ValueError("transformers cannot run a BERT network, so there is nothing to compare with")
    try:
        from transformers import ImageGPTForCausalImageModeling, ImageGPTForImageClassification
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the comparison needs transformers: pip install "lightning-igpt[hf]"') from error
    with tempfile.TemporaryDirectory() as folder:
        huggingface.save_folder(Path(folder), network, palette, head, None if head is None else labels(head, None))
        kind = ImageGPTForCausalImageModeling if head is None else ImageGPTForImageClassification
        theirs = kind.from_pretrained(folder).eval()
    tokens = torch.randint(config.vocab_size, (1, config.n_positions), generator=torch.Generator().manual_seed(0))
    expected = theirs(torch.cat([torch.full((1, 1), config.vocab_size), tokens[:, :-1]], 1)).logits
    ours = network.eval()(tokens) if head is None else network.eval().hidden(tokens).mean(1) @ head.T
    return Comparison((ours - expected).abs().max().item(), expected.abs().max().item(), expected.numel())
