"""What a network costs, from its config alone: integers and arithmetic, no tensors.

Operations are in ``costs``, bytes in ``memory``, what devices can do in ``devices``, whole runs in ``runs``, and how a
network fits on the devices in ``strategy``.
"""

from lightning_igpt.planning.costs import (
    block_matrices,
    forward_flops_per_token,
    matrix_parameters,
    parameter_count,
    train_flops_per_token,
)
from lightning_igpt.planning.devices import DEVICES, Device, device_called, find_device, usable_bytes
from lightning_igpt.planning.memory import (
    ACTIVATION_BYTES,
    RECOMPUTE,
    Recompute,
    largest_batch,
    loading_bytes,
    training_bytes,
)
from lightning_igpt.planning.runs import (
    PAPER,
    PAPER_XL,
    Run,
    Schedule,
    cache_bytes,
    checkpoint_bytes,
    decode_seconds,
    paper_flops,
    paper_schedule,
    paper_size,
    token_bytes,
    usual_mfu,
    weights_bytes,
)
from lightning_igpt.planning.strategy import Choice, Strategy, choose, instead

__all__ = [
    "ACTIVATION_BYTES",
    "DEVICES",
    "PAPER",
    "PAPER_XL",
    "RECOMPUTE",
    "Choice",
    "Device",
    "Recompute",
    "Run",
    "Schedule",
    "Strategy",
    "block_matrices",
    "cache_bytes",
    "checkpoint_bytes",
    "choose",
    "decode_seconds",
    "device_called",
    "find_device",
    "forward_flops_per_token",
    "instead",
    "largest_batch",
    "loading_bytes",
    "matrix_parameters",
    "paper_flops",
    "paper_schedule",
    "paper_size",
    "parameter_count",
    "token_bytes",
    "train_flops_per_token",
    "training_bytes",
    "usable_bytes",
    "usual_mfu",
    "weights_bytes",
]
