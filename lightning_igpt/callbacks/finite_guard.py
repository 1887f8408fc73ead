"""Stop where the loss or the gradient is no number, before such weights reach a file; or go back to the last file.

Losses and gradient norms wait on the device. They are read now and then, and before all that may not meet bad weights:
a checkpoint, validation, the end. All processes read together and see the same numbers, so that all of them stop, go
back, or go on.
"""

from __future__ import annotations

import logging
import math
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_igpt.callbacks.rewinding import check_rewind, last_checkpoint, put_back, read

log = logging.getLogger(__name__)


class NonFiniteError(ValueError):
    """Loss, gradient or weights are not finite, or the loss has jumped too often."""


class Step(NamedTuple):
    """What an optimiser step leaves to be judged; tensors stay on the device."""

    number: int  # optimiser steps with this one
    losses: list[Tensor]  # () each: of the micro-batches, divided by ``accumulation``
    samples: list[Any]  # of the micro-batches; None where the loader does not number them
    accumulation: int
    norm: Tensor | None  # (): of the gradient, before clipping; None under a GradScaler
    rates: list[Any]  # learning rates


class FiniteGuard(Callback):
    """Stop training where loss or gradient is not finite, and let no such state into a checkpoint.

    The error names the optimiser step, the samples of its batches, loss, gradient norm, learning rate and the last good
    checkpoint. Before a checkpoint is written, whoever asks for it, and be it after an error, all steps so far are
    judged and the weights themselves. Good runs are what they would be without the callback, to the last bit.

    With ``rewind`` the run goes on by itself: weights and optimiser go back to the last checkpoint that was written or
    resumed from, the learning rate stays on its schedule, and the next batches follow, so that those since the
    checkpoint are passed over. Steps keep counting. Resumed from that checkpoint, a run does all of it again.

    Under a GradScaler (16-mixed) losses alone count: it skips steps whose gradients are not finite, as its normal work.
    Idle beside modules that optimise by hand, as ProbeModule does with L-BFGS.

    Args:
        patience: Bad optimiser steps in a row at which to stop. More than 1 is for runs whose weights outlive a bad
            step, as under a GradScaler; without one, a checkpoint that is due in between stops the run, too.
        check_every: Optimiser steps between looks at the losses, each of which waits for the device. Default: 1 on a
            CPU, else 20. Checkpoints, validation and the end bring a look of their own.
        rewind: Go back to the last checkpoint and on, instead of stopping; on one device or with DDP.
        spike: With rewind: go back also where the loss lies more than so many standard deviations above the mean of
            the last ``window`` losses. Default: only where it is not finite.
        window: Optimiser steps whose losses tell what a spike is; before there are so many, nothing is one.
        max_rewinds: Times to go back in a run, its earlier parts included, before it stops after all.

    Raises:
        ValueError: A setting is out of range, or spike is given without rewind.
    """

    def __init__(
        self,
        patience: int = 1,
        check_every: int | None = None,
        *,
        rewind: bool = False,
        spike: float | None = None,
        window: int = 100,
        max_rewinds: int = 3,
    ) -> None:
        every = 1 if check_every is None else check_every
        counts = {"patience": patience, "check_every": every, "window": window, "max_rewinds": max_rewinds}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if spike is not None and not spike > 0:
            raise ValueError(f"spike is {spike}; it must be above 0")
        if spike is not None and not rewind:
            raise ValueError(f"spike is {spike}, but a spike is no reason to stop; set rewind=True to go back from it")
        self.patience, self.check_every, self.rewind = patience, check_every, rewind
        self.spike, self.window, self.max_rewinds = spike, window, max_rewinds
        self._muted: list[Any] = []  # checkpoint callbacks that were told not to save after an error
        self._begin()

    def _begin(self) -> None:
        self._samples: Any = None  # of the batch that came last
        self._under_way: list[tuple[Tensor, Any]] = []  # losses and samples since the last optimiser step
        self._steps: list[Step] = []  # those not judged yet
        self._judged: Step | None = None  # the last that was
        self._bad = 0  # steps in a row
        self._first_bad: Step | None = None  # of these
        self._losses: deque[float] = deque(maxlen=self.window)
        self._rewinds = 0
        self._error: NonFiniteError | None = None  # that ended the run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Get in front of all that saves; a ValueError says where ``rewind`` cannot work with the trainer."""
        if stage != "fit":
            return
        if self.rewind and pl_module.automatic_optimization:
            check_rewind(trainer)
        self._begin()
        while self._muted:
            self._muted.pop().save_on_exception = True
        io: Any = trainer.strategy.checkpoint_io
        if getattr(io, "last", None) is not None:
            io.last = None  # of an earlier run
        # on_save_checkpoint would come too late to go back, and not at all for files of weights alone.
        self.teardown(trainer, pl_module, stage)
        save = trainer.save_checkpoint

        def save_checkpoint(*args: Any, **kwargs: Any) -> None:
            self._vouch(trainer)
            save(*args, **kwargs)

        trainer.save_checkpoint = save_checkpoint  # type: ignore[method-assign]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        vars(trainer).pop("save_checkpoint", None)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._samples = batch.get("sample") if isinstance(batch, Mapping) else None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Keep the loss of a micro-batch."""
        if not pl_module.automatic_optimization:
            return
        loss, scaler = _whole(loss.detach()).reshape(()), _scaler(trainer)
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        self._under_way.append((loss, self._samples))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Keep the norm of the gradient."""
        if not self._under_way:
            return
        losses, samples = map(list, zip(*self._under_way, strict=True))
        norm = None if _scaler(trainer) is not None else _norm(optimizer)
        rates = [group["lr"] for group in optimizer.param_groups]
        rates = [rate.clone() if isinstance(rate, Tensor) else rate for rate in rates]  # schedules change tensors
        number, accumulation = trainer.global_step + 1, trainer.accumulate_grad_batches
        self._steps.append(Step(number, losses, samples, accumulation, norm, rates))
        self._under_way = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look, if it is time."""
        usual = 1 if trainer.strategy.root_device.type == "cpu" else 20
        if self._steps and trainer.global_step % (self.check_every or usual) == 0:
            self._look(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._vouch(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._vouch(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell checkpoint callbacks, whose turn is next, not to save a bad state: they would hide this exception."""
        savers: list[Any] = [one for one in trainer.checkpoint_callbacks if getattr(one, "save_on_exception", False)]
        if savers and self._failure(trainer):
            log.warning("no checkpoint is written after this error: the state is not finite, or cannot be read")
            for one in savers:
                one.save_on_exception = False
            self._muted += savers

    def state_dict(self) -> dict[str, Any]:
        """Plain values; nothing where no later step depends on them."""
        if not (self.rewind or self._bad):
            return {}
        return {"rewinds": self._rewinds, "bad": self._bad, "losses": list(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rewinds, self._bad = state_dict["rewinds"], state_dict["bad"]
        self._losses = deque(state_dict["losses"], maxlen=self.window)

    def _look(self, trainer: Trainer) -> None:
        """Judge the steps that wait."""
        if trouble := self._judge(trainer):
            self._deal_with(trouble, trainer)

    def _vouch(self, trainer: Trainer) -> None:
        """Go back or raise, unless the state may be kept."""
        if not trainer.interrupted:
            if trouble := self._trouble(trainer):
                self._deal_with(trouble, trainer)
        elif error := self._failure(trainer):
            # Someone saves while an error is on its way to the user: that one shall arrive, and no other.
            raise sys.exc_info()[1] or error

    def _failure(self, trainer: Trainer) -> NonFiniteError | None:
        """What is wrong with the state after an error, as far as this process knows."""
        try:
            trouble = "" if self._error else self._trouble(trainer)
        except Exception as error:  # such as any use of a GPU that has failed
            trouble = f"the weights cannot be read: {error}"
        self._error = NonFiniteError(trouble) if trouble else self._error
        return self._error

    def _trouble(self, trainer: Trainer) -> str:
        """What speaks against keeping the state, if anything: the steps so far, or the weights after them."""
        if not (trainer.optimizers and trainer.lightning_module.automatic_optimization):
            return ""
        if trouble := self._judge(trainer):
            return trouble
        if self._bad and _scaler(trainer) is None:
            return _report("loss or gradient is not finite", self._first_bad, trainer)
        bad = not _finite(parameter for optimizer in trainer.optimizers for parameter in _parameters(optimizer))
        if not trainer.interrupted:
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        return _report("the weights are not finite after it", self._judged, trainer) if bad else ""

    def _judge(self, trainer: Trainer) -> str:
        """Read the steps that wait; says what is wrong, if anything, with the first that is one too many."""
        steps, self._steps = self._steps, []
        if not steps:
            return ""
        values = [value for step in steps for value in (*step.losses, step.norm) if value is not None]
        wide = [value.to(values[0].device, torch.promote_types(value.dtype, torch.float)) for value in values]
        table = torch.stack(wide)
        if trainer.world_size > 1 and not trainer.interrupted:  # after an error the others may not be there
            table = trainer.strategy.reduce(table, reduce_op="mean")  # finite only where it is on every process
        numbers: Iterator[float] = iter(table.tolist())
        for step in steps:
            loss = sum(next(numbers) for _ in step.losses) * step.accumulation / len(step.losses)
            norm = 0.0 if step.norm is None else next(numbers)
            self._judged = step
            if what := self._verdict(step, loss, norm):
                return _report(what, self._first_bad or step, trainer)
        return ""

    def _verdict(self, step: Step, loss: float, norm: float) -> str:
        wrong = [name for name, value in {"loss": loss, "gradient": norm}.items() if not math.isfinite(value)]
        if wrong:
            self._bad += 1
            self._first_bad = self._first_bad or step
            what = f"{' and '.join(wrong)} not finite" + (f", {self._bad} steps in a row" if self._bad > 1 else "")
            return what if self._bad >= self.patience else ""
        self._bad, self._first_bad = 0, None
        if self.spike is None:
            return ""
        if len(self._losses) == self.window:
            mean = math.fsum(self._losses) / self.window
            deviation = math.sqrt(math.fsum((one - mean) ** 2 for one in self._losses) / self.window)
            if loss > mean + self.spike * deviation:
                return f"a spike; the last {self.window} losses have mean {mean:.4g} and deviation {deviation:.2g}"
        self._losses.append(loss)
        return ""

    def _deal_with(self, trouble: str, trainer: Trainer) -> None:
        """Go back, or raise."""
        last, kept = last_checkpoint(trainer)
        cure = "or let FiniteGuard(rewind=True) go back to the last checkpoint and pass over these batches"
        if self.rewind:
            obstacle = self._go_back(trainer, last)
            if not obstacle:
                count = f"{self._rewinds} of at most {self.max_rewinds}"
                log.warning("%s\nBack to %s and on with the next batches, %s.", trouble, last, count)
                return
            kept, cure = f"{kept}; {obstacle}", "or look at these samples"
        self._error = NonFiniteError(f"{trouble}\n{kept}. Lower lr, set or lower gradient_clip_val, {cure}.")
        raise self._error

    def _go_back(self, trainer: Trainer, last: str | Path | None) -> str:
        """Put back what the checkpoint holds, on all processes or none; says what is in the way, if anything."""
        if self._rewinds >= self.max_rewinds:
            return f"the run has gone back {self._rewinds} times, and max_rewinds is {self.max_rewinds}"
        if last is None:
            return "without one there is no way back"
        with torch.inference_mode(False):  # validation has it on, and tensors made then cannot be trained
            checkpoint, obstacle = read(trainer, last)
            if trainer.strategy.reduce_boolean_decision(bool(obstacle), all=False):
                return obstacle or "another process cannot read it"
            put_back(trainer, checkpoint)
        mine = checkpoint.get("callbacks", {}).get(self.state_key, {})
        self._losses = deque(mine.get("losses", []), maxlen=self.window)  # what a spike was then
        self._rewinds, self._bad, self._first_bad, self._under_way = self._rewinds + 1, 0, None, []
        return ""


def _report(what: str, step: Step | None, trainer: Trainer) -> str:
    """The step as this process saw it; waits for the device."""
    if step is None:
        return f"before the first optimiser step: {what}"
    losses = [float(loss) * step.accumulation for loss in step.losses]
    norm = "left out under a GradScaler" if step.norm is None else f"{float(step.norm):.4g}"
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy)):
        norm = "left out, since each process has a part of it"
    place = f" (process {trainer.global_rank} of {trainer.world_size})" if trainer.world_size > 1 else ""
    rate = max(float(rate) for rate in step.rates)
    numbers = f"loss {sum(losses) / len(losses):.4g}, gradient norm {norm}, learning rate {rate:.4g}"
    lines = [f"optimiser step {step.number}{place}: {what}", numbers]
    for number, (loss, samples) in enumerate(zip(losses, step.samples, strict=True), 1):
        which = f"micro-batch {number} of {len(losses)}: loss {loss:.4g}, " if len(losses) > 1 else ""
        listed = samples.tolist() if isinstance(samples, Tensor) else samples or ["without numbers"]
        lines.append(f"{which}samples {', '.join(map(str, listed))}")
    return "\n".join(lines)


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _norm(optimizer: Optimizer) -> Tensor:
    """Norm of all gradients together; sharded ones (DTensor) count whole, for which all processes compute together."""
    meshes: dict[Any, list[Tensor]] = {}  # norms on different meshes do not go into one tensor
    for gradient in (parameter.grad for parameter in _parameters(optimizer)):
        if gradient is not None and not gradient.is_sparse:
            meshes.setdefault(getattr(gradient, "device_mesh", None), []).append(gradient)
    norms = [_whole(get_total_norm(gradients)) for gradients in meshes.values()]
    return norms[0] if len(norms) == 1 else get_total_norm(norms)


def _finite(parameters: Iterable[Tensor]) -> bool:
    """Whether all parameters are, or this process's parts of them; waits for the device."""
    parts: list[Any] = [parameter.detach() for parameter in parameters]
    parts = [part.to_local() if hasattr(part, "to_local") else part for part in parts]
    parts = [part for part in parts if part.numel()]
    # The usual norm is several times faster on a CPU, but overflows long before the weights do.
    return any(bool(get_total_norm(parts, order).isfinite()) for order in (2, math.inf))


def _whole(value: Any) -> Tensor:
    """A value that each process has a part of (DTensor), complete; any other as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[no-any-return]
