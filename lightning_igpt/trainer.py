"""A ``lightning.Trainer`` with the choices made that suit Image GPT; every one of them can be overridden."""

from __future__ import annotations

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint

from lightning_igpt.callbacks import ClassificationReport, LayerCurve
from lightning_igpt.checkpointing import AtomicCheckpointIO

log = logging.getLogger(__name__)


def make_trainer(
    *,
    max_steps: int = -1,
    max_epochs: int | None = None,
    precision: str | int | None = None,
    accelerator: str = "auto",
    devices: list[int] | str | int = "auto",
    val_check_interval: int | float | None = None,
    checkpoint_every: int | None = None,
    monitor: str | None = None,
    callbacks: list[Callback] | Callback | None = None,
    plugins: Any = None,
    **kwargs: Any,
) -> Trainer:
    """A plain Trainer: precision by what the device does well, checkpoints that survive a crash, useful intervals.

    Args:
        max_steps: Optimiser steps of the run. Pretraining counts in steps, as the paper does.
        max_epochs: Passes over the data; for probing (1) and fine-tuning.
        precision: Lightning's name of a precision. Default: bf16-mixed where the device computes it fast, else 32-true.
        accelerator: ``cpu``, ``gpu``, ... or ``auto``.
        devices: Number or list of devices, or ``auto``.
        val_check_interval: Batches between validations (int), or a fraction of an epoch (float). Default: 10
            validations in a run counted in steps, one per epoch otherwise.
        checkpoint_every: Optimiser steps between checkpoints. Default: as often as validation, at most 1000 steps.
        monitor: Keep the checkpoint that is best in this metric, such as val/accuracy (higher is better) or
            val/nats_per_pixel (lower is better), instead of the newest.
        callbacks: Added to the ones chosen here, which are ModelCheckpoint, LearningRateMonitor, LayerCurve and
            ClassificationReport; one of such a class among them replaces ours.
        plugins: Lightning plugins; a CheckpointIO among them replaces ours.
        **kwargs: Anything else that Trainer takes.

    Returns:
        The trainer.

    Raises:
        ValueError: Neither max_steps nor max_epochs is given.
    """
    # The command line passes every option of Trainer, those not given as None or Trainer's own default.
    if max_steps < 1 and max_epochs is None and not kwargs.get("fast_dev_run") and not kwargs.get("max_time"):
        raise ValueError("how long to train? Give max_steps (pretraining) or max_epochs (probing, fine-tuning)")
    by_steps = max_steps > 0 and max_epochs is None
    if val_check_interval is None and by_steps:
        val_check_interval = -(-max_steps * int(kwargs.get("accumulate_grad_batches", 1)) // 10)
    if by_steps and kwargs.get("check_val_every_n_epoch", 1) == 1:
        kwargs["check_val_every_n_epoch"] = None  # steps, not passes over the data, are the clock
    precision = precision or best_precision(accelerator)
    log.info("precision %s", precision)
    return Trainer(
        max_steps=max_steps,
        max_epochs=-1 if by_steps else max_epochs,
        precision=precision,  # type: ignore[arg-type]
        accelerator=accelerator,
        devices=devices,
        val_check_interval=val_check_interval,
        callbacks=_callbacks(callbacks, max_steps if by_steps else None, checkpoint_every, monitor, kwargs),
        plugins=_plugins(plugins),
        **kwargs,
    )


def best_precision(accelerator: str = "auto") -> str:
    """bf16-mixed where the hardware multiplies bfloat16 faster than float32, else 32-true.

    On a CPU that means AMX or AVX512-BF16; on any other bf16 is emulated and slower.
    """
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("auto", "cpu") and not torch.backends.mps.is_available():
        fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return "bf16-mixed" if fast else "32-true"
    return "32-true"


def _callbacks(
    given: list[Callback] | Callback | None,
    max_steps: int | None,
    checkpoint_every: int | None,
    monitor: str | None,
    kwargs: dict[str, Any],
) -> list[Callback]:
    chosen = [given] if isinstance(given, Callback) else list(given or [])
    if kwargs.get("enable_checkpointing") is not False and not any(isinstance(one, ModelCheckpoint) for one in chosen):
        chosen += _checkpoints(max_steps, checkpoint_every, monitor)
    if kwargs.get("logger") is not False and not any(isinstance(one, LearningRateMonitor) for one in chosen):
        chosen.append(LearningRateMonitor(logging_interval="step"))
    pictures = (LayerCurve, ClassificationReport)  # both are idle beside modules that they do not concern
    return chosen + [kind() for kind in pictures if not any(isinstance(one, kind) for one in chosen)]


def _checkpoints(max_steps: int | None, every: int | None, monitor: str | None) -> list[Callback]:
    if monitor is not None:
        return [ModelCheckpoint(monitor=monitor, mode="max" if "accuracy" in monitor else "min")]
    last = ModelCheckpoint(filename="final", save_on_train_epoch_end=True, enable_version_counter=False)
    if max_steps is None and every is None:
        return [last]
    # Saving by steps alone would lose what comes after the last multiple, hence the second.
    every = every or min(1000, max(1, (max_steps or 10_000) // 10))
    return [last, ModelCheckpoint(filename="{step}", every_n_train_steps=every)]


def _plugins(given: Any) -> list[Any]:
    chosen = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if not any(hasattr(one, "save_checkpoint") for one in chosen):
        chosen.append(AtomicCheckpointIO())
    return chosen
