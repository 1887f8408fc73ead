"""The probe's solver L-BFGS: collect all features in one pass, fit, and end the run.

The regression itself stands in ``features``, the sharing among processes in ``fitting``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_igpt.modules.probing.feature_store import FeatureStore
from lightning_igpt.modules.probing.fitting import Head, Logistic, fit_heads
from lightning_igpt.modules.probing.heads import vote
from lightning_igpt.modules.probing.samplers import rows_before_padding

log = logging.getLogger(__name__)


class Lbfgs:
    """Fits the classifiers of a ProbeModule, which every method is given.

    Every training image counts once, on several devices too: repeats are told by the loader's sample numbers, or by the
    layout of torch's DistributedSampler, which Lightning puts into ordinary loaders.

    Args:
        how: Fits one classifier.
        max_bytes: As in FeatureStore, per process.
    """

    def __init__(self, how: Logistic, max_bytes: int) -> None:
        self.how = how
        self.training, self.validation = FeatureStore(max_bytes), FeatureStore(max_bytes)
        self.n_rows: int | None = None

    @property
    def waits(self) -> bool:
        """Whether training features are kept, for layers that shall be fitted together once the best is known."""
        return len(self.training) > 0

    def configure(self, module: Any) -> torch.optim.Optimizer:
        """A clock. L-BFGS runs outside Lightning's sight, and Lightning saves nothing until it has counted a step."""
        return torch.optim.SGD([module.weight], lr=0.0)

    def start(self, module: Any) -> None:
        """Forget features and classifiers of an earlier fit."""
        self.clear()
        module.weight.data.zero_()
        module.bias.zero_()
        module.best.fill_(-1)
        if module.concat_head is not None:
            module.concat_head.center.fill_(-1)

    def step(self, module: Any, features: Tensor, labels: Tensor, samples: Any, batch_idx: int) -> None:
        """Take in a batch, and fit at the last.

        Args:
            module: The ProbeModule.
            features: Float (B, layers, D).
            labels: int64 (B,).
            samples: The loader's sample numbers, int64 (B,); anything else stands for none.
            batch_idx: Lightning's number of the batch.
        """
        if batch_idx and not self.waits:
            raise ValueError(
                f"this run was cut off after {batch_idx} batches, before the fit, and a checkpoint does not hold the "
                "features; start again without ckpt_path"
            )
        try:
            self.training.add(features, labels, self._numbers(module.trainer, labels, samples))
            if module.trainer.is_last_batch:
                self._fit_layers(module)
                module.optimizers().step()
                module.trainer.should_stop = True  # one pass is all there is to learn from frozen features
        except BaseException:
            self.clear()
            raise

    def keep(self, features: Tensor, labels: Tensor, samples: Tensor) -> None:
        """Keep a batch of validation, float (M, B, layers, D), until the layers are fitted together."""
        per_image = features.transpose(0, 1).flatten(0, 1)  # (B * M, layers, D), for each label M rows
        self.validation.add(per_image, labels, samples)

    def fit_together(self, module: Any) -> None:
        """Fit to the layers around the one that validation has picked, and count what validation has kept."""
        head, kept, device = module.concat_head, self.validation, module.device
        try:
            head.center.copy_(module.best)
            (fitted,) = self._fit(module, [head.places])
            head.weight.copy_(fitted.weight)
            head.bias.copy_(fitted.bias)
            module.scores.add_together(head.name, fitted.c)
            module.log("probe/concat/c", fitted.c, sync_dist=True)
            labels, samples = kept.labels.to(device), kept.numbers.to(device)  # (N,)
            logits = head(lambda place: kept.column(place).to(device))  # (N * M, C)
            logits = logits.unflatten(0, (len(labels), -1)).transpose(0, 1).unsqueeze(2)  # (M, N, 1, C)
            module.scores.update(vote(logits, samples, seed=module.seed), labels, first=len(module.layers))
        finally:
            self.clear()

    def end(self, module: Any) -> None:
        """Give the memory back."""
        if self.waits:
            log.warning("concat=%d was not fitted: without validation data no layer was picked", module.concat)
        self.clear()

    def clear(self) -> None:
        """Forget all features."""
        self.training.close()
        self.validation.close()

    def _numbers(self, trainer: Any, labels: Tensor, samples: Any) -> Tensor:
        if isinstance(samples, Tensor):
            self.n_rows = None
            return samples
        self.n_rows = rows_before_padding(trainer.train_dataloader)
        rank, world_size = int(trainer.global_rank), int(trainer.world_size)
        return torch.arange(len(self.training), len(self.training) + len(labels)) * world_size + rank

    def _fit_layers(self, module: Any) -> None:
        heads = self._fit(module, [[index] for index in range(len(module.layers))])
        for index, (layer, head) in enumerate(zip(module.layers, heads, strict=True)):
            module.weight.data[index], module.bias[index] = head.weight, head.bias
            module.results[index]["c"] = head.c
            module.log(f"probe/layer_{layer}/c", head.c, on_step=False, on_epoch=True, sync_dist=True)
        if module.concat_head is None:
            self.clear()

    def _fit(self, module: Any, groups: Sequence[Sequence[int]]) -> list[Head]:
        ranks = {"rank": module.global_rank, "world_size": module.trainer.world_size}
        options = {"num_classes": module.num_classes, "device": module.device, "n_rows": self.n_rows, **ranks}
        # A line search is lost in bfloat16, and in validation Lightning forbids gradients.
        with torch.autocast(module.device.type, enabled=False), torch.inference_mode(False):
            return fit_heads(self.training, groups, self.how, **options)
