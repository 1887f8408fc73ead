"""How linearly separable the classes are while pretraining goes on: a classifier on detached features of one layer.

A cheap picture of progress, which lags behind the network and reads low in its first few hundred steps; the numbers
of the paper's protocol are ``ProbeModule``'s.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

MOMENTUM = 0.1  # share of a new batch in the running mean and variance of the features
EPS = 1e-6  # beside variances, and in Adam: the rounding of a gradient that is zero shall not make a step


class OnlineHead(nn.Module):
    """Linear classifier of features that drift: it standardises them by their running mean and variance.

    Everything starts at zero, without a draw. A standardised feature vector has a length of about 1 whatever its width,
    so one learning rate suits every network.

    Args:
        n_embd: Width D of the features.
        num_classes: C.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, n_embd: int, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_classes, n_embd))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.register_buffer("mean", torch.zeros(n_embd))
        self.register_buffer("variance", torch.zeros(n_embd))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))  # batches seen

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of features (B, D)."""
        scale = (self.variance * len(self.mean) + EPS).rsqrt()
        return F.linear((features - self.mean) * scale, self.weight, self.bias)

    @torch.no_grad()
    def follow(self, features: Tensor) -> None:
        """Move mean and variance towards those of a batch (B, D), all processes together."""
        self.count += 1
        share = self.count.float().reciprocal().clamp(min=MOMENTUM)  # a plain mean over the first batches
        apart = features - self.mean
        moments = _mean_over_processes(torch.stack([apart.mean(0), apart.square().mean(0)]))  # (2, D)
        shift = share * moments[0]
        self.mean += shift
        self.variance.lerp_(moments[1], share).sub_(shift.square()).clamp_(min=0)


class OnlineProbe(Callback):
    """Train a linear classifier on the features of one layer beside pretraining, and log its accuracy.

    Logs ``online_probe/layer_<l>/accuracy`` at each validation. Training is what it would be without the callback, to
    the last bit: no gradient reaches the network, no random number is drawn, and the classifier is no part of the
    module. It is saved with the callback's state; checkpoints load with and without it.

    Labels come from ``data``, from ``loader``, or, with neither, from the batches of the run itself. Each step costs a
    forward pass up to ``layer`` beside the step of pretraining: with the middle layer about a sixth of it.
    BERT networks see whole images here.

    Args:
        layer: Number of the layer; 0 is the input of the first block, n_layer the final norm. Default: the middle one.
        data: Labelled data to learn from and validate on, where the images of the run have no labels; in a recipe
            a class_path such as FineTuneDataModule with its init_args.
        loader: Python only: labelled batches to learn from; the run's own validation batches are the test.
        num_classes: Number of classes. Default: the data's.
        every_n_steps: Optimiser steps of the network for one of the classifier.
        lr: Learning rate of the classifier's Adam.

    Raises:
        ValueError: A setting is out of range.
    """

    def __init__(
        self,
        layer: int | None = None,
        *,
        data: LightningDataModule | None = None,
        loader: Iterable[Any] | None = None,
        num_classes: int | None = None,
        every_n_steps: int = 1,
        lr: float = 0.1,
    ) -> None:
        if data is not None and loader is not None:
            raise ValueError("data and loader are both given; the probe learns from one of them")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps is {every_n_steps}; it must be at least 1")
        if not lr > 0:
            raise ValueError(f"lr is {lr}; it must be above 0")
        self.layer, self.data, self.loader = layer, data, loader
        self.num_classes, self.every_n_steps, self.lr = num_classes, every_n_steps, lr
        self._head: OnlineHead | None = None
        self._step = 0  # the last optimiser step seen
        self._batches: Iterator[Any] | None = None  # labelled batches without end; None: the run's own
        self._held_out: Iterable[Any] | None = None

    @property
    def state_key(self) -> str:
        """Tells the probes of several layers apart in a checkpoint."""
        return self._generate_state_key(layer=self.layer)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the labelled data and make the classifier.

        Raises:
            TypeError: The module has no network to probe.
            ValueError: The layer does not exist, the number of classes is unknown, or ``data`` is no use.
        """
        if stage not in ("fit", "validate"):
            return
        if not hasattr(pl_module, "tokens_of") or not hasattr(pl_module, "network"):
            raise TypeError(
                f"OnlineProbe needs a PretrainModule; {type(pl_module).__name__} has no tokens_of(batch) or no network"
            )
        network: Any = pl_module.network
        config = network.config
        self._layer = config.n_layer // 2 if self.layer is None else self.layer
        if not 0 <= self._layer <= config.n_layer:
            raise ValueError(f"layer is {self.layer}; name one from 0 to {config.n_layer}")
        self._open_data(trainer)
        classes = self.num_classes or getattr(self.data or getattr(trainer, "datamodule", None), "num_classes", None)
        if classes is None:
            raise ValueError("OnlineProbe: num_classes is unknown: the data does not tell it, so set num_classes=")
        if stage == "fit" or self._head is None:
            device = trainer.strategy.root_device
            self._head = OnlineHead(config.n_embd, classes).to(device)
            self._optimizer = torch.optim.Adam(self._head.parameters(), lr=self.lr, eps=EPS)
            self._accuracy = MulticlassAccuracy(classes, average="micro").to(device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take a step of the classifier, if the network took one and its turn has come."""
        if trainer.global_step == self._step:
            return  # gradients were only accumulated
        self._step = trainer.global_step
        if self._step % self.every_n_steps:
            return
        if self._batches is not None:
            with _own_randomness(self._step * trainer.world_size + trainer.global_rank):
                batch = move_data_to_device(next(self._batches), pl_module.device)
        self._learn(*self._read(trainer, pl_module, batch))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count hits in a batch of the first validation loader, where that is the labelled one."""
        if self._held_out is None and dataloader_idx == 0:
            self._count(trainer, pl_module, batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the accuracy over all processes."""
        if self._held_out is not None:
            limit = trainer.limit_val_batches
            with _own_randomness(trainer.global_rank):
                for batch in islice(self._held_out, limit if isinstance(limit, int) else None):
                    self._count(trainer, pl_module, move_data_to_device(batch, pl_module.device))
        assert self._head is not None
        if self._head.count and not trainer.sanity_checking:  # a classifier at zero has nothing to say
            # The metric is the same on every process already; sync_dist only tells Lightning so.
            pl_module.log(f"online_probe/layer_{self._layer}/accuracy", self._accuracy.compute(), sync_dist=True)
        self._accuracy.reset()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the loaders and their workers."""
        self._batches = self._held_out = None

    def state_dict(self) -> dict[str, Any]:
        """Classifier and optimiser, as tensors and plain values."""
        if self._head is None:
            return {}
        return {"head": dict(self._head.state_dict()), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the classifier of a checkpoint, at this probe's learning rate.

        Raises:
            ValueError: It tells another number of classes apart.
        """
        if self._head is None or not state_dict:
            return
        found, mine = len(state_dict["head"]["bias"]), len(self._head.bias)
        if found != mine:
            raise ValueError(f"the checkpoint's OnlineProbe has {found} classes, this one has {mine}; set num_classes")
        self._head.load_state_dict(state_dict["head"])
        self._optimizer.load_state_dict(state_dict["optimizer"])
        self._optimizer.param_groups[0]["lr"] = self.lr

    def _open_data(self, trainer: Trainer) -> None:
        if self.loader is not None:
            self._batches = _endless(self.loader)
        if self.data is None:
            return
        self.data.trainer = trainer  # from which it learns its share of the images and their size
        if trainer.local_rank == 0:
            self.data.prepare_data()
        trainer.strategy.barrier()
        self.data.setup("fit")
        self._batches, self._held_out = _endless(self.data.train_dataloader()), self.data.val_dataloader()
        if isinstance(self._held_out, (list, tuple, dict)):
            raise ValueError(
                f"OnlineProbe reads one loader of validation images; {type(self.data).__name__} gives "
                f"{len(self._held_out)}" + ("" if self._held_out else ": let it hold some out, as with val_fraction=")
            )

    def _read(self, trainer: Trainer, pl_module: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """(features (B, D), labels (B,)) of a labelled batch on the module's device."""
        assert self._head is not None
        labels, network = labels_of(batch, len(self._head.bias)), pl_module.network
        tokens = pl_module.tokens_of(batch)
        masked = torch.zeros_like(tokens, dtype=torch.bool) if network.config.objective == "bert" else None
        with _evaluating(network), torch.no_grad(), trainer.precision_plugin.forward_context():
            features = network.features(tokens, [self._layer], masked=masked)
        return features[:, 0].float(), labels

    def _learn(self, features: Tensor, labels: Tensor) -> None:
        assert self._head is not None
        self._head.follow(features)
        with torch.enable_grad():
            loss = F.cross_entropy(self._head(features), labels)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in self._head.parameters():
            parameter.grad = _mean_over_processes(parameter.grad)
        self._optimizer.step()

    def _count(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        assert self._head is not None
        features, labels = self._read(trainer, pl_module, batch)
        self._accuracy.update(self._head(features), labels)


def labels_of(batch: Any, num_classes: int) -> Tensor:
    """The labels of a batch: under ``label`` in a mapping, or the second of a pair.

    Raises:
        ValueError: There are none, or one is outside 0 .. num_classes - 1.
    """
    labels = None
    if isinstance(batch, Mapping):
        labels = batch.get("label")
    elif isinstance(batch, Sequence) and len(batch) > 1:
        labels = batch[1]
    if not isinstance(labels, Tensor):
        raise ValueError("OnlineProbe needs labels and this batch has none: give it labelled images with data=")
    # On an accelerator the comparison would stall the queue at every step; there cross_entropy itself asserts.
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"OnlineProbe: labels run from {int(labels.min())} to {int(labels.max())}, but num_classes is "
            f"{num_classes}: 0 to {num_classes - 1}"
        )
    return labels.long()


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("OnlineProbe: the labelled loader yields no batch")


def _mean_over_processes(values: Any) -> Any:
    """The mean of a tensor over the processes of a distributed run, on each of them."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values /= torch.distributed.get_world_size()
    return values


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Dropout off; each part goes back to its own mode."""
    training = [part for part in network.modules() if part.training]
    network.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """What a loader draws, for its order or augmentation, moves no generator of the run."""
    with isolate_rng(include_cuda=False):
        torch.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
