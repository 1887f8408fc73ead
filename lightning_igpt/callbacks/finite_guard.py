"""Stop a run that cannot end well: before weights that are not finite, and before checkpoints that have no room."""

import math
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


class NonFiniteError(ValueError):
    """The loss or the gradient of an optimizer step is not finite."""


class FiniteGuard(Callback):
    """Stop training where a loss or the gradient norm is not finite, before the optimizer step is taken.

    Such a step never changes the weights, so every checkpoint of the run holds finite ones. The error names the
    optimizer step, loss, gradient norm and samples. All processes stop together. It costs the gradient norm and one
    number read from the device per optimizer step; training is the same with and without it, bit for bit.

    Under a GradScaler (16-mixed) losses alone count: the scaler skips steps whose gradients are not finite. Idle for
    modules that optimize manually.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []  # of the micro-batches since the last optimizer step, on the device
        self._samples: list[Any] = []  # their sample numbers; None where the batch has none
        self._batch: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._losses, self._samples = [], []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not pl_module.automatic_optimization:
            return
        loss, scaler = _whole(loss.detach()).float().reshape(()), getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            loss = loss / scaler.scale(torch.ones_like(loss))
        self._losses.append(loss * trainer.accumulate_grad_batches)
        self._samples.append(self._batch.get("sample") if isinstance(self._batch, Mapping) else None)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Raise NonFiniteError where the step is not finite on one of the processes."""
        losses, samples, self._losses, self._samples = self._losses, self._samples, [], []
        if not losses:
            return
        loss, norm = torch.stack(losses).mean(), None
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            norm = _gradient_norm(optimizer).to(loss)
        # A sum is finite where all of its terms are; so is their mean over the processes.
        total = loss if norm is None else loss + norm
        if trainer.world_size > 1:
            total = trainer.strategy.reduce(total.clone(), reduce_op="mean")
        if not math.isfinite(total.item()):
            process = f" (process {trainer.global_rank} of {trainer.world_size})" if trainer.world_size > 1 else ""
            gradient = "" if norm is None else f" and gradient norm {norm:.4g}"
            numbers = [str(int(number)) for part in samples if part is not None for number in part]
            of_samples = f", samples {', '.join(numbers)}" if numbers else ""
            text = f"optimizer step {trainer.global_step + 1}{process} has loss {loss:.4g}{gradient}{of_samples}"
            cure = "resume from the last checkpoint with a lower lr or gradient_clip_val, or look at these samples"
            raise NonFiniteError(f"{text}, so it was not taken: {cure}")


def _gradient_norm(optimizer: Optimizer) -> Tensor:
    """Norm of all gradients together, before clipping; of sharded ones (DTensor) all processes compute it together."""
    meshes: dict[Any, list[Tensor]] = {}  # norms on different meshes do not fit into one tensor
    for group in optimizer.param_groups:
        for gradient in (parameter.grad for parameter in group["params"]):
            if gradient is not None and not gradient.is_sparse:
                meshes.setdefault(getattr(gradient, "device_mesh", None), []).append(gradient)
    return get_total_norm([_whole(get_total_norm(gradients)) for gradients in meshes.values()])


def _whole(value: Any) -> Tensor:
    """A value that is spread over processes (DTensor), complete; any other as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[no-any-return]


class DiskCheck(Callback):
    """Before training, raise OSError where a checkpoint's folder cannot be written or its disk lacks room.

    A checkpoint is written whole before the last is removed, so that a run needs room for two.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trained = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
        state = sum(value.numel() * value.element_size() for value in pl_module.state_dict().values())
        folders = {str(getattr(callback, "dirpath", None) or "://") for callback in trainer.checkpoint_callbacks}
        for folder in sorted(folder for folder in folders if "://" not in folder):
            check_folder(Path(folder), state + 2 * trained)  # with Adam's two moments


def check_folder(folder: Path, size: int) -> None:
    """Raise OSError unless a folder, which is made if need be, takes a checkpoint of ``size`` bytes next to another."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, f"{folder} cannot be written: {error.strerror}; choose another folder") from error
    free, kept = shutil.disk_usage(folder).free, sum(path.stat().st_size for path in folder.rglob("*.ckpt"))
    if free < max(size, 2 * size - kept):
        what = f"a checkpoint takes about {size:,} bytes, but {folder} has {free:,} free"
        raise OSError(f"{what}; make room for two, since the old one is removed after the new one is written")
