"""Parameters and operations of a network, from its config alone.

Multiply-adds count as two operations; attention counts the causal half of the score matrix, which is what a fused
kernel computes, and for BERT networks, which see both sides, the whole of it.
"""

from __future__ import annotations

from lightning_igpt.config import ImageGPTConfig


def parameter_count(config: ImageGPTConfig) -> int:
    """Number of trained values."""
    width, inner = config.n_embd, config.mlp_width
    block = block_matrices(config) + 2 * width
    if config.bias:
        block += 4 * width + inner + width
    embeddings = (config.n_positions + 2 * config.vocab_size) * width
    start = width if config.objective == "autoregressive" else 0
    return config.n_layer * block + embeddings + start + width


def block_matrices(config: ImageGPTConfig) -> int:
    """Values in the matrices of one block."""
    return 4 * config.n_embd * config.n_embd + 2 * config.n_embd * config.mlp_width


def matrix_parameters(config: ImageGPTConfig) -> int:
    """Values that every token is multiplied by; embeddings are look-ups."""
    return config.n_layer * block_matrices(config) + config.vocab_size * config.n_embd


def forward_flops_per_token(config: ImageGPTConfig) -> int:
    """Operations of the forward pass per token, embeddings being look-ups."""
    length = config.n_positions
    seen = length + 1 if config.objective == "autoregressive" else 2 * length  # twice the mean number of keys
    return 2 * matrix_parameters(config) + 2 * config.n_layer * config.n_embd * seen


def train_flops_per_token(config: ImageGPTConfig) -> int:
    """Operations of forward and backward per token."""
    return 3 * forward_flops_per_token(config)
