"""The same network twice: ours, and that of ``transformers`` with the same weights."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.weights import save_pretrained

try:
    import transformers as transformers
except ModuleNotFoundError as error:
    raise SystemExit("this benchmark compares with transformers: pip install 'lightning-igpt[hf]'") from error


def both_networks(config: ImageGPTConfig, device: str) -> tuple[ImageGPT, Any]:
    """A network with random weights, and an ``ImageGPTForCausalImageModeling`` with the same, in evaluation mode."""
    torch.manual_seed(0)
    network = ImageGPT(config)
    torch.nn.init.normal_(network.lm_head.weight, std=0.02)  # initially zero, which would agree with anything
    with TemporaryDirectory() as folder:
        save_pretrained(Path(folder), network, Palette.load("openai"))
        theirs = transformers.ImageGPTForCausalImageModeling.from_pretrained(folder)
    return network.eval().to(device), theirs.eval().to(device)


def after_start(tokens: Tensor, vocab_size: int) -> Tensor:
    """The peer's input for our tokens (B, T): its start token, then all but the last."""
    return torch.cat([torch.full_like(tokens[:, :1], vocab_size), tokens[:, :-1]], 1)


def random_tokens(config: ImageGPTConfig, batch_size: int, device: str) -> Tensor:
    """Seeded int64 (B, T)."""
    generator, shape = torch.Generator().manual_seed(1), (batch_size, config.n_positions)
    return torch.randint(config.vocab_size, shape, generator=generator).to(device)


def pictures(count: int, height: int, width: int, seed: int) -> Tensor:
    """uint8 (count, 3, height, width): smooth colors and grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 16 + 1, width // 16 + 1, generator=generator) * 255
    smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    grain = torch.randn(smooth.shape, generator=generator) * 8
    return (smooth + grain).round().clamp(0, 255).to(torch.uint8)
