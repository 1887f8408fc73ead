"""What a whole run takes on given devices: time, data, files; what decoding takes; and the paper's own schedule.

A floor is what no program can undercut on the device: every operation at the speed of a large product, every byte at
that of a large copy, nothing waiting for anything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.planning.costs import (
    forward_flops_per_token,
    matrix_parameters,
    parameter_count,
    train_flops_per_token,
)
from lightning_igpt.planning.devices import Device
from lightning_igpt.planning.memory import widths_of

MOVED_BYTES = 200  # per token, layer and unit of width, from and to the device's memory; an estimate
JPEG_PER_CORE = 446  # images a second and core: JPEG of 500 x 375 pixels, decoded and resized to 32 x 32
IMAGENET = 1_281_167  # training images
V100_DAYS = 2500  # of OpenAI's run of L, https://openai.com/index/image-gpt
V100_FLOPS = 125e12  # a second, by NVIDIA's data sheet
USUAL_MFU = ((200e6, 0.33), (900e6, 0.45), (float("inf"), 0.50))  # up to so many parameters: S, M, L and XL
CPU_MFU = 0.60  # of the CPU's own speed, measured in the same minute


@dataclass(frozen=True)
class Schedule:
    """Length of a run: images per optimiser step over all devices, and steps."""

    batch_size: int
    steps: int

    @property
    def images(self) -> int:
        """Images seen in the whole run."""
        return self.batch_size * self.steps


PAPER, PAPER_XL = Schedule(128, 1_000_000), Schedule(64, 2_000_000)  # section 3.4


@dataclass(frozen=True)
class Run:
    """A training run.

    Args:
        config: The network.
        schedule: Its length.
        device: What each of the devices is.
        devices: How many there are.
        precision: As ``training_bytes`` takes it.
        mfu: Share of the device's peak that training reaches, between 0 and 1; see :func:`usual_mfu`.

    Raises:
        ValueError: A number is out of range, or the device cannot compute in the precision.
    """

    config: ImageGPTConfig
    schedule: Schedule
    device: Device
    devices: int = 1
    precision: str = "bf16-mixed"
    mfu: float = 0.5

    def __post_init__(self) -> None:
        for name in ("batch_size", "steps"):
            if getattr(self.schedule, name) < 1:
                raise ValueError(f"{name} is {getattr(self.schedule, name)}; it must be at least 1")
        if self.devices < 1:
            raise ValueError(f"devices is {self.devices}; it must be at least 1")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu is {self.mfu:g}; it is a share above 0 and up to 1, such as 0.45")
        widths_of(self.precision)
        if self.precision.startswith("bf16") and not self.device.bfloat16:
            one = self.device.name
            if not self.device.torch_name:  # the CPU at hand, which has no float16 to train in either
                raise ValueError(f"{one} is no faster in bfloat16; take precision 32-true")
            raise ValueError(f"a {one} has no bfloat16; take precision 16-mixed or 32-true")

    @property
    def tokens(self) -> int:
        """Tokens seen in the whole run."""
        return self.schedule.images * self.config.n_positions

    @property
    def flops_per_step(self) -> int:
        """Operations of an optimiser step, all devices together."""
        return self.schedule.batch_size * self.config.n_positions * train_flops_per_token(self.config)

    @property
    def flops(self) -> int:
        """Operations of the run."""
        return self.schedule.steps * self.flops_per_step

    @property
    def device_seconds(self) -> float:
        """Seconds at the stated MFU, those of all devices added."""
        return self.flops / (self.mfu * self.device.peak(self.precision))

    @property
    def seconds(self) -> float:
        """Seconds at the stated MFU."""
        return self.device_seconds / self.devices

    @property
    def floor_device_seconds(self) -> float:
        """Seconds of the operations alone, those of all devices added."""
        return self.flops / self.device.reached(self.precision)

    @property
    def memory_device_seconds(self) -> float:
        """Seconds of moving what products read and write, which nothing hides; an estimate."""
        moved = MOVED_BYTES * self.config.n_embd * self.config.n_layer * self.tokens
        return moved / self.device.reached_bandwidth

    @property
    def ceiling_mfu(self) -> float:
        """The MFU that operations and memory leave: the most to be hoped for."""
        seconds = self.floor_device_seconds + self.memory_device_seconds
        return self.flops / (seconds * self.device.peak(self.precision))

    @property
    def images_per_second(self) -> float:
        """Images that all devices together consume at the stated MFU."""
        return self.schedule.images / self.seconds

    @property
    def decoding_cores(self) -> float:
        """Cores that keep up with it while decoding JPEG files on the fly."""
        return self.images_per_second / JPEG_PER_CORE

    @property
    def forward_images_per_second(self) -> float:
        """Floor of extracting features, as a probe does: images per second of one device."""
        return self.device.reached(self.precision) / (self.config.n_positions * forward_flops_per_token(self.config))


def usual_mfu(config: ImageGPTConfig) -> float:
    """What well-tuned training reaches on a data-centre GPU, by size."""
    return next(mfu for most, mfu in USUAL_MFU if parameter_count(config) <= most)


def checkpoint_bytes(config: ImageGPTConfig, precision: str = "bf16-mixed") -> int:
    """Weights and Adam's two moments in a file; palette, counters and names add little."""
    return 3 * widths_of(precision).weight * parameter_count(config)


def weights_bytes(config: ImageGPTConfig) -> int:
    """Weights alone in a file, in float32."""
    return 4 * parameter_count(config)


def token_bytes(config: ImageGPTConfig, images: int = IMAGENET) -> int:
    """A token cache of so many images."""
    return 2 * config.n_positions * images


def cache_bytes(config: ImageGPTConfig, batch_size: int = 1, width: int = 2) -> int:
    """Keys and values of whole images in sampling.

    Args:
        config: The network.
        batch_size: Images side by side.
        width: Bytes of a value.
    """
    return 2 * config.n_layer * config.n_embd * config.n_positions * batch_size * width


def decode_seconds(config: ImageGPTConfig, device: Device, batch_size: int = 1, precision: str = "bf16-mixed") -> float:
    """Floor of sampling one pixel of each of ``batch_size`` images, on one device, at the mean position.

    Every step reads all matrices, and the keys and values so far, which are half an image's on the mean.
    """
    matrices, width = matrix_parameters(config), widths_of(precision).product
    moved = width * matrices + cache_bytes(config, batch_size, width) / 2
    flops = batch_size * (2 * matrices + 2 * config.n_layer * config.n_embd * config.n_positions)
    return max(moved / device.reached_bandwidth, flops / device.reached(precision))


def paper_size(config: ImageGPTConfig) -> str | None:
    """S, M, L or XL, if the network has its depth and width."""
    for name in ("s", "m", "l", "xl"):
        preset = PRESETS[f"igpt_{name}"]
        if (config.n_layer, config.n_embd) == (preset.n_layer, preset.n_embd):
            return name.upper()
    return None


def paper_flops(config: ImageGPTConfig) -> int | None:
    """Operations of the paper's run of this size and objective, at its resolution; None for a size of one's own."""
    size = paper_size(config)
    if size is None:
        return None
    side = 64 if size == "XL" else 32
    trained = replace(PRESETS[f"igpt_{size.lower()}"], image_size=side, objective=config.objective)
    return paper_schedule(config).images * trained.n_positions * train_flops_per_token(trained)


def paper_schedule(config: ImageGPTConfig) -> Schedule:
    """How long the paper trained a network of this size; for any other size, as it trained S, M and L."""
    return PAPER_XL if paper_size(config) == "XL" else PAPER
