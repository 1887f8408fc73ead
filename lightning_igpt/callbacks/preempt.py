"""Save and leave when a scheduler asks the run to stop.

Lightning 2.6 ends a run on SIGTERM without a checkpoint and with exit status 0; its handler makes collective calls, so
that several processes hang; and under several processes it waits for the device at every batch to look for a signal.
"""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

log = logging.getLogger(__name__)

FILE = "preempted.ckpt"
STOP, REQUEUE = 1, 2  # what processes tell each other


class Preempt(Callback):
    """On SIGTERM or SIGUSR1, finish the optimiser step, save ``preempted.ckpt`` and leave with an exit status.

    A signal to one process of several stops all of them, at the same step. They ask each other after every optimiser
    step, beside the training and without waiting for the device. A signal within a validation stops that, and the
    resumed run does it from the beginning; with Lightning's WeightAveraging it is finished first. In the last step of a
    run it is too late to save time: the run ends as planned.

    Under SLURM with Lightning's automatic requeueing, the requeue signal saves Lightning's ``hpc_ckpt_<n>.ckpt`` and
    has the job requeued, as Lightning does, but between steps.

    Args:
        signals: Names of the signals, such as SIGTERM.
        exit_status: Of the process. Schedulers take 143 for "ended by SIGTERM", and nothing but 0 for success.

    Raises:
        ValueError: A signal does not exist here, or the exit status would mean success.
    """

    _asked = 0  # STOP, REQUEUE, or 0 while no signal came
    _signal = ""
    _group: Any = None  # processes agree through this one, on CPUs
    _agreement: tuple[Any, torch.Tensor] | None = None  # under way since the last step
    _steps = 0  # optimiser steps when this fit began
    _validation_agrees = False

    def __init__(self, signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1"), exit_status: int = 143) -> None:
        unknown = [name for name in signals if not hasattr(signal, name) or name in ("SIGKILL", "SIGSTOP")]
        if unknown:
            raise ValueError(f"signals has {', '.join(unknown)}, which no process here can catch; name others")
        if not 0 < exit_status < 256:
            raise ValueError(f"exit_status is {exit_status}; it must be from 1 to 255, since 0 means success")
        self.signals, self.exit_status = signals, exit_status

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._asked, self._signal, self._group, self._agreement = 0, "", None, None
        # Others, such as OnlineProbe, do their part of a step in on_train_batch_end: after it the step is complete.
        others = [one for one in trainer.callbacks if one is not self]  # type: ignore[attr-defined]
        place = len([one for one in others if not isinstance(one, Checkpoint)])
        trainer.callbacks = [*others[:place], self, *others[place:]]  # type: ignore[attr-defined]

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)
        self._steps = trainer.global_step
        if trainer.world_size > 1 and dist.is_initialized():
            self._group = dist.new_group(backend="gloo")
            # Replaced by our own, which waits for no device.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._listen(trainer)
        elif self._group is not None and not trainer.sanity_checking:
            count = float(sum(trainer.num_val_batches))
            counts = torch.tensor([count, -count])
            dist.all_reduce(counts, dist.ReduceOp.MAX, group=self._group)
            self._validation_agrees = bool(counts[0] == -counts[1])  # else some would wait for the others for ever

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._listen(trainer)

    on_predict_start = on_test_start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop.epoch_loop._should_accumulate():
            return
        asked = self._agreed()
        if asked and not _ends_anyway(trainer):
            self._leave(trainer, asked)

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._leave_evaluation(trainer)
        elif trainer.sanity_checking:
            if self._asked and trainer.world_size == 1:
                raise SystemExit(self.exit_status)
        elif (self._group is None or self._validation_agrees) and not (_ends_anyway(trainer) or _averages(trainer)):
            asked = self._agreed()
            if asked:
                self._leave(trainer, asked)

    def on_test_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._leave_evaluation(trainer)

    def on_predict_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._leave_evaluation(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(trainer)

    def _listen(self, trainer: Trainer) -> None:
        """Take over from Lightning's handlers, which it puts back itself when the run ends."""
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("signals reach the main thread only, and this run is in another: Preempt does nothing")
            return
        wanted: dict[int, int] = {getattr(signal, name): STOP for name in self.signals}
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
            wanted[environment.requeue_signal] = REQUEUE

        def note(number: int, frame: Any) -> None:
            self._asked, self._signal = max(self._asked, wanted[number]), signal.Signals(number).name

        for number in wanted:
            signal.signal(number, note)

    def _agreed(self) -> int:
        """What any process was asked to do, the same answer for all of them at the same place of the run."""
        if self._group is None:
            return self._asked
        answer = 0
        if self._agreement is not None:
            work, told = self._agreement
            work.wait()
            answer = int(told)  # on the CPU
        told = torch.tensor(self._asked)
        self._agreement = (dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group, async_op=True), told)
        return answer

    def _leave(self, trainer: Trainer, asked: int) -> None:
        if asked == REQUEUE:
            trainer._signal_connector._slurm_sigusr_handler_fn(signal.SIGUSR1, None)  # type: ignore[arg-type]
            raise SystemExit(self.exit_status)
        why = f"{self._signal or 'a signal to another process'} after step {trainer.global_step}"
        if trainer.global_step == self._steps:
            told = f"{why}: nothing was trained yet, so nothing is saved"
        else:
            path = _folder(trainer) / FILE
            trainer.save_checkpoint(path, weights_only=False)
            told = f"{why}: saved {path}; go on with --resume auto or ckpt_path"
        if trainer.is_global_zero:
            log.warning(told)
        raise SystemExit(self.exit_status)

    def _leave_evaluation(self, trainer: Trainer) -> None:
        if self._asked and trainer.world_size == 1:
            log.warning("%s: the run ends before it is complete", self._signal)
            raise SystemExit(self.exit_status)

    def _end(self, trainer: Trainer) -> None:
        self._group = self._agreement = None
        trainer.fit_loop.epoch_loop.__dict__.pop("_broadcast_sigterm_tensor", None)


def _ends_anyway(trainer: Trainer) -> bool:
    """Whether the last optimiser step of the run is done."""
    loop = trainer.fit_loop
    if 0 < trainer.max_steps <= trainer.global_step:
        return True
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return last_epoch and loop.epoch_loop._num_ready_batches_reached()


def _averages(trainer: Trainer) -> bool:
    """Whether a validation sees other weights than training, which Lightning would save in each other's place."""
    return any(isinstance(one, WeightAveraging) for one in trainer.callbacks)  # type: ignore[attr-defined]


def _folder(trainer: Trainer) -> Path:
    """Where the run's other checkpoints lie."""
    named = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(named or trainer.log_dir or trainer.default_root_dir)
