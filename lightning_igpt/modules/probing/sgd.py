"""The probe's solver for data whose features fill any memory: SGD on batches, as the paper does for ImageNet."""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_igpt.modules.probing.samplers import reads_in_order
from lightning_igpt.modules.shared import follow_schedule
from lightning_igpt.optim import warmup_cosine

log = logging.getLogger(__name__)

MOMENTUM = 0.9  # paper, section 3.4
EPS = 1e-6  # beside the variance, as in the probes of MAE


class RunningScale(nn.Module):
    """Scale each of D features of each layer to mean 0 and variance 1: batch normalisation without gain and bias.

    A training batch, that of all processes together, is scaled by its own statistics. In evaluation their means over
    all training batches scale, since frozen features do not drift.

    Args:
        n_layers: Number of layers.
        width: D.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, n_layers: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_layers * width))
        self.register_buffer("variance", torch.ones(n_layers * width))

    def forward(self, features: Tensor, batches: int | None = None) -> Tensor:
        """Scaled features (..., layers, D); in training ``batches`` is how many there were, this one included."""
        flat = features.reshape(-1, len(self.mean))
        mean, variance = self.mean.float(), self.variance.float()
        rows = 0 if batches is None else _rows_of_all_processes(flat)
        if batches is not None and rows > 1:  # a single row has no variance
            mean = _of_all_processes(flat.sum(0)) / rows
            variance = _of_all_processes((flat - mean).square().sum(0)) / rows
            unbiased = variance * rows / (rows - 1)
            self.mean.lerp_(mean.to(self.mean.dtype), 1 / batches)
            self.variance.lerp_(unbiased.to(self.variance.dtype), 1 / batches)
        return ((flat - mean) * (variance + EPS).rsqrt()).view_as(features)


def _rows_of_all_processes(flat: Tensor) -> int:
    if not _are_several():  # the device need not be asked
        return len(flat)
    return int(_of_all_processes(torch.tensor(len(flat), device=flat.device)))


def _of_all_processes(value: Tensor) -> Tensor:
    """The sum over all processes, in place; all must call it together."""
    if _are_several():
        torch.distributed.all_reduce(value)
    return value


def _are_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Sgd:
    """Trains the classifiers of a ProbeModule, which every method is given.

    Args:
        lr: Learning rate at the start; a cosine takes it to zero at the end of the run.
        weight_decay: L2 decay of the weights, not of the bias.
    """

    waits = False  # no features are kept

    def __init__(self, lr: float, weight_decay: float) -> None:
        self.lr, self.weight_decay = lr, weight_decay

    def configure(self, module: Any) -> Any:
        """The optimiser and its schedule.

        Raises:
            ValueError: The trainer does not say where the run ends.
        """
        total = module.trainer.estimated_stepping_batches
        if not 0 < total < float("inf"):
            raise ValueError("a cosine needs to know where the run ends: give the trainer max_steps or max_epochs")
        decayed: dict[str, Any] = {"params": [module.weight], "weight_decay": self.weight_decay}
        optimizer = torch.optim.SGD([decayed, {"params": [module.bias]}], lr=self.lr, momentum=MOMENTUM)
        scheduler = warmup_cosine(optimizer, warmup_steps=0, total_steps=int(total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def start(self, module: Any) -> None:
        """Begin or resume."""
        follow_schedule(module.trainer)
        if reads_in_order(module.trainer.train_dataloader):
            log.warning("training images come in the order of the data; SGD needs a loader that shuffles them")

    def step(self, module: Any, features: Tensor, labels: Tensor, samples: Any, batch_idx: int) -> Tensor:
        """The sum over layers of the mean cross-entropy, so that each layer learns as if it were alone.

        Args:
            module: The ProbeModule.
            features: Float (B, layers, D).
            labels: int64 (B,).
            samples: Not used.
            batch_idx: Not used.
        """
        n_layers = features.shape[1]
        logits = module.logits(features, batches=module.trainer.fit_loop.total_batch_idx + 1)  # (B, layers, C)
        mean = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(n_layers))
        module.log("train/cross_entropy", mean, prog_bar=True)
        return mean * n_layers

    def end(self, module: Any) -> None:
        """Nothing is left to do."""
