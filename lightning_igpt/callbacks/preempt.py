"""Save a checkpoint and exit when a scheduler, or Ctrl-C, asks the run to stop.

Lightning 2.6 ends a run on SIGTERM without a checkpoint and with exit status 0, and on Ctrl-C without a checkpoint.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_igpt.checkpointing import validation_follows
from lightning_igpt.files import os_error

log = logging.getLogger(__name__)


class Preempt(Callback):
    """On SIGTERM, SIGUSR1 or Ctrl-C, finish the optimizer step, save ``preempted.ckpt`` and exit.

    A signal to one of several processes stops all of them after the same step. A validation that is due or under way is
    finished first; a run in its last step ends as planned. A test, a prediction or a validation outside of ``fit`` ends
    at once, and so does a run at the second Ctrl-C. On one device, an error of the operating system saves too.

    Under SLURM, a signal other than SIGTERM and SIGINT saves ``hpc_ckpt_<n>.ckpt`` instead, from which Lightning
    resumes by itself, and requeues the job.

    Args:
        signals: Names of the signals, such as SIGTERM.
        exit_status: Exit status of the process. To schedulers 143 means "ended by SIGTERM"; only 0 means success. After
            Ctrl-C it is Lightning's, 1, and that of ``lightning-igpt fit`` is 130.

    Raises:
        ValueError: A signal does not exist here, or the exit status would mean success.
    """

    def __init__(self, signals: tuple[str, ...] = ("SIGTERM", "SIGUSR1", "SIGINT"), exit_status: int = 143) -> None:
        unknown = [name for name in signals if not hasattr(signal, name) or name in ("SIGKILL", "SIGSTOP")]
        if unknown:
            raise ValueError(f"signals has {', '.join(unknown)}, which no process here can catch; name others")
        if not 0 < exit_status < 256:
            raise ValueError(f"exit_status is {exit_status}; it must be from 1 to 255, since 0 means success")
        self.signals, self.exit_status = signals, exit_status
        self._stepped = False  # whether the last batch ended with an optimizer step
        self._first_step = sys.maxsize  # optimizer steps when this fit began; until then nothing is saved

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Move behind all other callbacks: what they do after a step belongs into the checkpoint."""
        self._asked = ""  # name of the signal that came
        self._first_step = sys.maxsize
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = self._step = trainer.global_step
        self._listen(trainer, pl_module)

    def _listen(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handlers; when the run ends, Lightning restores those from before the run."""
        if threading.current_thread() is not threading.main_thread():
            rank_zero_warn("Preempt does nothing: signals reach the main thread, and this run is in another one")
            return

        def note(number: int, frame: Any) -> None:
            before, self._asked = self._asked, signal.Signals(number).name
            if trainer.state.fn != TrainerFn.FITTING or before == self._asked == "SIGINT":
                raise self._end()
            if self._asked == "SIGINT":
                rank_zero_info("saving after this step; Ctrl-C again stops at once")

        for name in self.signals:
            if name != "SIGINT" or signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # of a shell's background job
                signal.signal(getattr(signal, name), note)

    def _end(self) -> BaseException:
        return KeyboardInterrupt() if self._asked == "SIGINT" else SystemExit(self.exit_status)

    on_sanity_check_start = on_validation_start = on_test_start = on_predict_start = _listen

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._stepped = trainer.global_step != self._step or not pl_module.automatic_optimization
        self._step = trainer.global_step
        if self._stepped and not validation_follows(trainer, batch_idx):
            self._leave_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._stepped and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._leave_if_asked(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what was trained where a disk or a server ends the run, such as a logger's."""
        fails = os_error(exception) is not None and trainer.state.fn == TrainerFn.FITTING
        if fails and trainer.world_size == 1 and trainer.global_step > self._first_step:
            with suppress(OSError):  # no room for a checkpoint may be why the run ends
                trainer.save_checkpoint(_file(trainer), weights_only=False)
                log.warning("%s ends the run: saved %s", type(exception).__name__, _file(trainer))

    def _leave_if_asked(self, trainer: Trainer) -> None:
        """Save and exit on all processes, if a signal came to any of them."""
        if not trainer.strategy.reduce_boolean_decision(bool(self._asked), all=False) or ends_here(trainer):
            return
        under_slurm = self._asked not in ("", "SIGTERM", "SIGINT") and SLURMEnvironment.detect()
        requeue = trainer.strategy.reduce_boolean_decision(under_slurm, all=False)
        message = f"{self._asked or 'a signal to another process'} after step {trainer.global_step}"
        if trainer.global_step == self._first_step:
            message += ": nothing was trained yet, so nothing is saved"
        else:
            path = _file(trainer)
            if requeue:  # the next of the files from which Lightning resumes a requeued job
                root = Path(trainer.default_root_dir)
                numbers = [int(file.stem.rpartition("_")[2]) for file in root.glob("hpc_ckpt_*.ckpt")]
                path = root / f"hpc_ckpt_{1 + max(numbers, default=0)}.ckpt"
            path = trainer.strategy.broadcast(path)
            trainer.save_checkpoint(path, weights_only=False)
            message += f": saved {path}; resume with --resume auto or ckpt_path"
        if trainer.is_global_zero:
            log.warning(message)
            if requeue:
                array = os.environ.get("SLURM_ARRAY_JOB_ID")
                job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
                subprocess.run(["scontrol", "requeue", job], check=False)
        raise self._end()


def ends_here(trainer: Trainer) -> bool:
    """Whether the last optimizer step of the run was taken."""
    last_epoch = trainer.max_epochs is not None and trainer.current_epoch + 1 == trainer.max_epochs
    return 0 < trainer.max_steps <= trainer.global_step or (last_epoch and trainer.is_last_batch)


def _file(trainer: Trainer) -> Path:
    """In the folder of the run's other checkpoints."""
    named = getattr(trainer.checkpoint_callback, "dirpath", None)
    return Path(named or trainer.log_dir or trainer.default_root_dir) / "preempted.ckpt"
