"""The parts of classifiers: heads, counts, votes of several masks; the names of classes, and what data calls them."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.metric import jit_distributed_available

from lightning_igpt.modules.build import check_settings
from lightning_igpt.modules.resume import own_data, trainer_of
from lightning_igpt.objectives import majority_vote
from lightning_igpt.weights.checkpoint import STAMP

log = logging.getLogger(__name__)

COLUMNS = ("c", "val_accuracy", "test_accuracy")
EPS = 1e-6  # added to the variance, as in the probes of MAE


class RunningScale(nn.Module):
    """Batch normalization of each feature over all processes; evaluation takes the means over all training batches."""

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
        if rows and jit_distributed_available():  # else the device need not be asked
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
    if jit_distributed_available():
        torch.distributed.all_reduce(value)
    return value


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


class Scores(nn.Module):
    """What the fit and the last evaluations gave for each of n classifiers; a state dict brings it along.

    Numbers are float64, kept as their bits in int64: ``module.to(dtype)`` would round floats.
    """

    bits: Tensor  # (n, 3)
    last: Tensor  # column of the last evaluation, 0 before any

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("bits", torch.full((n, 3), torch.nan, dtype=torch.float64, device="cpu").view(torch.int64))
        self.register_buffer("last", torch.zeros((), dtype=torch.long, device="cpu"))

    def put(self, column: str, values: Tensor | list[float], first: int = 0) -> None:
        """Set a column from row ``first`` on, from floats (k,)."""
        bits = torch.as_tensor(values, dtype=torch.float64, device="cpu").view(torch.int64)
        self.bits[first : first + len(bits), COLUMNS.index(column)] = bits.to(self.bits.device)
        if column != "c":
            self.last.fill_(COLUMNS.index(column))

    def column(self, number: int, names: Sequence[int]) -> dict[int, float]:
        """The numbers of a column by name, where there are some."""
        return {row["layer"]: row[COLUMNS[number]] for row in self.rows(names) if row[COLUMNS[number]] is not None}

    def rows(self, names: Sequence[int | str]) -> list[dict[str, Any]]:
        """A row for each name: layer and columns, None where there is no number yet."""
        numbers = self.bits.cpu().view(torch.float64)[: len(names)].tolist()
        known = [[None if math.isnan(value) else value for value in row] for row in numbers]
        return [{"layer": name} | dict(zip(COLUMNS, row, strict=True)) for name, row in zip(names, known, strict=True)]


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
        """Places in ``layers`` of the ``count`` nearest in depth to the center; at the ends the window is moved."""
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
    """The class that most masks of ``logits`` (M, B, n, C) name, int64 (B, n); samples and ``seed`` decide ties."""
    votes = logits.argmax(-1)  # (M, B, n)
    if len(votes) == 1:
        return votes[0]
    _, n_rows, n_heads, num_classes = logits.shape
    numbers = samples.repeat_interleave(n_heads)
    return majority_vote(votes.flatten(1), numbers, num_classes, seed=seed).view(n_rows, n_heads)


def choose_layers(layers: Any, n_layer: int) -> list[int]:
    """Layer numbers from ``all`` or a list of numbers from 0 to ``n_layer``; ValueError for other values."""
    chosen = range(n_layer + 1) if layers == "all" else layers
    if not isinstance(chosen, (list, tuple, range)) or not chosen or not set(chosen) <= set(range(n_layer + 1)):
        raise ValueError(f"layers is {layers!r}; it must be 'all', or a list of one or more from 0 to {n_layer}")
    return list(chosen)


def check_concat(concat: int | None, n_layers: int, solver: str) -> None:
    """Raise ValueError where so many layers cannot be fitted together."""
    if concat is None:
        return
    if concat < 1 or concat % 2 == 0:
        raise ValueError(f"concat is {concat}; it must be an odd number, as the layers are centered on the best")
    if concat > n_layers:
        raise ValueError(f"concat is {concat}, but the probed layers are {n_layers}; lower it or name more in layers=")
    if solver != "lbfgs":
        raise ValueError(f"concat={concat} needs a fit to all features, which solver={solver!r} has not; use 'lbfgs'")


def check_fit(solver: str, grid: Sequence[float], **numbers: Any) -> None:
    """Raise ValueError where a setting of a solver makes no sense."""
    if solver not in ("lbfgs", "sgd", "knn"):
        raise ValueError(f"solver is {solver!r}; it must be 'lbfgs', 'sgd' or 'knn'")
    if not grid:
        raise ValueError("c is an empty list; give one value or several to choose from")
    above = {name: numbers.pop(name) for name in ("max_iter", "lr", "k", "temperature")}
    check_settings(above_zero=above | {"c": min(grid)}, **numbers)


def check_same_probe(mine: Mapping[str, Any], saved: Mapping[str, Any], n_layer: int) -> None:
    """Raise ValueError where a checkpoint's hyperparameters are those of other classifiers than the module's."""
    for name, before in (("layers", "all"), ("solver", "lbfgs"), ("concat", None)):  # before they were options
        theirs, ours = saved.get(name, before), mine[name]
        if name == "layers":
            theirs, ours = choose_layers(theirs, n_layer), choose_layers(ours, n_layer)
        if theirs != ours:
            raise ValueError(f"the checkpoint's probe has {name}={theirs}, this one {name}={ours}; make them equal")


def make_room(probe: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a probe load the classifiers of a state dict, of any size; those before 0.2 have no scores."""
    if (bias := state.get(f"{prefix}bias")) is not None and bias.shape[1] != probe.num_classes:
        probe.set_classes(bias.shape[1])
    for name in ("rows", "labels") if probe.neighbors is not None else ():
        setattr(probe.neighbors, name, torch.empty_like(state[f"{prefix}neighbors.{name}"], device=probe.device))
    for name, value in probe.scores.state_dict(prefix=f"{prefix}scores.").items():
        state.setdefault(name, value)


def check_class_names(names: Any, num_classes: int | None) -> None:
    """Raise ValueError unless names are a list of different texts, one per class."""
    if names is None:
        return
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"class_names is {names!r}; it must be a list of texts")
    if not len(set(names)) == len(names) == (num_classes or len(names)):
        raise ValueError(f"class_names is {names!r}; it must be {num_classes or len(names)} different names")


def classes_of_data(trainer: Trainer) -> tuple[int | None, list[str] | None]:
    """(number, names) of the classes of the data module that is in use now, if it is one of this package's."""
    data = own_data(trainer)
    if data is None:
        return None, None
    check_class_names(data.class_names, data.num_classes)  # a subclass may set anything
    return data.num_classes, data.class_names


def adopt_class_names(module: Any) -> None:
    """Take the data's class names where training has set none; ValueError where the data has more classes."""
    count, names = classes_of_data(module.trainer)
    count = module.num_classes if count is None or module.trainer.predicting else count
    if count > module.num_classes and not module.trained_classes:  # else match_classes names both
        cure = f"set num_classes={count}, or remove the classes that a trained network does not know"
        raise ValueError(f"num_classes is {module.num_classes} but the data has {count}, {names}; {cure}")
    if count < module.num_classes:
        log.warning("num_classes is %d but the data has only %d classes", module.num_classes, count)
    if names is not None and not (module.names_given or module.trained_classes):
        rest = (f"LABEL_{number}" for number in range(len(names), module.num_classes))  # classes that the data lacks
        module.class_names = module.hparams["class_names"] = [*names, *rest][: module.num_classes]


def match_classes(module: Any) -> None:
    """Match the data's classes by name with those of training; ValueError where the module was not trained on one.

    ``label_places`` becomes the class of each of the data's labels, None where they are the same.
    """
    trainer, module.label_places = trainer_of(module), None
    if trainer is None or trainer.predicting or (names := classes_of_data(trainer)[1]) is None:
        return
    known = module.trained_classes or module.class_names or names
    if set(names) <= set(known):
        places = [known.index(name) for name in names]
        if places != list(range(len(names))):
            module.label_places = torch.tensor(places, device=module.device)
    elif module.trained_classes is not None:
        cure = "use the names of training, or start a new run from the weights with pretrained="
        raise ValueError(f"the network was trained on the classes {known}, but the data has {list(names)}: {cure}")
    else:
        log.warning("class_names %s rename the data's classes %s, in this order", known, names)
        known = list(names)
    if trainer.training:
        module.trained_classes = list(known)


def load_classes(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Name the classes as in training, whatever the data at hand calls its own."""
    module.trained_classes = checkpoint[STAMP].get("classes")
    saved = checkpoint.get("hyper_parameters", {}).get("class_names")
    if module.names_given or saved is None or module.class_names == saved:
        return
    if module.class_names is not None and module.trained_classes is None:  # else match_classes compares them
        log.warning("the checkpoint's classes are %s, the data's %s: using the checkpoint's", saved, module.class_names)
    module.class_names, module.names_given = saved, True
    module.hparams["class_names"] = saved
