"""Logistic regression on stored features, shared out among the processes of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_igpt.features import choose_c, fit_logistic, usable_grid
from lightning_igpt.modules.probing.feature_store import FeatureStore
from lightning_igpt.progress import track

log = logging.getLogger(__name__)


class Head(NamedTuple):
    """A fitted linear classifier of raw features."""

    weight: Tensor  # (C, D)
    bias: Tensor  # (C,)
    c: float


@dataclass(frozen=True)
class Logistic:
    """How to fit one classifier: the settings of ``ProbeModule``."""

    grid: Sequence[float]  # values of c; one is no choice
    standardize: bool
    max_iter: int
    seed: int

    def __call__(self, features: Tensor, labels: Tensor, num_classes: int) -> Head:
        """Choose c and fit to float (N, D) and int64 (N,)."""
        options: dict[str, Any] = {"standardize": self.standardize, "max_iter": self.max_iter}
        c = choose_c(features, labels, num_classes, grid=self.grid, seed=self.seed, **options)
        weight, bias = fit_logistic(features, labels, num_classes, c=c, **options)
        return Head(weight, bias, c)


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
    """Fit one classifier to each group of columns, on all processes' rows, each row once.

    The processes take turns in fitting, so that several work at a time; every one gets all classifiers. Rows are put
    into the order of their numbers, so that what is held out does not depend on the number of processes.

    Args:
        store: This process's rows.
        groups: Column numbers; the columns of a group are concatenated.
        how: Fits one.
        num_classes: C.
        device: Where to fit.
        rank: This process.
        world_size: Number of processes; above 1 this is a collective call.
        n_rows: Rows whose number is not below it are padding and left out.

    Raises:
        ValueError: All rows have the same label.
    """
    labels, order = _rows(store, device, world_size, n_rows)
    how = replace(how, grid=usable_grid(how.grid, len(labels)))  # here, so that a warning comes once
    mine: dict[int, Head] = {}
    for first in track(range(0, len(groups), world_size), "fitting classifiers"):
        features = torch.empty(0)
        for owner, group in enumerate(groups[first : first + world_size]):
            parts = [_gather(store.column(column).to(device), world_size) for column in group]
            if owner == rank:
                features = torch.cat(parts, 1) if len(parts) > 1 else parts[0]  # (N, columns * D)
        if first + rank < len(groups):
            mine[first + rank] = how(features if order is None else features[order], labels, num_classes)
            log.debug("columns %s: classifier fitted on %d rows", list(groups[first + rank]), len(labels))
    heads = _share(mine, world_size)
    return [heads[number] for number in range(len(groups))]


def rows_once(numbers: Tensor, n_rows: int | None = None) -> Tensor:
    """Where each of int64 ``numbers`` (N,) comes first, by ascending number, without those from ``n_rows`` on."""
    order = numbers.argsort(stable=True)
    ascending = numbers[order]
    keep = torch.ones_like(ascending, dtype=torch.bool)
    keep[1:] = ascending[1:] != ascending[:-1]
    return order[keep if n_rows is None else keep & (ascending < n_rows)]


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


def _share(heads: dict[int, Head], world_size: int) -> dict[int, Head]:
    """Every process's classifiers together, on the CPU where they come from several."""
    if world_size == 1:
        return heads
    gathered: list[Any] = [None] * world_size
    mine = {number: Head(head.weight.cpu(), head.bias.cpu(), head.c) for number, head in heads.items()}
    torch.distributed.all_gather_object(gathered, mine)
    return {number: head for part in gathered for number, head in part.items()}
