"""Compile the blocks of the network for training, where that saves time."""

import logging
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from lightning_igpt.callbacks.throughput import is_frozen, run_flops
from lightning_igpt.decoding import is_sharded
from lightning_igpt.model import Block

log = logging.getLogger(__name__)

# Operations per second that a run is assumed to reach uncompiled. Assumed, not measured: a resumed run must decide as
# its first part did. Two cores reach 1e11, one data-center GPU about 1e14 in bfloat16.
SPEED = {"cpu": 1e11, "cuda": 1e14}
# Minutes of work above which compiling, which takes about one, saves time. On a GPU others report up to half of the
# time saved (nanoGPT: 250 to 135 ms per step). On a CPU in bfloat16 it saves 15 % (489 to 415 ms, 6 layers x 192 at
# 16 x 16) to 24 % (with AMX); in float32 nothing (639 to 665 ms).
PAYS_FROM = 10


class Decision(NamedTuple):
    """What is done, and why."""

    how: Any
    reason: str
    name: str = "compile"

    def __str__(self) -> str:
        how = {True: "on", False: "off", "none": "off"}.get(self.how, self.how)
        return f"{self.name} {how}" + (f" ({self.reason})" if self.reason else "")


class CompileBlocks(Callback):
    """Compile the blocks of the network with torch.compile while it trains.

    Each block has a compiled ``forward`` from the start of a training batch to its backward pass; validation, sampling
    and probes, whose shapes vary, run uncompiled. Names of parameters stay as they are. If the compiler fails, a
    warning says so and training continues without it. Dropout draws other random numbers; the rest is equal up to
    rounding.

    Args:
        when: True, False, or auto: if the run takes more than about 10 minutes, on a CPU not in float32. The time is
            computed from the network and the steps, so that a resumed run decides like its first part.
        backend: torch.compile's.

    Raises:
        ValueError: ``when`` is something else.
    """

    decision: Decision | None = None  # of the last fit

    def __init__(self, when: bool | Literal["auto"] = "auto", *, backend: str = "inductor") -> None:
        if when not in (True, False, "auto"):
            raise ValueError(f"when is {when!r}; it must be true, false or auto")
        self.when, self.backend = when, backend
        self._compiled: dict[Block, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.decision = self._decide(trainer, pl_module)
        log.info("%s", self.decision)
        blocks = [block for block in blocks_of(pl_module) if self.decision.how and not is_frozen(block)]
        self._compiled = {block: torch.compile(block.forward, backend=self.backend) for block in blocks}
        self._works: bool | None = None  # until the compiler was tried

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Bind the compiled ``forward`` to each block."""
        for block, compiled in self._compiled.items() if self._works is not False else ():
            block.forward = compiled if self._works else partial(self._try, block, block.forward)  # type: ignore[method-assign]

    def _unbind(self, *_: Any, **__: Any) -> None:
        for block in self._compiled:
            vars(block).pop("forward", None)

    on_before_backward = teardown = on_exception = _unbind

    def _try(self, block: Block, plain: Any, *args: Any, **kwargs: Any) -> Any:
        """A ``forward`` that tries the compiler in the first call of the run."""
        if self._works is None:
            self._works = _works(block, self._compiled[block], *args, **kwargs)
        return (self._compiled[block] if self._works else plain)(*args, **kwargs)

    def _decide(self, trainer: Trainer, pl_module: LightningModule) -> Decision:
        blocks = blocks_of(pl_module)
        if all(map(is_frozen, blocks)):
            return Decision(False, "no block of an ImageGPT is trained")
        if any(map(is_sharded, blocks)):
            return Decision(False, f"{type(trainer.strategy).__name__} shards the blocks")
        if self.when != "auto":
            return Decision(self.when, "as set")
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            return Decision(False, f"not tested with {type(trainer.strategy).__name__}")
        return decide(trainer.strategy.root_device.type, run_flops(trainer, pl_module), str(trainer.precision))


def decide(device_type: str, flops: float | None, precision: str) -> Decision:
    """Whether compiling saves time, by the operations of the whole run on one device; None if they are not known."""
    if device_type not in SPEED:
        return Decision(False, f"not tested on {device_type}")
    if device_type == "cpu" and not precision.startswith("bf16"):
        return Decision(False, f"saves nothing in {precision} on a CPU")
    if flops is None:
        return Decision(False, "the length of the run is not known")
    minutes = flops / SPEED[device_type] / 60
    about = f"about {minutes:,.0f} minutes" if minutes >= 1.5 else "less than 2 minutes"
    return Decision(minutes > PAYS_FROM, f"{about} of work at {SPEED[device_type] / 1e12:g} TFLOP/s")


def blocks_of(module: nn.Module) -> list[Block]:
    """The blocks of all networks in a module."""
    return [part for part in module.modules() if isinstance(part, Block)]


def _works(block: Block, compiled: Any, x: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Whether both passes compile; no gradient is kept, no hook of a strategy runs, no random number is used up."""
    devices = [x.device] if x.device.type == "cuda" else []
    # Activation checkpointing must not see the tensors that are saved for this backward pass.
    own: Any = torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved)
    try:
        with torch.random.fork_rng(devices), own:
            y = compiled(x, *args, **kwargs)
            trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
            torch.autograd.grad(y, trained, torch.zeros_like(y))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split("\n")[:2])  # the rest are hints to developers
        log.warning("torch.compile failed, so training runs without it (compile=False avoids this): %s", cause)
        return False
    return True
