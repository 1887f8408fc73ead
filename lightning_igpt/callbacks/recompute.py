"""Keep less of a training step for its backward pass, where the device's memory requires it."""

import logging
from functools import partial
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn

from lightning_igpt.callbacks.compile import CompileBlocks, Decision, blocks_of
from lightning_igpt.callbacks.throughput import images_at_once, is_frozen
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import Block, Recomputing
from lightning_igpt.planning import ACTIVATION_BYTES, GIB, largest_batch, training_bytes, usable_bytes

log = logging.getLogger(__name__)
Decided = partial(Decision, name="activation checkpointing:")


class Recompute(Callback):
    """Activation checkpointing: recompute a part of each block in the backward pass instead of keeping it.

    Loss and gradients stay the same, bit for bit. The setting applies to training only and is not saved. With ``full``
    a step computes the forward pass of the blocks twice, a third more in all; ``selective`` keeps the output of
    attention's kernel, which then runs once. With dropout, ``selective`` becomes ``full``.

    Args:
        when: ``none``, ``selective``, ``full``; or ``auto``: on a CUDA device the first of them that fits into its
            memory, computed from network, batch size, precision and strategy; elsewhere none. A network's own setting
            stays.

    Raises:
        ValueError: ``when`` is something else.
    """

    decision: Decision | None = None  # of the last fit

    def __init__(self, when: Literal["auto", "none", "selective", "full"] = "auto") -> None:
        if when not in ("auto", *get_args(Recomputing)):
            raise ValueError(f"recompute is {when!r}; it must be auto, {', '.join(get_args(Recomputing))}")
        self.given = None if when == "auto" else Decided(when, "as set")
        self._before: list[tuple[Block, Recomputing]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()
        self.decision = self._decide(trainer, pl_module)
        log.info("%s", self.decision)
        self._before = [(block, block.recompute) for block in blocks_of(pl_module)]
        for block, _ in self._before:
            block.recompute = self.decision.how

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()
        in_fit = trainer.state.fn == TrainerFn.FITTING and pl_module.automatic_optimization
        if isinstance(exception, torch.OutOfMemoryError) and in_fit:
            ours = hasattr(getattr(trainer, "datamodule", None), "needs_labels")
            log.error("%s", out_of_memory(images_at_once(trainer), trainer.accumulate_grad_batches, ours))

    def _restore(self, *_: Any, **__: Any) -> None:
        for block, before in self._before:
            block.recompute = before
        self._before = []

    teardown = _restore

    def _decide(self, trainer: Trainer, pl_module: LightningModule) -> Decision:
        blocks, config = blocks_of(pl_module), getattr(pl_module, "config", None)
        if not isinstance(config, ImageGPTConfig) or all(map(is_frozen, blocks)):
            return Decided("none", "no block of an ImageGPT is trained")
        if self.given is not None:
            return self.given
        by_hand = next((block.recompute for block in blocks if block.recompute != "none"), None)
        if by_hand is not None:
            return Decided(by_hand, "as the network is set")
        device, batch_size = trainer.strategy.root_device, images_at_once(trainer)
        if device.type != "cuda":
            return Decided("none", "")  # only the memory of a GPU is known
        if batch_size is None:
            return Decided("none", "the batch size is not known")
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        compiling = (callback.decision for callback in callbacks if isinstance(callback, CompileBlocks))
        precision = str(trainer.precision)
        return decide(
            config,
            batch_size,
            usable_bytes(torch.cuda.get_device_properties(device).total_memory),
            precision=precision if precision in ACTIVATION_BYTES else "32-true",  # which takes most
            devices=trainer.world_size,
            sharded=not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)),
            compiled=any(decision is not None and decision.how for decision in compiling),
        )


def out_of_memory(size: int | None, parts: int, ours: bool) -> str:
    """What to set where ``size`` images at once, accumulated ``parts`` times, do not fit; ``ours`` divides a step."""
    step = (size or 0) * parts
    more = next((number for number in range(parts + 1, step + 1) if step % number == 0), None)
    if more is None:
        least = "one image" if size == 1 else "an unknown number of images"
        return f"out of memory with {least} at once; set recompute=full, strategy=fsdp2, or take a smaller network"
    rest = "same batch_size, same training" if ours else f"with batch_size={step // more} for the loader, same training"
    cure = f"accumulate_grad_batches={more} ({step // more} at once, {rest})"
    return f"out of memory with {size} images at once; set {cure}"


def decide(config: ImageGPTConfig, batch_size: int, usable: int, **options: Any) -> Decision:
    """The least recomputation that fits ``usable`` bytes, ``full`` where none does; options of ``training_bytes``."""
    needed: dict[Recomputing, int] = {}
    for how in get_args(Recomputing):
        if how == "selective" and config.dropout:  # which is full then
            continue
        needed[how] = sum(training_bytes(config, batch_size, recompute=how, **options).values())
        others = [f"; {name} would take {size / GIB:.1f}" for name, size in needed.items() if name != how]
        reason = f"about {needed[how] / GIB:.1f} of {usable / GIB:.1f} GiB{''.join(others)}"
        if needed[how] <= usable:
            return Decided(how, reason)
    most = largest_batch(config, usable, recompute="full", **options)
    cure = f"a micro-batch of {most} would" if most else "not even one image does: shard the state over devices (FSDP2)"
    return Decided("full", f"{reason}, which does not fit; {cure}")
