"""How a network fits on the devices: the least costly strategy that does, and why."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.planning.memory import RECOMPUTE, Recompute, largest_batch, training_bytes

Strategy = Literal["single", "ddp", "fsdp"]
GIB = 2**30


@dataclass(frozen=True)
class Choice:
    """A way to train.

    Attributes:
        strategy: ``single`` for one device, ``ddp`` (each holds everything) or ``fsdp`` (state is spread).
        recompute: What of the activations is computed again: none, selective or full.
        reason: Why, in a sentence for the user.
        bytes: What a device then has to hold.
        fits: Whether it does.
    """

    strategy: Strategy
    recompute: Recompute
    reason: str
    bytes: int
    fits: bool


def choose(
    config: ImageGPTConfig,
    batch_size: int,
    devices: int,
    usable_bytes: int,
    precision: str = "bf16-mixed",
    compiled: bool = False,
    only: Literal["ddp", "fsdp"] | None = None,
) -> Choice:
    """The first that fits of: DDP, FSDP, then both with selective and with full recomputation.

    FSDP comes before recomputation because gathering weights hides behind computing, whereas computing again does not.
    With dropout there is no selective recomputation.

    Args:
        config: The network.
        batch_size: Images that each device computes at once.
        devices: Number of devices.
        usable_bytes: What training may take of a device's memory.
        precision: As :func:`training_bytes` takes it.
        compiled: Blocks are compiled.
        only: The one strategy to consider for several devices; None considers both.

    Returns:
        Where nothing fits, the one that takes least.
    """
    options = {
        (strategy, recompute): sum(
            training_bytes(
                config,
                batch_size,
                precision,
                devices=devices,
                sharded=strategy == "fsdp",
                recompute=recompute,
                compiled=compiled,
            ).values()
        )
        for strategy, recompute in _in_order(config, devices, only)
    }
    for (strategy, recompute), needed in options.items():
        if needed <= usable_bytes:
            reason = _reason(strategy, recompute, needed, usable_bytes, next(iter(options.values())))
            return Choice(strategy, recompute, reason, needed, True)
    (strategy, recompute), needed = min(options.items(), key=lambda item: item[1])
    most = largest_batch(
        config,
        usable_bytes,
        precision=precision,
        devices=devices,
        sharded=strategy == "fsdp",
        recompute=recompute,
        compiled=compiled,
    )
    return Choice(strategy, recompute, _refusal(batch_size, devices, needed, usable_bytes, most), needed, False)


def instead(
    config: ImageGPTConfig,
    batch_size: int,
    devices: int,
    usable_bytes: int,
    precision: str = "bf16-mixed",
    compiled: bool = False,
    only: Literal["ddp", "fsdp"] | None = None,
) -> tuple[int, Choice] | None:
    """What to do in place of computing activations again: the same batch in several parts, gradients accumulated.

    Args:
        config: The network.
        batch_size: Images of each device in an optimiser step.
        devices: Number of devices.
        usable_bytes: What training may take of a device's memory.
        precision: As :func:`training_bytes` takes it.
        compiled: Blocks are compiled.
        only: The one strategy to consider for several devices; None considers both.

    Returns:
        In how few parts nothing has to be computed again, and what :func:`choose` says of a part; where that is never
        so, in how few parts it fits at all; None where the batch as a whole is as good.
    """
    options = list(_in_order(config, devices, only))

    def most(wanted: list[tuple[Strategy, Recompute]]) -> int:
        return max(
            largest_batch(
                config,
                usable_bytes,
                precision=precision,
                devices=devices,
                sharded=strategy == "fsdp",
                recompute=recompute,
                compiled=compiled,
            )
            for strategy, recompute in wanted
        )

    size = most([option for option in options if option[1] == "none"]) or most(options)
    if not size or size >= batch_size:
        return None
    part = largest_divisor(batch_size, size)
    return batch_size // part, choose(config, part, devices, usable_bytes, precision, compiled, only)


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of ``number`` up to ``most``, both at least 1, found in at most ``sqrt(number)`` steps."""
    root = math.isqrt(number)
    for parts in range(-(-number // most), root + 1):
        if number % parts == 0:
            return number // parts
    return next(size for size in range(min(most, root), 0, -1) if number % size == 0)


def _in_order(
    config: ImageGPTConfig, devices: int, only: Literal["ddp", "fsdp"] | None
) -> Iterator[tuple[Strategy, Recompute]]:
    several: tuple[Strategy, ...] = ("ddp", "fsdp") if only is None else (only,)
    for recompute in RECOMPUTE:
        if recompute == "selective" and config.dropout:  # which is full then
            continue
        for strategy in several if devices > 1 else ("single",):
            yield strategy, recompute


def _reason(strategy: Strategy, recompute: Recompute, needed: int, usable: int, plain: int) -> str:
    held = "the device holds everything" if strategy == "single" else "every device holds everything"
    if strategy == "fsdp":
        held = "weights, gradients and optimiser are spread over the devices"
    again = {
        "none": "",
        "selective": ", and all but attention is computed again",
        "full": ", and all is computed again",
    }
    text = f"{held}{again[recompute]}: {needed / GIB:.1f} of {usable / GIB:.1f} GiB"
    return text if needed == plain else f"{text}; without that it would be {plain / GIB:.1f}"


def _refusal(batch_size: int, devices: int, needed: int, usable: int, most: int) -> str:
    text = f"{needed / GIB:.1f} GiB are needed and {usable / GIB:.1f} can be used"
    if not most:
        more = "more or larger devices, or FSDP over several" if devices == 1 else "more or larger devices"
        return f"{text}, and not even one image fits: take {more}"
    fits = largest_divisor(batch_size, most)
    return f"{text}: {most} images fit at once, so take {fits} and accumulate_grad_batches {batch_size // fits}"
