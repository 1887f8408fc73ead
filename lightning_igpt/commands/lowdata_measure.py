"""The measuring behind ``lightning-igpt lowdata``: balanced random subsets, features, logistic regression, accuracy.

Not here: arguments, tables and files (``lowdata.py``).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_igpt.data import ProbeDataModule
from lightning_igpt.data.readers import ImageBatches
from lightning_igpt.features import fit_logistic
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules.batches import read_batch
from lightning_igpt.objectives import MASK_RATIO, draw_mask
from lightning_igpt.palette import Palette
from lightning_igpt.progress import track


@dataclass(frozen=True)
class Result:
    """Test accuracy at one layer and budget, 0 to 1, one for each subset."""

    layer: int
    labels_per_class: int
    accuracies: list[float]

    @property
    def mean(self) -> float:
        """Over the subsets."""
        return statistics.fmean(self.accuracies)

    @property
    def sd(self) -> float | None:
        """Sample standard deviation over the subsets; None for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


@dataclass(frozen=True)
class Parts:
    """Training and test images with their labels, int64 (N,)."""

    train: ImageBatches
    test: ImageBatches
    train_labels: Tensor
    test_labels: Tensor
    n_classes: int

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of classes and images, for the record."""
        return {"n_classes": self.n_classes, "n_train_images": len(self.train), "n_test_images": len(self.test)}


@dataclass(frozen=True)
class Reader:
    """Turns rows of a part of the data into features of a frozen network."""

    network: ImageGPT
    palette: Palette
    layers: list[int]
    seed: int
    batch_size: int
    num_workers: int

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.network.wpe.weight.device

    @torch.no_grad()
    def read(self, images: ImageBatches, rows: Sequence[int]) -> Tensor:
        """Features of these rows, float32 (len(rows), layers, D), on the CPU.

        A BERT network sees each image under one mask, a pure function of the seed and the image's row.
        """
        config = self.network.config
        draws = [[(row, row) for row in rows[i : i + self.batch_size]] for i in range(0, len(rows), self.batch_size)]
        loader: DataLoader[Any] = DataLoader(images, batch_size=None, sampler=draws, num_workers=self.num_workers)
        parts = []
        for batch in track(loader, "features of batches", len(draws)):
            batch = {name: values.to(self.device) for name, values in batch.items()}
            tokens, masked = read_batch(batch, self.palette, config).tokens, None
            if config.objective == "bert":
                masked = draw_mask(batch["sample"], config.n_positions, seed=self.seed, ratio=MASK_RATIO)
            parts.append(self.network.features(tokens, self.layers, masked=masked).float().cpu())  # (B, layers, D)
        return torch.cat(parts)


def open_parts(data: ProbeDataModule, largest: int) -> Parts:
    """Open the source, and check that it has test labels and enough images of each class.

    Args:
        data: Options, not set up yet.
        largest: The largest budget.

    Raises:
        ValueError: The source cannot be used; or a class is too small, and the message names both numbers.
    """
    data.setup()
    train, test = data.train_dataloader().dataset, data.test_dataloader().dataset
    assert isinstance(train, ImageBatches) and isinstance(test, ImageBatches) and data.class_names is not None
    assert train.labels is not None and test.labels is not None
    counts = train.labels.bincount(minlength=len(data.class_names))
    fewest = int(counts.argmin())
    if counts[fewest] < largest:
        raise ValueError(
            f"class {data.class_names[fewest]!r} has {counts[fewest]} training images, fewer than the {largest} labels "
            f"per class asked for; set --labels_per_class to at most {counts[fewest]}"
        )
    return Parts(train, test, train.labels, test.labels, len(data.class_names))


def draw_subsets(labels: Tensor, n_classes: int, largest: int, n_subsets: int, *, seed: int) -> Tensor:
    """Rows of balanced random subsets, drawn without replacement.

    Args:
        labels: int64 (N,), each class at least ``largest`` times.
        n_classes: C.
        largest: Rows per class. The first n of them are the subset of the budget n, so that results do not depend on
            which other budgets are asked for.
        n_subsets: How many, S.
        seed: Of the draws.

    Returns:
        int64 (S, C, largest).
    """
    generators = [np.random.default_rng([seed, subset]) for subset in range(n_subsets)]
    classes = [np.flatnonzero(labels.numpy() == number) for number in range(n_classes)]
    drawn = [[rng.permutation(rows)[:largest] for rows in classes] for rng in generators]
    return torch.from_numpy(np.array(drawn))


def measure(reader: Reader, parts: Parts, subsets: Tensor, budgets: Sequence[int], c: float) -> Iterator[Result]:
    """Test accuracy for every layer, budget and subset; each image goes through the network once.

    Args:
        reader: Computes the features.
        parts: The images. Of those to train on, only the ones in a subset are read.
        subsets: int64 (S, C, n), from draw_subsets.
        budgets: Labels per class.
        c: Inverse strength of the penalty.
    """
    device = reader.device
    rows = subsets.unique()  # type: ignore[no-untyped-call]  # ascending
    train, test = reader.read(parts.train, rows.tolist()), reader.read(parts.test, range(len(parts.test)))
    train_labels, test_labels = parts.train_labels[rows].to(device), parts.test_labels.to(device)
    for index, layer in enumerate(reader.layers):
        x, x_test = train[:, index].to(device), test[:, index].to(device)
        for budget in budgets:
            accuracies = []
            for subset in track(subsets, f"fitting probes: layer {layer}, {budget} labels per class"):
                places = torch.searchsorted(rows, subset[:, :budget].flatten()).to(device)
                weight, bias = fit_logistic(x[places], train_labels[places], parts.n_classes, c=c)
                right = (x_test @ weight.T + bias).argmax(1) == test_labels
                accuracies.append(right.double().mean().item())
            yield Result(layer, budget, accuracies)
