"""The parts of ProbeModule: where features wait, how classifiers are fitted to them, and votes of several masks.

The regression itself is in ``features``; here it is shared among the processes of a run.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DistributedSampler
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_igpt.features import choose_c, fit_logistic, usable_grid
from lightning_igpt.objectives import majority_vote

log = logging.getLogger(__name__)

EPS = 1e-6  # added to the variance, as in the probes of MAE


class FeatureStore:
    """Rows of features that grow by batches and are read by columns, one layer at a time.

    Args:
        max_bytes: Features kept in memory; beyond it they move to temporary files without names (Python's ``tempfile``,
            which follows TMPDIR), so that none outlives the process.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._columns: list[Any] = []  # a spooled file each
        self._width = 0
        self.close()

    def __len__(self) -> int:
        return sum(map(len, self._labels))

    @property
    def labels(self) -> Tensor:
        """The labels of all rows, int64 (N,)."""
        return torch.cat(self._labels)

    @property
    def numbers(self) -> Tensor:
        """The sample numbers of all rows, int64 (N,)."""
        return torch.cat(self._numbers)

    def add(self, features: Tensor, labels: Tensor, numbers: Tensor) -> None:
        """Append rows: float features (B, K, D) for K columns, kept as float32; labels and numbers, int64 (B,).

        Raises:
            OSError: The folder for temporary files is full.
        """
        self._labels.append(labels.cpu())
        self._numbers.append(numbers.cpu())
        columns = features.detach().float().cpu().transpose(0, 1).contiguous()  # (K, B, D)
        self._width = columns.shape[-1]
        if not self._columns:
            size = max(1, self.max_bytes // len(columns))
            self._columns = [tempfile.SpooledTemporaryFile(size) for _ in columns]  # noqa: SIM115 - see close()
        try:
            for file, rows in zip(self._columns, columns, strict=True):
                file.write(rows.numpy().tobytes())
        except OSError as error:
            raise OSError(
                f"the features of {len(self)} images do not fit into {tempfile.gettempdir()} ({error}); set TMPDIR to "
                "a folder with more room, probe fewer layers, or use solver=sgd, which keeps none"
            ) from error

    def column(self, index: int) -> Tensor:
        """One layer's features of all rows, contiguous float32 (N, D) on the CPU."""
        file = self._columns[index]
        file.seek(0)
        return torch.frombuffer(bytearray(file.read()), dtype=torch.float32).view(-1, self._width)

    def close(self) -> None:
        """Forget all rows and free memory and files; columns in use stay valid."""
        for file in self._columns:
            file.close()
        self._labels: list[Tensor] = []
        self._numbers: list[Tensor] = []
        self._columns = []


class Head(NamedTuple):
    """A fitted linear classifier of raw features."""

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    c: float


class Logistic(NamedTuple):
    """How to fit a classifier by L-BFGS: the settings of ``ProbeModule``."""

    grid: Sequence[float]  # values of c to choose from
    standardize: bool
    max_iter: int
    seed: int

    def fit(self, features: Tensor, labels: Tensor, num_classes: int) -> Head:
        """Choose c and fit to float (N, D) and int64 (N,)."""
        options: dict[str, Any] = {"standardize": self.standardize, "max_iter": self.max_iter}
        c = choose_c(features, labels, num_classes, grid=self.grid, seed=self.seed, **options)
        return Head(*fit_logistic(features, labels, num_classes, c=c, **options), c)


class WholeFit(torch.optim.Optimizer):
    """An optimizer of one step, in which its closure fits the parameters; Lightning saves checkpoints by its steps."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> Any:
        return closure()


def fit_heads(
    store: FeatureStore,
    groups: Sequence[Sequence[int]],
    how: Logistic,
    *,
    num_classes: int,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    n_rows: int | None = None,
) -> list[Head]:
    """Fit a classifier to each group of columns, concatenated, on all processes' rows, each row once.

    The processes take turns in fitting, so that several work at a time, and every process gets all classifiers. Rows
    are put into the order of their numbers, so that what is held out does not depend on the number of processes; those
    with a number from ``n_rows`` on are padding and left out.

    Raises:
        ValueError: All rows have the same label.
    """
    labels, order = _rows(store, device, world_size, n_rows)
    how = how._replace(grid=usable_grid(how.grid, len(labels)))  # here, so that a warning comes once
    heads: dict[int, Head] = {}
    for first in range(0, len(groups), world_size):
        features = torch.empty(0)
        for owner, group in enumerate(groups[first : first + world_size]):
            parts = [_gather(store.column(column).to(device), world_size) for column in group]
            if owner == rank:
                features = torch.cat(parts, 1) if len(parts) > 1 else parts[0]  # (N, columns * D)
        if first + rank < len(groups):
            heads[first + rank] = how.fit(features if order is None else features[order], labels, num_classes)
    if world_size > 1:
        mine = {number: Head(head.weight.cpu(), head.bias.cpu(), head.c) for number, head in heads.items()}
        everyone: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(everyone, mine)
        heads = {number: head for part in everyone for number, head in part.items()}
    return [heads[number] for number in range(len(groups))]


def rows_once(numbers: Tensor, n_rows: int | None = None) -> Tensor:
    """Where each of int64 ``numbers`` (N,) comes first, by ascending number, without those from ``n_rows`` on."""
    order = numbers.argsort(stable=True)
    ascending = numbers[order]
    keep = torch.ones_like(ascending, dtype=torch.bool)
    keep[1:] = ascending[1:] != ascending[:-1]
    return order[keep if n_rows is None else keep & (ascending < n_rows)]


def rows_before_padding(loader: Any) -> int | None:
    """Rows that torch's DistributedSampler shares out among processes, padded with repeats at the end.

    Its row k of process r is number ``k * processes + r`` of the whole, so the repeats are the numbers from the value
    returned on. None for any other loader: what its sampler repeats is unknown.
    """
    batches = getattr(loader, "batch_sampler", None)
    if type(batches) not in (BatchSampler, type(None)):
        return None
    sampler: Any = getattr(batches, "sampler", None) or getattr(loader, "sampler", None)
    return len(sampler.dataset) if type(sampler) in (DistributedSampler, DistributedSamplerWrapper) else None


def _rows(
    store: FeatureStore, device: torch.device, world_size: int, n_rows: int | None
) -> tuple[Tensor, Tensor | None]:
    """(labels of the rows to fit to, their places among all processes' rows; None if these are all, in order)."""
    labels = _gather(store.labels.to(device), world_size)
    numbers = _gather(store.numbers.to(device), world_size)
    order = rows_once(numbers, n_rows)
    if len(order) < len(numbers):
        level = logging.INFO if world_size > 1 else logging.WARNING  # several processes: the sampler has padded
        log.log(level, "%d of %d training images came before and are left out", len(numbers) - len(order), len(numbers))
    labels = labels[order]
    if bool((labels == labels[0]).all()):
        raise ValueError(
            f"all {len(labels)} training images have the label {int(labels[0])}; a probe needs two classes"
        )
    return labels, None if torch.equal(order, torch.arange(len(numbers), device=device)) else order


def _gather(rows: Tensor, world_size: int) -> Tensor:
    """The rows of all processes, in the order of ranks."""
    return torch.cat(gather_all_tensors(rows)) if world_size > 1 else rows


class RunningScale(nn.Module):
    """Scale each feature of each layer to mean 0 and variance 1: batch normalization without gain and bias.

    A training batch, that of all processes together, is scaled by its own statistics. In evaluation their means over
    all training batches scale, since frozen features do not drift.
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, n_layers: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_layers * width))
        self.register_buffer("variance", torch.ones(n_layers * width))

    def forward(self, features: Tensor, batches: int | None = None) -> Tensor:
        """Scaled features (..., layers, D); in training ``batches`` is their count so far, this batch included."""
        flat = features.reshape(-1, len(self.mean))
        mean, variance = self.mean.float(), self.variance.float()
        rows = 0 if batches is None else len(flat)
        if rows and _are_several():  # else the device need not be asked
            rows = int(_of_all_processes(torch.tensor(rows, device=flat.device)))
        if batches is not None and rows > 1:  # a single row has no variance
            mean = _of_all_processes(flat.sum(0)) / rows
            variance = _of_all_processes((flat - mean).square().sum(0)) / rows
            unbiased = variance * rows / (rows - 1)
            self.mean.lerp_(mean.to(self.mean.dtype), 1 / batches)
            self.variance.lerp_(unbiased.to(self.variance.dtype), 1 / batches)
        return ((flat - mean) * (variance + EPS).rsqrt()).view_as(features)


def _of_all_processes(value: Tensor) -> Tensor:
    """The sum over all processes, in place; all must call it together."""
    if _are_several():
        torch.distributed.all_reduce(value)
    return value


def _are_several() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


class Correct(Metric):
    """How many predictions of each of n classifiers are right."""

    right: Tensor
    total: Tensor

    def __init__(self, n: int) -> None:
        super().__init__()
        self.add_state("right", torch.zeros(n, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(n, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor, first: int = 0) -> None:
        """Count int64 predictions (B, k) of the k classifiers from place ``first`` on, against int64 labels (B,)."""
        places = slice(first, first + predictions.shape[1])
        self.right[places] += (predictions == labels[:, None]).sum(0)
        self.total[places] += len(labels)

    def compute(self) -> Tensor:
        """The share that is right, float32 (n,)."""
        return self.right.float() / self.total.clamp(min=1).float()


class ConcatHead(nn.Module):
    """A classifier of the concatenated features of ``count`` of the probed ``layers`` (paper, section 4.4)."""

    weight: Tensor  # (C, count * D)
    bias: Tensor  # (C,)
    center: Tensor  # place in layers that the concatenated layers are centered on; -1 before the fit

    def __init__(self, layers: Sequence[int], count: int, num_classes: int, width: int) -> None:
        super().__init__()
        self.layers, self.count = list(layers), count
        self.register_buffer("weight", torch.zeros(num_classes, count * width))
        self.register_buffer("bias", torch.zeros(num_classes))
        self.register_buffer("center", torch.tensor(-1))

    @property
    def fitted(self) -> bool:
        """Whether there is a classifier."""
        return int(self.center) >= 0

    @property
    def places(self) -> list[int]:
        """Places in ``layers`` of the ``count`` layers nearest in depth to the center, from shallow to deep.

        At the ends the window is moved, not cut: of layers 0 to 12, five around 11 are 8 to 12.
        """
        by_depth = sorted(range(len(self.layers)), key=self.layers.__getitem__)
        start = by_depth.index(int(self.center)) - self.count // 2
        start = min(max(0, start), len(self.layers) - self.count)
        return by_depth[start : start + self.count]

    @property
    def name(self) -> str:
        """The layers, such as 8-12, or 8+10+12 where some between are not probed."""
        layers = [self.layers[place] for place in self.places]
        gapless = layers == list(range(layers[0], layers[-1] + 1))
        return f"{layers[0]}-{layers[-1]}" if gapless and len(layers) > 1 else "+".join(map(str, layers))

    def forward(self, read: Callable[[int], Tensor]) -> Tensor:
        """Logits (..., C), where ``read`` gives the features (..., D) of the layer in a place, read in turn."""
        parts = self.weight.float().chunk(self.count, dim=1)  # count of (C, D)
        logits = self.bias.float()
        for place, part in zip(self.places, parts, strict=True):
            logits = logits + read(place) @ part.T
        return logits


def vote(logits: Tensor, samples: Tensor, *, seed: int) -> Tensor:
    """The classes that most masks name, for each of n classifiers by itself (paper, section 4.6), int64 (B, n).

    Args:
        logits: Float (M, B, n, C).
        samples: int64 (B,), the number of each sample; decides ties together with ``seed``.
        seed: Any integer.
    """
    votes = logits.argmax(-1)  # (M, B, n)
    if len(votes) == 1:
        return votes[0]
    _, n_rows, n_heads, num_classes = logits.shape
    numbers = samples.repeat_interleave(n_heads)
    return majority_vote(votes.flatten(1), numbers, num_classes, seed=seed).view(n_rows, n_heads)


def choose_layers(layers: Any, n_layer: int) -> list[int]:
    """The layer numbers that ``layers`` stands for: ``all``, or a list of numbers from 0 to ``n_layer``.

    Raises:
        ValueError: It is neither.
    """
    if layers != "all" and not isinstance(layers, (list, tuple, range)):
        raise ValueError(f"layers is {layers!r}; it must be 'all' or a list of layer numbers")
    chosen = list(range(n_layer + 1)) if layers == "all" else list(layers)
    if not chosen or not all(0 <= layer <= n_layer for layer in chosen):
        raise ValueError(f"layers is {layers}; name one or more from 0 to {n_layer}, or 'all'")
    return chosen


def check_concat(concat: int | None, n_layers: int, solver: str) -> None:
    """Raise ValueError where so many layers cannot be fitted together."""
    if concat is None:
        return
    if concat < 1 or concat % 2 == 0:
        raise ValueError(f"concat is {concat}; it must be an odd number, as the layers are centered on the best")
    if concat > n_layers:
        raise ValueError(
            f"concat is {concat}, but only {n_layers} layers are probed; lower it, or name more in layers="
        )
    if solver == "sgd":
        raise ValueError(f"concat={concat} needs the features that solver='sgd' does not keep; use solver='lbfgs'")
