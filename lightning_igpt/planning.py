"""What a network costs, from its config alone: integers and arithmetic, no tensors.

Multiply-adds count as two operations; attention counts the causal half of the score matrix, which is what a fused
kernel computes. The activation figures are bytes that autograd keeps per token, layer and unit of width.
"""

from __future__ import annotations

from lightning_igpt.config import ImageGPTConfig

ACTIVATION_BYTES = {"bf16-mixed": 68, "32-true": 88}
STATE_BYTES = 16  # float32 weight, gradient and Adam's two moments


def parameter_count(config: ImageGPTConfig) -> int:
    """Number of trained values."""
    width, inner = config.n_embd, config.mlp_width
    block = 4 * width * width + 2 * width * inner + 2 * width
    if config.bias:
        block += 4 * width + inner + width
    embeddings = (config.n_positions + 2 * config.vocab_size) * width
    start = width if config.objective == "autoregressive" else 0
    return config.n_layer * block + embeddings + start + width


def forward_flops_per_token(config: ImageGPTConfig) -> int:
    """Operations of the forward pass per token, embeddings being look-ups."""
    width, length = config.n_embd, config.n_positions
    matrices = config.n_layer * (4 * width * width + 2 * width * config.mlp_width) + config.vocab_size * width
    seen = length + 1 if config.objective == "autoregressive" else 2 * length  # twice the mean number of keys
    return 2 * matrices + 2 * config.n_layer * width * seen


def train_flops_per_token(config: ImageGPTConfig) -> int:
    """Operations of forward and backward per token."""
    return 3 * forward_flops_per_token(config)


def training_bytes(config: ImageGPTConfig, batch_size: int, precision: str = "bf16-mixed") -> dict[str, int]:
    """Memory of one training step on one device, without activation checkpointing.

    Args:
        config: The network.
        batch_size: Images per device and step.
        precision: ``bf16-mixed`` or ``32-true``.

    Returns:
        Bytes of ``state`` (weights, gradients, optimiser), ``activations`` and ``logits``.
    """
    tokens = batch_size * config.n_positions
    return {
        "state": STATE_BYTES * parameter_count(config),
        "activations": ACTIVATION_BYTES[precision] * config.n_embd * config.n_layer * tokens,
        "logits": 10 * config.vocab_size * tokens,  # as computed, in float32, and their gradient
    }


def loading_bytes(config: ImageGPTConfig) -> int:
    """Peak memory of reading a network from a file: float32 weights, and one of the pieces that it is read in.

    A piece is a sixteenth of the network, or its largest matrix if that is larger.
    """
    largest = config.n_embd * max(config.mlp_width, 3 * config.n_embd, config.vocab_size + 1, config.n_positions)
    return 4 * parameter_count(config) + 4 * max(parameter_count(config) // 16, largest)
