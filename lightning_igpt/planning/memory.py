"""Bytes that training takes on each device, and what a network takes as files.

Activations are what autograd keeps between forward and backward, in bytes per token, layer and unit of width: an upper
bound, of which our blocks keep two thirds in bf16-mixed and four fifths in 32-true. Memory that lives shorter than that
(a kernel's workspace, the allocator's gaps) is not counted: a device's usable bytes, see ``devices.py``, leave room.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.planning.costs import block_matrices, parameter_count

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)


@dataclass(frozen=True)
class Widths:
    """Bytes that a precision takes.

    Attributes:
        weight: Of a weight, of its gradient, and of each of Adam's two moments.
        copy: Of the copy of a weight that autocast multiplies with; 0 where it multiplies with the weight itself.
        product: Of a value that a matrix product reads or gives.
        eager: Kept for backward by a block, per token and unit of width.
        compiled: The same of a compiled block.
        stream: Of a value of the residual stream.
    """

    weight: int
    copy: int
    product: int
    eager: int
    compiled: int
    stream: int


# Eager figures are an upper bound: of an activation function that keeps three tensors, where ours keeps one. Saved by
# our blocks are 44 (bf16-mixed) and 72 (32-true), compiled 34 and 64.
WIDTHS = MappingProxyType(
    {
        "bf16-mixed": Widths(weight=4, copy=2, product=2, eager=68, compiled=36, stream=4),
        "16-mixed": Widths(weight=4, copy=2, product=2, eager=68, compiled=36, stream=4),
        "32-true": Widths(weight=4, copy=0, product=4, eager=88, compiled=64, stream=4),
        "bf16-true": Widths(weight=2, copy=0, product=2, eager=44, compiled=32, stream=2),
    }
)
ACTIVATION_BYTES = {name: widths.eager for name, widths in WIDTHS.items()}


def training_bytes(
    config: ImageGPTConfig,
    batch_size: int,
    precision: str = "bf16-mixed",
    *,
    devices: int = 1,
    sharded: bool = False,
    recompute: Recompute = "none",
    compiled: bool = False,
) -> dict[str, int]:
    """Memory of one training step with AdamW on one device; the sum is what the device must hold.

    Args:
        config: The network.
        batch_size: Images that the device computes at once.
        precision: bf16-mixed, 16-mixed, 32-true or bf16-true.
        devices: Number of devices. Gradients are reduced where they lie (``gradient_as_bucket_view``); DDP without
            that keeps them twice.
        sharded: Weights, gradients and optimiser are spread over the devices, and two blocks gathered at a time
            (FSDP); otherwise every device holds all.
        recompute: Activations of a block that backward computes again: none; selective, all but the output of
            attention; full, all but the block's input. With dropout, selective is full.
        compiled: Blocks are compiled.

    Returns:
        Bytes of ``weights``, ``gradients``, ``optimizer`` (Adam's two moments), ``copies`` (weights as autocast
        multiplies with them, or the gathered blocks), ``activations`` and ``logits`` (as computed, in float32, and
        their gradient).

    Raises:
        ValueError: A number is below 1, or a word is none of the above.
    """
    widths = widths_of(precision)
    for name, value in (("batch_size", batch_size), ("devices", devices)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if recompute not in RECOMPUTE:
        raise ValueError(f"recompute is {recompute!r}; it must be one of {', '.join(RECOMPUTE)}")
    values = parameter_count(config)
    state = -(-values // devices) if sharded else values
    # Of a gathered block its weights and its gradients, as they are multiplied.
    gathered = 2 * block_matrices(config) * 2 * widths.product
    return {
        "weights": widths.weight * state,
        "gradients": widths.weight * state,
        "optimizer": 2 * widths.weight * state,
        "copies": gathered if sharded else widths.copy * values,
        "activations": batch_size * _activations(config, widths, recompute, compiled),
        "logits": batch_size * 10 * config.vocab_size * config.n_positions,
    }


def largest_batch(config: ImageGPTConfig, usable_bytes: int, **options: Any) -> int:
    """The most images that a device can compute at once.

    Args:
        config: The network.
        usable_bytes: What training may take of the device's memory.
        **options: As :func:`training_bytes` takes them.

    Returns:
        0 where the network alone does not fit.
    """
    one = training_bytes(config, 1, **options)
    per_image = one["activations"] + one["logits"]
    return max(0, (usable_bytes - sum(one.values()) + per_image) // per_image)


def loading_bytes(config: ImageGPTConfig) -> int:
    """Peak memory of reading a network from a file: float32 weights, and one of the pieces that it is read in.

    A piece is a sixteenth of the network, or its largest matrix if that is larger. The 4 MB that a small network's may
    have are not counted.
    """
    largest = config.n_embd * max(config.mlp_width, 3 * config.n_embd, config.vocab_size + 1, config.n_positions)
    return 4 * parameter_count(config) + 4 * max(parameter_count(config) // 16, largest)


def widths_of(precision: str) -> Widths:
    """What a precision, by Lightning's name, takes.

    Raises:
        ValueError: It is not one that memory is known for.
    """
    if precision not in WIDTHS:
        raise ValueError(f"precision is {precision!r}; memory is known for {', '.join(WIDTHS)}")
    return WIDTHS[precision]


def _activations(config: ImageGPTConfig, widths: Widths, recompute: Recompute, compiled: bool) -> int:
    """Bytes per image."""
    width = max(config.n_embd, -(-config.mlp_width // 4))  # the figures hold for an MLP four times as wide
    block = (widths.compiled if compiled else widths.eager) * width * config.n_positions
    if recompute == "none":
        return config.n_layer * block
    kept = widths.stream * config.n_embd
    if recompute == "selective" and not config.dropout:
        kept += widths.product * config.n_embd + 4 * config.n_head  # attention's output, and its log-sum-exp
    return config.n_layer * kept * config.n_positions + block  # one block at a time is computed again
