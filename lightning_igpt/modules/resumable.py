"""Checkpoints that describe the last optimiser step, wherever in a run they are saved, and resume from it exactly.

Lightning 2.6 saves no random numbers; leaves out the validation that was due or under way when a checkpoint was saved;
and after a save within an accumulation window it goes on in the middle of the window, without its gradients.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules.batches import read_batch
from lightning_igpt.modules.deferred import DeferredGPT
from lightning_igpt.modules.guarded import GuardedModule
from lightning_igpt.modules.sharding import average_gradients, let_go, set_up
from lightning_igpt.modules.shared import check_stamp, stamp
from lightning_igpt.palette import Palette
from lightning_igpt.weights.checkpoint import STAMP

log = logging.getLogger(__name__)

RANDOM = "random_states"  # key in a checkpoint: of each process, the states of its generators


class ResumableModule(GuardedModule):
    """What the three modules do so that a resumed run equals an uninterrupted one.

    The order of the images is the data module's business, and where it continues is counted in whole optimiser steps.
    """

    network: ImageGPT
    palette: Palette
    origin: str | None = None  # where the weights came from, in words; None where they were random
    origin_path: Path | None = None
    _has_weights = False  # others than random ones
    _in_validation = False
    _steps = 0  # optimiser steps at the last boundary between steps
    _random: dict[str, Tensor] | None = None  # the generators' states there; None where nothing is drawn
    _moved: Mapping[str, Tensor] = MappingProxyType({})
    _loaded: list[dict[str, Tensor]] | None = None

    @property
    def config(self) -> ImageGPTConfig:
        """The network's shape; data modules read ``image_size`` here."""
        return self.network.config

    def tokens_of(self, batch: Any) -> Tensor:
        """The tokens of a batch, int64 (B, T); callbacks read batches through this."""
        return read_batch(batch, self.palette, self.config).tokens

    def configure_model(self) -> None:
        """Draw deferred weights, and shard them under ModelParallelStrategy; again, it changes nothing."""
        set_up(self)

    def on_after_backward(self) -> None:
        average_gradients(self)

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            # By this mark Lightning knows a fused optimiser, which undoes a loss scale itself, and refuses to clip, in
            # bf16-mixed too, which has no such scale.
            optimizer._step_supports_amp_scaling = False
        super().configure_gradient_clipping(optimizer, *args, **kwargs)

    def on_evaluation_start(self) -> None:
        """Say so where random weights are evaluated."""
        if self.trainer.state.fn != TrainerFn.FITTING and not self._has_weights and self.origin is None:
            log.warning("these are random weights: no pretrained=, no ckpt_path, and no training before this")

    on_validation_start = on_test_start = on_predict_start = on_evaluation_start

    def on_train_start(self) -> None:
        self._has_weights, self._in_validation = True, False  # an earlier fit may have ended in the middle of one
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._set_random(loaded)
        elif self._draws and self.trainer.global_rank > 0:  # else all processes would drop the same
            torch.manual_seed((torch.initial_seed() + self.trainer.global_rank) % 2**63)
        self._note_boundary()
        validate_if_due(self.trainer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.trainer.fit_loop.epoch_loop._should_accumulate():
            self._note_boundary()

    def on_validation_epoch_start(self) -> None:
        self._in_validation = self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking

    def on_validation_epoch_end(self) -> None:
        self._in_validation = False

    def on_validation_end(self) -> None:
        let_go(self)

    on_test_end = on_predict_end = on_validation_end

    def load_state_dict(self, *args: Any, **options: Any) -> Any:
        if isinstance(self.network, DeferredGPT):
            set_up(self)  # what is on the meta device would take nothing in, and say nothing
        self._has_weights = True
        return super().load_state_dict(*args, **options)

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise where a run of this module cannot go on from a checkpoint.

        Raises:
            ValueError: It was written by another class, network or palette; the message names both and the cure.
        """
        check_stamp(self, self.config, self.palette, checkpoint)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stamp(self, self.config, self.palette, checkpoint)
        if self._trainer is None:
            return
        random = _random_states(self.device)
        if self._in_validation:
            before_validation(checkpoint["loops"]["fit_loop"])
        elif self.automatic_optimization and after_last_step(self.trainer, checkpoint["loops"]["fit_loop"]):
            random = self._random or random
            checkpoint["state_dict"].update(self._moved)
            if self._steps != self.trainer.global_step:
                log.warning(
                    "this checkpoint is saved within optimiser step %d, after the weights moved and before the batch "
                    "was counted: a run that resumes from it repeats that step",
                    self.trainer.global_step,
                )
        if self._draws:
            checkpoint[RANDOM] = _of_all_processes(random)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        self._has_weights = True  # ModelParallelStrategy has loaded them, without load_state_dict
        if "origin" in checkpoint[STAMP]:  # older ones do not tell
            self.origin, self.origin_path = checkpoint[STAMP]["origin"], None
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._loaded = checkpoint.get(RANDOM)
            forget_foreign_files(self.trainer, checkpoint)

    @property
    def _draws(self) -> bool:
        """Whether training uses up random numbers: only dropout does."""
        trained = any(parameter.requires_grad for parameter in self.network.parameters())
        return trained and self.config.dropout > 0

    def _note_boundary(self) -> None:
        self._steps = self.trainer.global_step
        self._random = _random_states(self.device) if self._draws else None
        self._moved = {name: value.clone() for name, value in self._moving().items()}

    def _moving(self) -> dict[str, Tensor]:
        """What else than the optimiser's step moves in training, by its name in the state dict."""
        return {}

    def _set_random(self, states: list[dict[str, Tensor]]) -> None:
        if len(states) != self.trainer.world_size:
            log.warning(
                "the checkpoint was saved by %d processes, this run has %d: dropout draws other numbers than it would "
                "have done",
                len(states),
                self.trainer.world_size,
            )
            return
        mine = states[self.trainer.global_rank]
        torch.set_rng_state(mine["cpu"].cpu())
        if "cuda" in mine and self.device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda"].cpu(), self.device)


def validate_if_due(trainer: Trainer) -> None:
    """Run the validation that was due when the checkpoint was saved that this run resumes from.

    Lightning takes it for done. Where it was done, after the save and before the run ended, it is done again, with the
    same result.
    """
    loop = trainer.fit_loop.epoch_loop
    if not loop.restarted_on_train_batch_end:
        return
    # Checkpoints that are saved meanwhile shall say what they would have said: the batch is counted, and an epoch that
    # ends with it, which Lightning has counted by now, is not.
    at_epoch_end = loop.batch_progress.is_last_batch
    _count(trainer, batches=1, epochs=-at_epoch_end)
    if loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
        first = trainer._logger_connector._first_loop_iter
        trainer.validating = True
        loop.val_loop.restarting = False
        loop.val_loop.run()
        trainer.training = True
        trainer._logger_connector._first_loop_iter = first
    _count(trainer, batches=-1, epochs=at_epoch_end)
    if at_epoch_end:  # Lightning would not count the epoch that begins now, and a run resumed from it had one too many
        trainer.fit_loop.reset_restart_stage()


def _count(trainer: Trainer, *, batches: int, epochs: int) -> None:
    for part in (trainer.fit_loop.epoch_loop.batch_progress.total, trainer.fit_loop.epoch_loop.batch_progress.current):
        part.completed += batches
    progress: Any = trainer.fit_loop.epoch_progress
    for whole in (progress.total, progress.current):
        whole.processed += epochs
        whole.completed += epochs


def forget_foreign_files(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Take out of a checkpoint the state of a ModelCheckpoint that names files outside of its folder.

    ModelCheckpoint removes what it takes for its older files, and with an address like ``local://`` Lightning 2.6 lets
    a checkpoint have any file or folder removed. A run that resumes in a folder of its own keeps none of it anyway.
    """
    states = checkpoint.get("callbacks") or {}
    for callback in trainer.checkpoint_callbacks:
        state = states.get(callback.state_key)
        if isinstance(callback, ModelCheckpoint) and state is not None:
            named = [state.get(name) for name in ("best_model_path", "kth_best_model_path", "last_model_path")]
            named += list(state.get("best_k_models") or {})
            if not all(_is_inside(str(path), str(callback.dirpath)) for path in named if path):
                del states[callback.state_key]
                log.info("%s begins anew: it kept files elsewhere than in %s", callback.state_key, callback.dirpath)


def _is_inside(path: str, folder: str) -> bool:
    if "://" in folder:
        return path.startswith(folder) and ".." not in path
    return "://" not in path and Path(path).resolve().is_relative_to(Path(folder).resolve())


def before_validation(loops: dict[str, Any]) -> None:
    """Let the state of the loops, saved in the middle of a validation, say that it has not begun.

    What the metrics have gathered so far is in no checkpoint.
    """
    for part in ("total", "current"):
        counts = loops["epoch_loop.batch_progress"][part]
        counts["completed"] = counts["processed"] - 1  # as Lightning leaves it before a validation
    validation = loops["epoch_loop.val_loop.batch_progress"]
    before = validation["total"]["completed"] - validation["current"]["completed"]
    validation["total"] = dict.fromkeys(validation["total"], before)
    validation["current"] = dict.fromkeys(validation["current"], 0)
    validation["is_last_batch"] = False


def after_last_step(trainer: Trainer, loops: dict[str, Any]) -> bool:
    """Let the state of the loops, saved within a batch or an accumulation window, say where that began.

    Returns:
        Whether anything had to be changed.
    """
    progress = loops["epoch_loop.batch_progress"]
    current = progress["current"]
    within = trainer.fit_loop.epoch_loop._should_accumulate() or current["ready"] > current["processed"]
    if not within:
        return False
    rest = current["processed"] % trainer.accumulate_grad_batches
    for part in ("total", "current"):
        progress[part] = dict.fromkeys(progress[part], progress[part]["processed"] - rest)
    progress["is_last_batch"] = False
    return True


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _of_all_processes(states: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Those of every process, in order; all must call it together: the checkpoint is one file."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [states]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, states)
    return everyone
