"""What a resumed run restores beyond Lightning's own state: random numbers, and the recipe's rates and schedule."""

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_igpt.checkpointing import run_of
from lightning_igpt.optim import Schedule
from lightning_igpt.private import current_datamodule

log = logging.getLogger(__name__)

RANDOM = "random_states"  # key in a checkpoint: of each process, the states of its generators


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer that a module is attached to, if any."""
    try:
        trainer = module.trainer
    except RuntimeError:  # how Lightning says that there is none
        return None
    return trainer if hasattr(trainer, "fit_loop") else None  # under Fabric there is a stand-in


def own_data(trainer: Trainer) -> Any:
    """The data module in use now, if it is one of this package's; None for others, and for loaders."""
    data = current_datamodule(trainer)
    is_own = any(kind.__module__ == "lightning_igpt.data.datamodule" for kind in type(data).__mro__)
    return data if is_own else None  # by name, since this floor does not import them


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
    """Prepare a checkpoint for a run that continues it: the recipe's rates replace those of the checkpoint."""
    if trainer_of(module) is None or is_evaluating(module):
        return
    run_of(module.trainer, checkpoint)
    module.random_states = checkpoint.get(RANDOM)
    _keep_rates(module, checkpoint)
    count_micro_batches(module, checkpoint)
    _forget_foreign_files(module.trainer, checkpoint)


def start_training(module: Any) -> None:
    """Set the random numbers of dropout and the learning rates; call it from ``on_train_start``."""
    trainer = trainer_of(module)
    if trainer is None:  # Fabric may call the hook, too
        return
    states: list[dict[str, Tensor]] | None = module.random_states
    run_of(trainer)
    module.random_states = module.validated_at = None
    module.data_name = _data_name(trainer)
    if (data := own_data(trainer)) is not None:
        module.resize_filter = None if data.opened.tokens else data.resize_filter  # of tokens nobody knows it
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


def total_steps(module: Any) -> tuple[int, int | None]:
    """(optimizer steps of the run, optimizer steps per pass over the data if the data module knows its size)."""
    trainer = trainer_of(module)
    if trainer is None:
        if module.total_steps is None:
            raise ValueError("without a Trainer nothing says how long the run is: set module.total_steps first")
        return module.total_steps, None
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    changing = [each for each in callbacks if hasattr(each, "get_accumulate_grad_batches")]  # of both Lightnings
    constant = [lambda epoch: trainer.accumulate_grad_batches]
    accumulate = [each.get_accumulate_grad_batches for each in changing] or constant
    total = trainer.max_steps if trainer.max_steps > 0 else math.inf
    if trainer.max_epochs not in (None, -1):
        trainer.fit_loop.setup_data()  # as trainer.estimated_stepping_batches does
        batches = trainer.num_training_batches
        if math.isinf(min(total, batches)):
            text = f"this loader has no length, so max_epochs={trainer.max_epochs} does not say where the run ends"
            raise ValueError(f"{text}: set max_steps or limit_train_batches")
        if math.isfinite(batches):
            # Lightning steps on an accumulation window that the end of an epoch cuts short, too.
            epochs = range(max(1, int(trainer.max_epochs or 1)))
            total = min(total, sum(-(-int(batches) // accumulate[0](epoch)) for epoch in epochs))
    if math.isinf(total):
        raise ValueError("the schedule needs to know where the run ends: give the trainer max_steps or max_epochs")
    data, limit = own_data(trainer), trainer.limit_train_batches
    own = data is not None and type(data).train_dataloader.__module__.startswith("lightning_igpt.")
    in_pass = data.batches_per_epoch if own else None
    if in_pass is None:
        return int(total), None
    in_pass = min(in_pass, limit) if isinstance(limit, int) else int(in_pass * (1.0 if limit is None else limit))
    return int(total), max(1, -(-in_pass // accumulate[0](0)))


def _data_name(trainer: Trainer) -> str | None:
    """The data's name without the path to it, which must not be published with the weights."""
    data = own_data(trainer)
    source = None if data is None else data.hparams.get("source")
    if not isinstance(source, str):
        return None
    return Path(source).name if Path(source).exists() or Path(source).is_absolute() else source


def _draws(module: Any) -> bool:
    """Whether training uses up random numbers: only dropout does."""
    return module.config.dropout > 0 and any(parameter.requires_grad for parameter in module.network.parameters())


def _keep_rates(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Let a resumed run train with the module's learning rate, betas and weight decay, not the checkpoint's.

    Groups that did not start from the checkpoint's hyperparameters are of a user's ``configure_optimizers``, and stay.
    """
    rates: list[float] = []
    saved = {"lr": math.nan, "weight_decay": math.nan, "betas": ()} | checkpoint.get("hyper_parameters", {})

    def is_ours(group: Mapping[str, Any]) -> bool:
        return (
            {"lr_scale", "decayed", "initial_lr"} <= group.keys()
            and group["initial_lr"] == saved["lr"] * group["lr_scale"]
            and (not group["decayed"] or group["weight_decay"] == saved["weight_decay"])
            and ("betas" not in group or tuple(group["betas"]) == tuple(saved["betas"]))
        )

    for state in checkpoint.get("optimizer_states", []):
        groups = [group for group in state["param_groups"] if is_ours(group)]
        for group in groups:
            group["initial_lr"] = module.lr * group["lr_scale"]
            if "betas" in group:  # Muon and SGD have none
                group["betas"] = module.betas
            if group["decayed"]:
                group["weight_decay"] = module.weight_decay
        rates += [group["initial_lr"] for group in groups]
    for state in checkpoint.get("lr_schedulers", []):
        if getattr(module, "warmup_steps", None) is not None:  # else the warm-up is that of the run's beginning
            state.pop("warmup_steps", None)
        if len(state.get("base_lrs", [])) == len(rates):
            state["base_lrs"] = rates


def _follow_schedule(trainer: Trainer) -> None:
    """Set each learning rate to what its schedule says now; a restored rate may come from a shorter run's schedule."""
    for config in trainer.lr_scheduler_configs:
        schedule = config.scheduler
        if isinstance(schedule, Schedule):
            before = schedule.optimizer.param_groups[0]["lr"]
            parts = zip(schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=False)
            for group, base, factor in parts:
                group["lr"] = base * factor(schedule.last_epoch)
            now = schedule.optimizer.param_groups[0]["lr"]
            if before < 0.99 * now and hasattr(schedule, "warmup_steps"):  # cosines of longer runs are expected to rise
                text = "the learning rate rises from %.3g to %.3g as the run continues; if the checkpoint is from a"
                log.warning(f"{text} decay, continue from an earlier one to train on at a constant rate", before, now)


def count_micro_batches(module: Any, checkpoint: dict[str, Any]) -> None:
    """Make Lightning's counts of batches those of this run's accumulation, which may differ from the checkpoint's.

    Loaders of this package's data modules yield whole optimizer steps, from the step that training has reached.
    """
    if not module.automatic_optimization or own_data(module.trainer) is None:
        return
    loop = checkpoint["loops"]["fit_loop"]
    steps = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
    for scope in ("total", "current"):
        counts = loop["epoch_loop.batch_progress"][scope]
        more = steps[scope]["completed"] * module.trainer.accumulate_grad_batches - counts["processed"]
        counts.update({name: count + more for name, count in counts.items()})


def _forget_foreign_files(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Drop the state of a ModelCheckpoint that names files outside of its folder, which Lightning 2.6 would remove."""
    states = checkpoint.get("callbacks") or {}
    for callback in trainer.checkpoint_callbacks:
        state, inside = states.get(callback.state_key) or {}, f"{getattr(callback, 'dirpath', None)}{os.sep}"
        named = [state.get(name) for name in ("best_model_path", "kth_best_model_path", "last_model_path")]
        named += state.get("best_k_models") or {}
        if not all(str(path).startswith(inside) and ".." not in str(path) for path in named if path):
            del states[callback.state_key]
            log.info("%s ignores its saved state, which names files outside of %s", callback, inside)
