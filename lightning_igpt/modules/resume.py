"""What a resumed run restores beyond Lightning's own state: random numbers, and the recipe's rates and schedule.

Exact for checkpoints written between two optimizer steps. The order of the images is the data module's concern.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_igpt.private import current_datamodule

log = logging.getLogger(__name__)

RANDOM = "random_states"  # key in a checkpoint: of each process, the states of its generators


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer that a module is attached to, if any."""
    try:
        return module.trainer
    except RuntimeError:  # how Lightning says that there is none
        return None


def is_evaluating(module: LightningModule) -> bool:
    """Whether a module is attached to a trainer that runs ``validate``, ``test`` or ``predict``."""
    trainer = trainer_of(module)
    return trainer is not None and trainer.state.fn != TrainerFn.FITTING


def save_random_states(module: Any, checkpoint: dict[str, Any]) -> None:
    """Add the generators' states of all processes to a checkpoint, together, where training draws numbers."""
    trainer = trainer_of(module)
    if trainer is None or not _draws(module):
        return
    states = {"cpu": torch.get_rng_state()}
    if module.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(module.device)
    everyone: list[Any] = [states] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(everyone, states)
    checkpoint[RANDOM] = everyone


def load_run_state(module: Any, checkpoint: dict[str, Any]) -> None:
    """Prepare a checkpoint for a run that continues it: the recipe's rates win, and random states wait for training."""
    if trainer_of(module) is None or is_evaluating(module):
        return
    module.random_states = checkpoint.get(RANDOM)
    _keep_rates(module, checkpoint)
    count_micro_batches(module, checkpoint)
    _forget_foreign_files(module.trainer, checkpoint)


def follow_batch_size(trainer: Trainer) -> None:
    """Make optimizers and schedules again where Lightning's BatchSizeFinder, which runs first, changes the steps."""
    if any(isinstance(callback, BatchSizeFinder) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        trainer.strategy.setup_optimizers(trainer)


def start_training(module: Any) -> None:
    """Set the random numbers of dropout and the learning rates; call it from ``on_train_start``."""
    states: list[dict[str, Tensor]] | None = module.random_states
    module.random_states = None
    trainer: Trainer = module.trainer
    if states is not None and len(states) == trainer.world_size:
        mine = states[trainer.global_rank]
        torch.set_rng_state(mine["cpu"].cpu())
        if "cuda" in mine and module.device.type == "cuda":
            torch.cuda.set_rng_state(mine["cuda"].cpu(), module.device)
    elif states is not None:
        text = "the checkpoint was saved by %d processes and this run has %d: dropout draws other numbers"
        log.warning(text, len(states), trainer.world_size)
    elif _draws(module) and trainer.global_rank > 0:  # else all processes would drop the same
        torch.manual_seed((torch.initial_seed() + trainer.global_rank) % 2**63)
    _follow_schedule(trainer)
    loop = trainer.fit_loop
    if loop.epoch_loop.restarted_on_train_batch_end and loop.epoch_loop.batch_progress.is_last_batch:
        loop.reset_restart_stage()  # else Lightning 2.6 does not count the epoch that begins, for later checkpoints


def total_steps(trainer: Trainer) -> tuple[int, int | None]:
    """(optimizer steps of the run, optimizer steps per pass over the data if the data module knows its size)."""
    batches = getattr(getattr(trainer, "datamodule", None), "batches_per_epoch", None)
    if batches is None:
        total, per_epoch = trainer.estimated_stepping_batches, None
    else:
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * (1.0 if limit is None else limit))
        # Lightning steps on an accumulation window that the end of an epoch cuts short, too.
        per_epoch = max(1, -(-batches // trainer.accumulate_grad_batches))
        ends = (trainer.max_steps, per_epoch * (trainer.max_epochs or -1))
        total = min((end for end in ends if end > 0), default=math.inf)
    if total == math.inf:
        raise ValueError("a cosine needs to know where the run ends: give the trainer max_steps or max_epochs")
    return int(total), per_epoch


def _draws(module: Any) -> bool:
    """Whether training uses up random numbers: only dropout does."""
    return module.config.dropout > 0 and any(parameter.requires_grad for parameter in module.network.parameters())


def _keep_rates(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Let a resumed run train with the module's learning rate, betas and weight decay, not the checkpoint's.

    Groups that this package made note their scale of the rate (layer-wise decay) and whether they are decayed.
    """
    rates: list[float] = []
    for state in checkpoint.get("optimizer_states", []):
        groups = [group for group in state["param_groups"] if {"lr_scale", "decayed", "initial_lr"} <= group.keys()]
        for group in groups:
            group["initial_lr"] = module.lr * group["lr_scale"]
            if "betas" in group:  # Muon and SGD have none
                group["betas"] = module.betas
            if group["decayed"]:
                group["weight_decay"] = module.weight_decay
        rates += [group["initial_lr"] for group in groups]
    for state in checkpoint.get("lr_schedulers", []):
        if len(state.get("base_lrs", [])) == len(rates):
            state["base_lrs"] = rates


def _follow_schedule(trainer: Trainer) -> None:
    """Set each learning rate to what its schedule says now; a restored rate may come from a shorter run's schedule."""
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            parts = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, base, factor in parts:
                group["lr"] = base * factor(schedule.last_epoch)


def count_micro_batches(module: Any, checkpoint: dict[str, Any]) -> None:
    """Make Lightning's counts of batches those of this run's accumulation, which may differ from the checkpoint's.

    Loaders of this package's data modules yield whole optimizer steps, from the step that training has reached.
    """
    if not module.automatic_optimization or not hasattr(current_datamodule(module.trainer), "needs_labels"):
        return
    loop = checkpoint["loops"]["fit_loop"]
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    for scope in ("total", "current"):
        counts = loop["epoch_loop.batch_progress"][scope]
        more = steps[scope]["completed"] * module.trainer.accumulate_grad_batches - counts["processed"]
        counts.update({name: count + more for name, count in counts.items()})


def _forget_foreign_files(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Drop the state of a ModelCheckpoint that names files outside of its folder.

    ModelCheckpoint removes its older files, and Lightning 2.6 would remove any file that a checkpoint names by an
    address such as ``local://``. A run that resumes in another folder keeps none of this state anyway.
    """
    states = checkpoint.get("callbacks") or {}
    for callback in trainer.checkpoint_callbacks:
        state, inside = states.get(callback.state_key) or {}, f"{getattr(callback, 'dirpath', None)}{os.sep}"
        named = [state.get(name) for name in ("best_model_path", "kth_best_model_path", "last_model_path")]
        named += state.get("best_k_models") or {}
        if not all(str(path).startswith(inside) and ".." not in str(path) for path in named if path):
            del states[callback.state_key]
            log.info("%s starts without its old state: that names files outside of %s", callback, inside)
