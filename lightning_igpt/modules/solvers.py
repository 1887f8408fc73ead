"""ProbeModule's solver L-BFGS: it collects features in one pass and fits classifiers to them by ``features``."""

import logging
import math
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_igpt.features import choose_c, fit_logistic, usable_grid
from lightning_igpt.modules.heads import vote
from lightning_igpt.modules.resume import trainer_of

log = logging.getLogger(__name__)


class FeatureStore:
    """Rows of features, read by columns; beyond ``max_bytes`` they move to temporary files without names, in TMPDIR."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._columns: list[Any] = []  # a spooled file each
        self._width = 0
        self.close()

    def __len__(self) -> int:
        return sum(map(len, self.labels))

    def add(self, features: Tensor, labels: Tensor, numbers: Tensor) -> None:
        """Append rows: float features (B, K, D) for K columns, kept as float32; labels and numbers, int64 (B,)."""
        self.labels.append(labels.cpu())
        self.numbers.append(numbers.cpu())
        columns = features.detach().float().cpu().transpose(0, 1).contiguous()  # (K, B, D)
        self._width = columns.shape[-1]
        if not self._columns:
            size = max(1, self.max_bytes // len(columns))
            self._columns = [tempfile.SpooledTemporaryFile(size) for _ in columns]  # noqa: SIM115 - see close()
        try:
            for file, rows in zip(self._columns, columns, strict=True):
                file.write(rows.numpy().tobytes())
        except OSError as error:
            text = f"the features of {len(self)} images do not fit into {tempfile.gettempdir()} ({error})"
            cure = "set TMPDIR to a folder with more room, probe fewer layers, or use solver=sgd, which keeps none"
            raise OSError(f"{text}; {cure}") from error

    def column(self, index: int) -> Tensor:
        """One layer's features of all rows, contiguous float32 (N, D) on the CPU."""
        file = self._columns[index]
        file.seek(0)
        return torch.frombuffer(bytearray(file.read()), dtype=torch.float32).view(-1, self._width)

    def close(self) -> None:
        """Forget all rows and free memory and files; columns in use stay valid."""
        for file in self._columns:
            file.close()
        self.labels: list[Tensor] = []  # and sample numbers, int64 (B,) each
        self.numbers: list[Tensor] = []
        self._columns = []


class WholeFit(torch.optim.Optimizer):
    """An optimizer of one step, in which its closure fits the parameters; Lightning saves checkpoints by its steps."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.0})  # which LearningRateMonitor reads

    def step(self, closure: Any = None) -> Any:
        return closure()


class Neighbors(nn.Module):
    """Votes of the k nearest training images of each layer, by cosine."""

    rows: Tensor  # features of the training images, of length 1: (layers, N, D)
    labels: Tensor  # int64 (N,)

    def __init__(self, n_layers: int, num_classes: int, width: int, k: int, temperature: float) -> None:
        super().__init__()
        self.num_classes, self.k, self.temperature = num_classes, k, temperature
        self.register_buffer("rows", torch.empty(n_layers, 0, width))
        self.register_buffer("labels", torch.empty(0, dtype=torch.long))

    def keep(self, features: Tensor, labels: Tensor, place: int) -> None:
        """Take the features (N, D) of the layer in a place, of which the first makes room for all."""
        if place == 0:
            self.rows, self.labels = features.new_empty(len(self.rows), *features.shape), labels
        self.rows[place] = F.normalize(features, dim=-1)

    def forget(self) -> None:
        """Forget all training images."""
        self.rows, self.labels = self.rows[:, :0].clone(), self.labels[:0].clone()

    def forward(self, features: Tensor) -> Tensor:
        """Logarithms of the votes for each class, (..., layers, C), of features (..., layers, D)."""
        parts = []
        for rows, part in zip(self.rows.float(), F.normalize(features, dim=-1).unbind(-2), strict=True):
            cosine, index = (part @ rows.T).topk(min(self.k, len(rows)))  # (..., k)
            weight = ((cosine - cosine[..., :1]) / self.temperature).exp()  # the nearest has 1
            votes = weight.new_zeros(*weight.shape[:-1], self.num_classes)
            parts.append(votes.scatter_add_(-1, self.labels[index], weight))
        return torch.stack(parts, -2).log()


class Lbfgs:
    """What ProbeModule does to fit its classifiers to all features at once: collect them in one pass, then fit.

    Where it has ``neighbors``, they keep the features instead.
    """

    def __init__(self, grid: Sequence[float], standardize: bool, max_iter: int, seed: int, max_bytes: int) -> None:
        self.grid, self.seed = grid, seed
        self.options: dict[str, Any] = {"standardize": standardize, "max_iter": max_iter}
        self.max_bytes, self.training = max_bytes, FeatureStore(max_bytes)
        self.validation: dict[int, FeatureStore] = {}  # of each loader, until the layers are fitted together

    def forget(self, probe: Any) -> None:
        """Forget features and classifiers of an earlier fit."""
        self.close()
        probe.weight.data.zero_()
        probe.bias.zero_()
        probe.best.fill_(-1)
        if probe.concat_head is not None:
            probe.concat_head.center.fill_(-1)
        if probe.neighbors is not None:
            probe.neighbors.forget()

    def collect(self, probe: Any, features: Tensor, labels: Tensor, samples: Any, batch_idx: int) -> None:
        """Keep the features (B, layers, D) of a training batch, and fit at the last; a sample number counts once."""
        trainer = trainer_of(probe)
        if trainer is None:
            raise ValueError("solver='lbfgs' fits at the end of a Trainer's pass; without a Trainer use solver='sgd'")
        if batch_idx and not len(self.training):
            text = f"this run was cut off after {batch_idx} batches, before the fit, and a checkpoint holds no features"
            raise ValueError(f"{text}; start again without ckpt_path")
        if not isinstance(samples, Tensor):  # as torch's DistributedSampler deals them out
            row = torch.arange(len(self.training), len(self.training) + len(labels))
            samples = row * trainer.world_size + trainer.global_rank
        self.training.add(features, labels, samples)
        if trainer.is_last_batch:
            probe.optimizers().step(lambda: self._fit_layers(probe))
            trainer.should_stop = True  # one pass is all there is to learn from frozen features

    def keep(self, features: Tensor, labels: Tensor, samples: Tensor, loader: int) -> None:
        """Keep the features (M, B, layers, D) of a validation batch for :meth:`fit_together`: of each label M rows."""
        store = self.validation.setdefault(loader, FeatureStore(self.max_bytes))
        store.add(features.transpose(0, 1).flatten(0, 1), labels, samples)

    def fit_together(self, probe: Any, counts: Sequence[Any]) -> None:
        """Fit to the layers around the best, and count the images of each loader that validation has kept."""
        head, together, device = probe.concat_head, len(probe.layers), probe.device
        head.center.copy_(probe.best)
        ((weight, bias, c),) = self._fit(probe, [head.places])
        head.weight.copy_(weight)
        head.bias.copy_(bias)
        probe.scores.put("c", [c], together)
        probe.log("probe/concat/c", c, sync_dist=True)
        for loader, kept in self.validation.items():
            labels, samples = torch.cat(kept.labels).to(device), torch.cat(kept.numbers).to(device)  # (N,)
            logits = head(lambda place, kept=kept: kept.column(place).to(device))  # (N * M, C)
            logits = logits.unflatten(0, (len(labels), -1)).transpose(0, 1).unsqueeze(2)  # (M, N, 1, C)
            counts[loader].update(vote(logits, samples, seed=probe.seed), labels, first=together)
        self.close()

    def forget_validation(self) -> None:
        """Forget the features of a validation, which may have broken off."""
        for store in self.validation.values():
            store.close()
        self.validation = {}

    def close(self) -> None:
        """Forget all features."""
        self.training.close()
        self.forget_validation()

    def _fit_layers(self, probe: Any) -> None:
        fitted = self._fit(probe, [[place] for place in range(len(probe.layers))])
        for place, (layer, (weight, bias, c)) in enumerate(zip(probe.layers, fitted, strict=True)):
            probe.weight.data[place], probe.bias[place] = weight, bias
            if probe.neighbors is None:
                probe.scores.put("c", [c], place)
                probe.log(f"probe/layer_{layer}/c", c, on_step=False, on_epoch=True, sync_dist=True)
        if probe.concat_head is None:
            self.close()

    def _fit(self, probe: Any, groups: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor, float]]:
        """Weight, bias and c for each group of columns, concatenated; every process fits all, to the rows of all.

        Rows count once each, in the order of their numbers, whatever the number of processes.
        """
        store, classes, several = self.training, probe.num_classes, probe.trainer.world_size > 1

        def gather(rows: Tensor) -> Tensor:
            return torch.cat(gather_all_tensors(rows.to(probe.device))) if several else rows.to(probe.device)

        # A line search is lost in bfloat16, and in validation Lightning forbids gradients.
        with torch.autocast(probe.device.type, enabled=False), torch.inference_mode(False):
            labels, numbers, fitted = gather(torch.cat(store.labels)), gather(torch.cat(store.numbers)), []
            order = torch.from_numpy(np.unique(numbers.cpu().numpy(), return_index=True)[1]).to(probe.device)
            if more := len(numbers) - len(order):
                log.warning("%d of %d training images came before and are left out", more, len(numbers))
            labels = labels[order]
            if bool((labels == labels[0]).all()):
                what = f"all {len(labels)} training images have the label {labels[0]}"
                raise ValueError(f"{what}; a probe needs two classes")
            # Here, so that a warning comes once.
            grid = usable_grid(self.grid, len(labels)) if probe.neighbors is None else self.grid
            for group in groups:
                parts = [gather(store.column(column))[order] for column in group]
                features = torch.cat(parts, 1) if len(parts) > 1 else parts[0]  # (N, columns * D)
                if probe.neighbors is not None:
                    probe.neighbors.keep(features, labels, group[0])
                    fitted.append((probe.weight[group[0]], probe.bias[group[0]], math.nan))
                    continue
                c = choose_c(features, labels, classes, grid=grid, seed=self.seed, **self.options)
                fitted.append((*fit_logistic(features, labels, classes, c=c, **self.options), c))
            return fitted
