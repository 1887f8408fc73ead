"""A classifier on detached features of one layer, trained during pretraining."""

from itertools import chain, islice, repeat
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_igpt.modules.batches import need_labels, read_batch
from lightning_igpt.sampling import evaluating

EPS = 1e-6  # added to variances, and Adam's: the rounding of a gradient that is zero shall not make a step


class OnlineHead(nn.Module):
    """Linear classifier of features (B, D), standardized by their running mean and variance to a length of about 1."""

    def __init__(self, n_embd: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, n_embd))  # nothing is drawn
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.mean, self.variance = nn.Buffer(torch.zeros(n_embd)), nn.Buffer(torch.zeros(n_embd))
        self.count = nn.Buffer(torch.zeros((), dtype=torch.long))  # batches seen

    def forward(self, features: Tensor) -> Tensor:
        scale = (self.variance * len(self.mean) + EPS).rsqrt()
        return nn.functional.linear((features - self.mean) * scale, self.weight, self.bias)

    @torch.no_grad()
    def follow(self, features: Tensor, mean_over_processes: Any) -> None:
        """Move mean and variance towards those of a batch (B, D)."""
        share = self.count.add_(1).float().reciprocal().clamp(min=0.1)  # a plain mean over the first ten batches
        centered = features - self.mean
        moments = mean_over_processes(torch.stack([centered.mean(0), centered.square().mean(0)]))  # (2, D)
        shift = share * moments[0]
        self.mean.add_(shift)
        self.variance.lerp_(moments[1], share).sub_(shift.square()).clamp_(min=0)


class OnlineProbe(Callback):
    """Train a linear classifier on the features of one layer during pretraining, and log its accuracy.

    Logs ``online_probe/layer_<l>/accuracy`` at each validation, lower than ``ProbeModule``'s, above all in the first
    few hundred steps. Training is the same with and without it, bit for bit.

    Args:
        layer: Number of the layer; 0 is the input of the first block, n_layer the final norm. Default: the middle one.
        data: Labeled data to learn from and validate on. Default: the run's own batches.
        num_classes: Number of classes. Default: the data's.
        every_n_steps: Optimizer steps of the network for one of the classifier.
        lr: Learning rate of the classifier's Adam.
    """

    def __init__(
        self, layer: int | None = None, *, data: LightningDataModule | None = None, num_classes: int | None = None,
        every_n_steps: int = 1, lr: float = 0.1,
    ) -> None:  # fmt: skip
        self.layer, self.data, self.num_classes = layer, data, num_classes
        self.every_n_steps, self.lr = every_n_steps, lr
        self._head: Any = None  # an OnlineHead

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}{ {'layer': self.layer}!r}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in ("fit", "validate"):
            return
        network: Any = pl_module.network
        self._layer = network.config.n_layer // 2 if self.layer is None else self.layer
        self._batches = self._held_out = None
        if self.data is not None:
            self.data.trainer = trainer  # it reads its share of the images and their size there
            if trainer.local_rank == 0:
                self.data.prepare_data()
            trainer.strategy.barrier()
            self.data.setup("fit")
            self._batches = chain.from_iterable(repeat(self.data.train_dataloader()))
            self._held_out = self.data.val_dataloader()
        classes = self.num_classes or getattr(self.data or getattr(trainer, "datamodule", None), "num_classes", None)
        if classes is None:
            raise ValueError("OnlineProbe: the data has no num_classes; set num_classes=")
        if stage == "fit" or self._head is None:
            self._head = OnlineHead(network.config.n_embd, classes).to(trainer.strategy.root_device)
            self._optimizer = torch.optim.Adam(self._head.parameters(), lr=self.lr, eps=EPS)
            self._accuracy = MulticlassAccuracy(classes, average="micro").to(trainer.strategy.root_device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, _: Any, batch: Any, *__: Any) -> None:
        before, self._step = self._step, trainer.global_step
        if self._step == before or self._step % self.every_n_steps:  # the batch was only accumulated, or not our turn
            return
        if self._batches is not None:
            with isolate_rng(include_cuda=False):  # the loader's draws move no generator of the run
                torch.default_generator.manual_seed(self._step * trainer.world_size + trainer.global_rank)
                batch = next(self._batches)
        features, labels = self._read(trainer, pl_module, batch)
        self._head.follow(features, trainer.strategy.reduce)
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(self._head(features), labels)
        weights = [self._head.weight, self._head.bias]
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.grad = trainer.strategy.reduce(gradient)
        self._optimizer.step()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, _: Any, batch: Any, *place: int) -> None:
        if self._held_out is None and not any(place[1:]):  # of the first loader
            features, labels = self._read(trainer, pl_module, batch)
            self._accuracy.update(self._head(features), labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        limit = trainer.limit_val_batches
        with isolate_rng(include_cuda=False):
            for batch in islice(self._held_out or (), limit if isinstance(limit, int) else None):
                features, labels = self._read(trainer, pl_module, batch)
                self._accuracy.update(self._head(features), labels)
        if self._head.count and not trainer.sanity_checking:  # a classifier at zero has learned nothing
            # The metric is the same on every process already; without sync_dist Lightning would warn.
            pl_module.log(f"online_probe/layer_{self._layer}/accuracy", self._accuracy.compute(), sync_dist=True)
        self._accuracy.reset()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._batches = self._held_out = None  # and their workers

    def state_dict(self) -> dict[str, Any]:
        return {"head": dict(self._head.state_dict()), "optimizer": self._optimizer.state_dict()} if self._head else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self._head is not None and state_dict:
            self._head.load_state_dict(state_dict["head"])
            self._optimizer.load_state_dict(state_dict["optimizer"])
            self._optimizer.param_groups[0]["lr"] = self.lr

    def _read(self, trainer: Trainer, pl_module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Features (B, D) and labels (B,) of a labeled batch on the module's device."""
        network, batch = pl_module.network, move_data_to_device(batch, pl_module.device)
        labeled = read_batch(batch, pl_module.palette, network.config, getattr(pl_module, "batch_keys", None))
        masked = torch.zeros_like(labeled.tokens, dtype=torch.bool) if network.config.objective == "bert" else None
        with evaluating(network), torch.no_grad(), trainer.precision_plugin.forward_context():  # without dropout
            features = network.features(labeled.tokens, [self._layer], masked=masked)
        return features[:, 0].float(), need_labels(labeled, len(self._head.bias))
