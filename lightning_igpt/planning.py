"""What a network costs, from its config alone: parameters, operations, memory, time, and what devices can do.

Integers and arithmetic, no tensors. Multiply-adds count as two operations. Attention counts the causal half of the
score matrix, which is what a fused kernel computes; BERT networks see both sides and count all of it. A floor is what
no program can undercut: every operation at the speed of a large product, every byte at that of a large copy.
"""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from lightning_igpt.config import ImageGPTConfig

Recompute = Literal["none", "selective", "full"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
Strategy = Literal["single", "ddp", "fsdp"]
GIB = 2**30
MOVED_BYTES = 200  # per token, layer and unit of width, from and to the device's memory; an estimate
USUAL_MFU = ((200e6, 0.33), (900e6, 0.45), (math.inf, 0.50))  # up to this many parameters: S, M, L and XL


def parameter_count(config: ImageGPTConfig) -> int:
    """Number of trained values."""
    width, inner = config.n_embd, config.mlp_width
    block = block_matrices(config) + 2 * width + (5 * width + inner if config.bias else 0)
    start = width if config.objective == "autoregressive" else 0
    return config.n_layer * block + (config.n_positions + 2 * config.vocab_size) * width + start + width


def block_matrices(config: ImageGPTConfig) -> int:
    """Values in the matrices of one block."""
    return 4 * config.n_embd * config.n_embd + 2 * config.n_embd * config.mlp_width


def matrix_parameters(config: ImageGPTConfig) -> int:
    """Values that every token is multiplied by; embeddings are look-ups."""
    return config.n_layer * block_matrices(config) + config.vocab_size * config.n_embd


def forward_flops_per_token(config: ImageGPTConfig) -> int:
    """Operations of the forward pass per token."""
    length = config.n_positions
    seen = length + 1 if config.objective == "autoregressive" else 2 * length  # twice the mean number of keys
    return 2 * matrix_parameters(config) + 2 * config.n_layer * config.n_embd * seen


def train_flops_per_token(config: ImageGPTConfig) -> int:
    """Operations of forward and backward per token."""
    return 3 * forward_flops_per_token(config)


class Widths(NamedTuple):
    """Bytes that a precision takes."""

    weight: int  # of a weight, of its gradient, and of each of Adam's two moments
    copy: int  # of the copy of a weight that autocast multiplies with
    product: int  # of a value that a matrix product reads or gives
    eager: int  # kept for backward by a block, per token and unit of width
    compiled: int  # the same of a compiled block
    stream: int  # of a value of the residual stream


# Eager figures are an upper bound: of norms and an activation function that keep three tensors, where ours keep one.
# Measured of our blocks are 36 (bf16-mixed) and 64 (32-true), compiled 34 and 64.
WIDTHS: Mapping[str, Widths] = {
    "bf16-mixed": Widths(4, 2, 2, 68, 36, 4),
    "16-mixed": Widths(4, 2, 2, 68, 36, 4),
    "32-true": Widths(4, 0, 4, 88, 64, 4),
    "bf16-true": Widths(2, 0, 2, 44, 32, 2),
}
ACTIVATION_BYTES = {name: widths.eager for name, widths in WIDTHS.items()}


def widths_of(precision: str) -> Widths:
    """What a precision, by Lightning's name, takes; ValueError where that is not known."""
    if precision not in WIDTHS:
        raise ValueError(f"precision is {precision!r}; memory is known for {', '.join(WIDTHS)}")
    return WIDTHS[precision]


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
    """Memory of one training step with AdamW on one device, in bytes; the sum of the parts is what it must hold.

    Args:
        config: The network.
        batch_size: Images that the device computes at once.
        precision: bf16-mixed, 16-mixed, 32-true or bf16-true.
        devices: Number of devices. Gradients are counted once (``gradient_as_bucket_view``).
        sharded: Weights, gradients and optimizer are spread over the devices, and two blocks gathered at a time (FSDP).
        recompute: Activations of a block that backward computes again: none; selective, all but the output of
            attention; full, all but the block's input. With dropout, selective is full.
        compiled: Blocks are compiled.
    """
    widths = widths_of(precision)
    _check_counts(batch_size=batch_size, devices=devices)
    values = parameter_count(config)
    state = -(-values // devices) if sharded else values
    gathered = 2 * block_matrices(config) * 2 * widths.product  # weights and gradients of two blocks
    return {
        "weights": widths.weight * state,
        "gradients": widths.weight * state,
        "optimizer": 2 * widths.weight * state,  # Adam's two moments
        "copies": gathered if sharded else widths.copy * values,  # of weights as autocast multiplies with them
        "activations": batch_size * _activations(config, widths, recompute, compiled),
        "logits": batch_size * 10 * config.vocab_size * config.n_positions,  # in 16 and 32 bits, and their gradient
    }


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")


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


def largest_batch(config: ImageGPTConfig, usable: int, **options: Any) -> int:
    """The most images that fit into ``usable`` bytes at once, with options of ``training_bytes``; 0 where none does."""
    one = training_bytes(config, 1, **options)
    per_image = one["activations"] + one["logits"]
    return max(0, (usable - sum(one.values()) + per_image) // per_image)


def checkpoint_bytes(config: ImageGPTConfig, precision: str = "bf16-mixed") -> int:
    """Weights and Adam's two moments in a file; palette, counters and names add little."""
    return 3 * widths_of(precision).weight * parameter_count(config)


def cache_bytes(config: ImageGPTConfig, batch_size: int = 1, width: int = 2) -> int:
    """Keys and values of ``batch_size`` whole images in sampling, each value of ``width`` bytes."""
    return 2 * config.n_layer * config.n_embd * config.n_positions * batch_size * width


@dataclass(frozen=True)
class Device:
    """One device, by its vendor's data sheet; products are of dense matrices, in 10^12 operations per second."""

    name: str
    memory: int  # bytes
    tflops_16: float  # products in bfloat16, or in float16 where the device has no bfloat16
    tflops_tf32: float | None  # None where the device has none
    tflops_32: float
    bandwidth: float  # bytes of memory read or written per second by large copies
    torch_name: str  # regular expression for what torch calls it; empty for the CPU
    bfloat16: bool = True
    measured_16: float | None = None  # what large products in 16 bits reach
    source: str = "NVIDIA's data sheet"

    @property
    def usable(self) -> int:
        """Bytes that training may take."""
        return usable_bytes(self.memory)

    def peak(self, precision: str) -> float:
        """Operations per second by the data sheet, which MFU refers to; float32 is TF32 where the device has it."""
        return 1e12 * (self.tflops_16 if widths_of(precision).product == 2 else self.tflops_tf32 or self.tflops_32)

    def reached(self, precision: str) -> float:
        """Operations per second of a large product: measured, or the data sheet's."""
        measured = self.measured_16 if widths_of(precision).product == 2 else None
        return measured * 1e12 if measured else self.peak(precision)


# NVIDIA data sheets and, for consumer cards, whitepapers of Blackwell, Ada and GA102. The first name that fits counts.
DEVICES: Mapping[str, Device] = {
    # Editions of the sheet differ: 180 or 192 GB, TF32 1,100 or 1,125, FP32 75 or 80.
    "b200": Device("B200", 180 * GIB, 2250, 1100, 75, 8e12, "B200"),
    "h200": Device("H200", 141 * GIB, 989.4, 494.7, 66.9, 4.8e12, "H200"),
    "gh200": Device("GH200", 96 * GIB, 989.4, 494.7, 66.9, 4e12, "GH200"),  # there is one of 144 GB, too
    "h100-nvl": Device("H100 NVL", 94 * GIB, 835, 417, 60, 3.9e12, "H100 NVL"),  # TF32, FP32: one source
    "h100-pcie": Device("H100 PCIe", 80 * GIB, 756, 378, 51.2, 2e12, "H100 PCIe"),
    "h100": Device("H100 SXM", 80 * GIB, 989.4, 494.7, 66.9, 3e12, "H100", True, 800),  # sheet: 3.35e12
    "a100-80": Device("A100 80 GB", 80 * GIB, 312, 156, 19.5, 2.039e12, "A100.*80GB"),
    "a100-40": Device("A100 40 GB", 40 * GIB, 312, 156, 19.5, 1.555e12, "A100"),
    "l40s": Device("L40S", 48 * GIB, 362, 183, 91.6, 864e9, "L40S"),
    "l4": Device("L4", 24 * GIB, 121, 60, 30.3, 300e9, "L4"),
    "a10": Device("A10", 24 * GIB, 125, 62.5, 31.2, 600e9, "A10"),
    "v100-16": Device("V100 16 GB", 16 * GIB, 125, None, 15.7, 900e9, "V100.*16GB", False),
    "v100": Device("V100", 32 * GIB, 125, None, 15.7, 900e9, "V100", False),
    "t4": Device("T4", 16 * GIB, 65, None, 8.1, 320e9, "T4", False),
    # Consumer cards multiply 16 bits at half speed where sums are float32, as torch has them.
    "rtx5090": Device("RTX 5090", 32 * GIB, 209.5, 104.8, 104.8, 1.792e12, "RTX 5090(?! D| L)"),
    "rtx4090": Device("RTX 4090", 24 * GIB, 165.2, 82.6, 82.6, 1.008e12, "RTX 4090(?! D| L)"),
    "rtx3090": Device("RTX 3090", 24 * GIB, 71, 35.6, 35.6, 936e9, "RTX 3090(?! Ti)"),
}


def find_device(kind: str) -> Device:
    """A device by its key, with or without spaces and dashes, or by torch's name of it; ValueError where none is."""
    plain = {name.replace("-", ""): name for name in DEVICES} | {"a100": "a100-80", "h100sxm": "h100", "v10032": "v100"}
    key = plain.get(re.sub(r"[^a-z0-9]", "", kind.lower()).removesuffix("gb"))
    if device := device_called(kind) if key is None else DEVICES[key]:
        return device
    raise ValueError(f"there is no device {kind!r}; there are {', '.join(DEVICES)}, and cpu, which is measured")


def device_called(name: str) -> Device | None:
    """The device that torch calls ``name``, such as "NVIDIA H100 80GB HBM3"; None for others and parts of one (MIG)."""
    matches = (one for one in DEVICES.values() if re.search(rf"\b(?:{one.torch_name})\b", name, re.IGNORECASE))
    return None if re.search(r"\bMIG\b", name, re.IGNORECASE) else next(matches, None)


def usable_bytes(memory: int) -> int:
    """What training may take of a device's memory; the driver and the allocator's gaps take the rest."""
    return memory * 74 // 80


class Choice(NamedTuple):
    """A way to train."""

    strategy: Strategy  # single (one device), ddp (each holds everything) or fsdp (state is spread)
    recompute: Recompute
    reason: str  # in a sentence for the user
    bytes: int  # what a device then has to hold
    fits: bool


def choose(
    config: ImageGPTConfig,
    batch_size: int,
    devices: int,
    usable: int,
    precision: str = "bf16-mixed",
    compiled: bool = False,
) -> Choice:
    """The first that fits of: DDP, FSDP, then both with selective and with full recomputation; else the smallest.

    FSDP comes before recomputation because gathering weights hides behind computing, whereas computing again does not.
    ``usable`` is what training may take of a device's memory; the rest as in ``training_bytes``.
    """
    strategies: tuple[Strategy, ...] = ("ddp", "fsdp") if devices > 1 else ("single",)
    ways: dict[Choice, dict[str, Any]] = {}
    for how, strategy in itertools.product(RECOMPUTE, strategies):
        options: dict[str, Any] = {"devices": devices, "sharded": strategy == "fsdp", "recompute": how}
        needed = sum(training_bytes(config, batch_size, precision, compiled=compiled, **options).values())
        held = "its share of weights, gradients and optimizer" if strategy == "fsdp" else "the whole network"
        reason = f"each device holds {held}, recompute {how}: {needed / GIB:.1f} of {usable / GIB:.1f} GiB"
        choice = Choice(strategy, how, reason, needed, needed <= usable)
        if choice.fits:
            return choice
        ways[choice] = options
    choice = min(ways, key=lambda one: one.bytes)
    reason = f"{choice.bytes / GIB:.1f} GiB are needed and {usable / GIB:.1f} can be used"
    most = largest_batch(config, usable, precision=precision, compiled=compiled, **ways[choice])
    part = next((size for size in range(most, 0, -1) if batch_size % size == 0), 0)
    cure = f"micro-batches up to {most} fit, so take {part} and accumulate_grad_batches {batch_size // max(part, 1)}"
    more = "not even one image fits: take more or larger devices" + (", or FSDP over several" if devices == 1 else "")
    return choice._replace(reason=f"{reason}: {cure if most else more}")


class Schedule(NamedTuple):
    """Length of a run: images per optimizer step over all devices, and steps."""

    batch_size: int
    steps: int

    @property
    def images(self) -> int:
        """Images seen in the whole run."""
        return self.batch_size * self.steps


PAPER, PAPER_XL = Schedule(128, 1_000_000), Schedule(64, 2_000_000)  # section 3.4


@dataclass(frozen=True)
class Run:
    """A training run on devices of one kind; ``mfu`` is the share of their peak that it reaches, such as 0.45."""

    config: ImageGPTConfig
    schedule: Schedule
    device: Device
    devices: int = 1
    precision: str = "bf16-mixed"
    mfu: float = 0.5

    def __post_init__(self) -> None:
        _check_counts(batch_size=self.schedule.batch_size, steps=self.schedule.steps, devices=self.devices)
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu:g}; it is a share above 0 and up to 1, such as 0.45")
        widths_of(self.precision)
        if self.precision.startswith("bf16") and not self.device.bfloat16:
            cure = "16-mixed or 32-true" if self.device.torch_name else "32-true"  # a CPU has no float16 to train in
            raise ValueError(f"{self.device.name} has no fast bfloat16; take precision {cure}")

    @property
    def tokens(self) -> int:
        """Tokens seen in the whole run."""
        return self.schedule.images * self.config.n_positions

    @property
    def flops(self) -> int:
        """Operations of the run."""
        return self.tokens * train_flops_per_token(self.config)

    @property
    def seconds(self) -> float:
        """Seconds at the stated MFU."""
        return self.flops / (self.devices * self.mfu * self.device.peak(self.precision))

    @property
    def floor_device_seconds(self) -> float:
        """Seconds of the operations alone, those of all devices added."""
        return self.flops / self.device.reached(self.precision)

    @property
    def ceiling_mfu(self) -> float:
        """The MFU that operations and moving what products read and write leave: the most to be hoped for."""
        moved = MOVED_BYTES * self.config.n_embd * self.config.n_layer * self.tokens
        seconds = self.floor_device_seconds + moved / self.device.bandwidth
        return self.flops / (seconds * self.device.peak(self.precision))


def usual_mfu(config: ImageGPTConfig) -> float:
    """What well-tuned training reaches on a data-center GPU, by size."""
    return next(mfu for most, mfu in USUAL_MFU if parameter_count(config) <= most)


def decode_seconds(config: ImageGPTConfig, device: Device, batch_size: int = 1, precision: str = "bf16-mixed") -> float:
    """Floor of drawing one token of each image: a step reads all matrices, and on average half the keys and values."""
    matrices, width = matrix_parameters(config), widths_of(precision).product
    moved = width * matrices + cache_bytes(config, batch_size, width) / 2
    flops = batch_size * (2 * matrices + 2 * config.n_layer * config.n_embd * config.n_positions)
    return max(moved / device.bandwidth, flops / device.reached(precision))
