"""Compile the blocks of the network for training, where that pays."""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from lightning_igpt.callbacks.throughput import flops_per_image, is_frozen
from lightning_igpt.decoding import is_sharded
from lightning_igpt.model import Block

log = logging.getLogger(__name__)

# Operations per second that a run is assumed to reach uncompiled. Assumed, not measured: a resumed run must decide as
# its first part did. Two cores reach 1e11 in float32, one data-centre GPU about 1e14 in bfloat16.
SPEED = {"cpu": 1e11, "cuda": 1e14}
# Seconds of work from which compiling pays. On a GPU others report up to half of the time saved (nanoGPT: 250 to
# 135 ms per step), for a minute or so of compiling; not measured here. On two cores in float32 it saves 4 to 6 %
# (docs/experiments.md): products and attention are nine tenths of a step, and are what they were.
PAYS_FROM = {"cpu": 3600.0, "cuda": 600.0}


class Decision(NamedTuple):
    """Whether to compile, and why."""

    compile: bool
    reason: str

    def __str__(self) -> str:
        return f"compile {'on' if self.compile else 'off'} ({self.reason})"


class CompileBlocks(Callback):
    """Compile the blocks of the network with torch.compile while it trains.

    Only steps of training run compiled; validation, sampling and probes, whose shapes vary, run as ever. Parameters
    keep their names, checkpoints hold nothing of it, and after the fit the network is as it was. One compilation serves
    all blocks. Where the compiler fails, a warning says so and training goes on without it. Dropout draws other random
    numbers than uncompiled; all else is equal up to rounding.

    Args:
        when: True, False, or auto: on a GPU if the run takes more than about 10 minutes, on a CPU if more than an hour,
            and a compiler is there. How long it takes is reckoned from the network and the steps, not timed, so that a
            resumed run decides as its first part did.
        backend: torch.compile's.

    Raises:
        ValueError: ``when`` is something else.
    """

    decision: Decision | None = None  # of the last fit

    def __init__(self, when: bool | Literal["auto"] = "auto", *, backend: str = "inductor") -> None:
        if when not in (True, False, "auto"):
            raise ValueError(f"when is {when!r}; it must be true, false or auto")
        self.when, self.backend = when, backend

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_off(pl_module)
        self.decision = self._decide(trainer, pl_module)
        log.info("%s", self.decision)
        if self.decision.compile:
            compile_blocks(pl_module, self.backend)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._take_off(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._take_off(pl_module)

    def _take_off(self, pl_module: LightningModule) -> None:
        for block in blocks_of(pl_module):
            block._compiled_call_impl = None

    def _decide(self, trainer: Trainer, pl_module: LightningModule) -> Decision:
        if all(is_frozen(block) for block in blocks_of(pl_module)):
            return Decision(False, "no block of an ImageGPT is trained")
        if any(is_sharded(block) for block in blocks_of(pl_module)):
            return Decision(False, f"{type(trainer.strategy).__name__} shards the blocks")
        if self.when != "auto":
            return Decision(self.when, "as told")
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            return Decision(False, f"untried with {type(trainer.strategy).__name__}")
        device = trainer.strategy.root_device
        return decide(device.type, run_flops(trainer, pl_module), missing_compiler(device))


def decide(device_type: str, flops: float | None, missing: str | None) -> Decision:
    """Whether compiling pays.

    Args:
        device_type: ``cpu``, ``cuda`` or another, on which it is left out.
        flops: Operations of the whole run on one device; None where its length is not known.
        missing: What compiling needs and does not find, if anything.
    """
    if device_type not in SPEED:
        return Decision(False, f"untried on {device_type}")
    if missing is not None:
        return Decision(False, missing)
    if flops is None:
        return Decision(False, "how long the run is, nobody says")
    speed = SPEED[device_type]
    seconds = flops / speed
    return Decision(seconds > PAYS_FROM[device_type], f"about {duration(seconds)} of work at {speed / 1e12:g} TFLOP/s")


def run_flops(trainer: Trainer, module: Any) -> float | None:
    """Operations of the whole run on one device, earlier parts of a resumed run included.

    None where the number of steps or of images per step is not known.
    """
    size = images_at_once(trainer)
    steps, flops = trainer.estimated_stepping_batches, flops_per_image(module)
    if size is None or flops is None or not 0 < steps < math.inf:
        return None
    return float(steps) * trainer.accumulate_grad_batches * size * flops


def images_at_once(trainer: Trainer) -> int | None:
    """The batch size of one device, where data module or loader tell it."""
    sizes = (getattr(place, "batch_size", None) for place in (_datamodule(trainer), trainer.train_dataloader))
    return next((size for size in sizes if isinstance(size, int)), None)


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile needs on the device and does not find, or None."""
    if device.type == "cpu":
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        return None if shutil.which(os.environ.get("CXX") or usual) else "there is no C++ compiler"
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "triton needs a newer GPU"
        if not any(map(shutil.which, filter(None, (os.environ.get("CC"), "gcc", "clang", "cl")))):
            return "there is no C compiler, which triton needs"
    return None


def duration(seconds: float) -> str:
    """Seconds in words, roughly: "40 seconds", "3 minutes", "14 hours", "5 days"."""
    units = (("day", 86_400, 172_800), ("hour", 3600, 7200), ("minute", 60, 60), ("second", 1, 0))
    name, length = next((name, length) for name, length, least in units if seconds >= least)
    count = max(1, round(seconds / length))
    return f"{count:,} {name}{'' if count == 1 else 's'}"


class _Compiler:
    """Makes blocks run compiled where a step of training calls them, and as ever everywhere else."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.works: bool | None = None  # None until it was tried

    def wrapped(self, block: Block) -> Callable[..., Any]:
        """What to call in place of the block."""
        plain: Any = block._call_impl
        compiled: Any = torch.compile(plain, backend=self.backend)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not (block.training and torch.is_grad_enabled()) or self.works is False:
                return plain(*args, **kwargs)
            if self.works is None:
                self.works = _works(block, compiled, *args, **kwargs)
            return (compiled if self.works else plain)(*args, **kwargs)

        return call


def _works(block: Block, compiled: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether both passes compile, seen before anything of the step depends on it; the step itself then need not.

    No gradient is kept, no hook of a distributed strategy runs, and no random number of the run is used up.
    """
    devices = [x.device] if x.device.type == "cuda" else []
    # The tensors saved for this backward pass are nobody else's, such as those of activation checkpointing.
    own: Any = torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)
    try:
        with torch.random.fork_rng(devices), own:
            y = compiled(x, *args, **kwargs)
            trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
            torch.autograd.grad(y, trained, torch.zeros_like(y))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        said = " ".join([*str(error).split("\n")[:2], f"({type(error).__name__})"])  # the rest are hints to developers
        log.warning("torch.compile failed, and training goes on without; --trainer.compile false avoids this: %s", said)
        return False
    return True


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def compile_blocks(module: nn.Module, backend: str = "inductor") -> None:
    """Let the blocks of a module run compiled where training calls them; no other call changes."""
    compiler = _Compiler(backend)
    for block in blocks_of(module):
        block._compiled_call_impl = compiler.wrapped(block)


def blocks_of(module: nn.Module) -> list[Block]:
    """The blocks of all networks in a module."""
    return [part for part in module.modules() if isinstance(part, Block)]


def _datamodule(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)
