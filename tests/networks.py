"""Small networks for tests."""

import torch

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT

SMALL = ImageGPTConfig(n_layer=3, n_head=4, n_embd=32, vocab_size=20, image_size=4)
SMALL_BERT = ImageGPTConfig(n_layer=3, n_head=4, n_embd=32, vocab_size=20, image_size=4, objective="bert")


def random_network(config=SMALL, seed=0, dtype=torch.float32):
    """Published initial values would hide mistakes behind a zero head, so every parameter is drawn at random."""
    torch.manual_seed(seed)
    network = ImageGPT(config).to(dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.2)
            if parameter.ndim == 1:
                parameter.add_(1)
    return network.eval()


def random_tokens(config=SMALL, batch=2, seed=1):
    return torch.randint(config.vocab_size, (batch, config.n_positions), generator=torch.manual_seed(seed))
