"""Which rows train, validate and test, with a seeded hold-out where a source has no validation split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lightning_igpt.data.sources import Source

_NAMES = {"train": ("train",), "val": ("validation", "valid", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Part:
    """Rows of one split.

    Args:
        source: Name of the source, for messages.
        split: Name of the split.
        dataset: The whole split.
        rows: int64, the rows that belong to this part, ascending; None means all.
    """

    source: str
    split: str
    dataset: datasets.Dataset
    rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.dataset) if self.rows is None else len(self.rows)

    def rows_of(self, places: Sequence[int]) -> list[int]:
        """Rows of the split for places in this part."""
        return list(places) if self.rows is None else self.rows[list(places)].tolist()


def split_source(
    source: Source,
    *,
    val_fraction: float,
    seed: int,
    train_split: str | None = None,
    val_split: str | None = None,
    test_split: str | None = None,
) -> dict[str, Part]:
    """Divide a source into parts that never share a row with training.

    Args:
        source: The opened source.
        val_fraction: Share of the training split held out where there is no validation split, in [0, 1); 0 means
            no validation.
        seed: Decides which rows are held out, together with the number of rows and nothing else.
        train_split: Split to train on; default: ``train``.
        val_split: Split to validate on; default: ``validation``, ``valid``, ``val`` or ``dev``.
        test_split: Split to test on; default: ``test``.

    Returns:
        ``train`` and, where there are any, ``val`` and ``test``.

    Raises:
        ValueError: A split does not exist or is empty, would be trained and evaluated on, or is too small to hold out.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction is {val_fraction}; it must be at least 0 and below 1")
    train = _choose(source, "train", train_split)
    if train is None:
        raise ValueError(
            f"{source.name} has no split named 'train'; set train_split to one of: {', '.join(source.splits)}"
        )
    parts = {"train": Part(source.name, train, source.splits[train])}
    for role, wanted in (("val", val_split), ("test", test_split)):
        split = _choose(source, role, wanted)
        if split == train and wanted is not None:
            raise ValueError(f"{role}_split is {split!r}, which is the training split; they must differ")
        if split is not None and split != train:
            parts[role] = Part(source.name, split, source.splits[split])
    if empty := [part.split for part in parts.values() if not len(part)]:
        raise ValueError(f"{source.name} has no rows in the split {empty[0]!r}")
    if "val" not in parts and val_fraction > 0:
        parts.update(_hold_out(parts["train"], val_fraction, seed))
    return parts


def _choose(source: Source, role: str, wanted: str | None) -> str | None:
    if wanted is not None:
        if wanted not in source.splits:
            raise ValueError(f"{role}_split is {wanted!r}, but {source.name} has the splits {', '.join(source.splits)}")
        return wanted
    return next((name for name in _NAMES[role] if name in source.splits), None)


def _hold_out(train: Part, fraction: float, seed: int) -> dict[str, Part]:
    n = len(train)
    n_val = max(1, round(n * fraction))
    if n_val >= n:
        raise ValueError(
            f"the split {train.split!r} of {train.source} has {n} rows; holding out {n_val} leaves nothing to train on"
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    rank_zero_info(f"no validation split in {train.source}: holding out {n_val} of {n} rows of {train.split!r}")
    return {
        "train": Part(train.source, train.split, train.dataset, np.sort(order[n_val:])),
        "val": Part(train.source, train.split, train.dataset, np.sort(order[:n_val])),
    }
