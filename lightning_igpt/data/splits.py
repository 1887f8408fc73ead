"""Which rows train, validate and test: named splits, slices of them, and a seeded hold-out where none validates."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import NamedTuple, TypeAlias

import datasets
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor

from lightning_igpt.data.columns import VARIANTS_COLUMN
from lightning_igpt.data.sources import Source
from lightning_igpt.files import counted, shown

_NAMES = {"train": ("train",), "val": ("validation", "valid", "val", "dev"), "test": ("test",)}
_PLAIN = re.compile(r"[^\[\]+]+")  # a split's name without slice or sum
_Range: TypeAlias = tuple[str, int, int]  # split, first row, row after the last


@dataclass(frozen=True)
class Part:
    """Rows of one split."""

    source: str
    split: str
    dataset: datasets.Dataset
    rows: NDArray[np.int64] | None = None  # those of this part, ascending; None means all
    remote: bool = False  # whether rows may name images by their addresses

    def __len__(self) -> int:
        return len(self.dataset) if self.rows is None else len(self.rows)

    def rows_of(self, places: Sequence[int]) -> list[int]:
        """Rows of the split for places in this part."""
        return list(places) if self.rows is None else self.rows[list(places)].tolist()

    def describe(self, row: int, path: str | None = None) -> str:
        """Where a row of the dataset comes from, for messages."""
        return f"{self.source}, split {self.split!r}, row {row}" + (f" ({shown(path)})" if path else "")

    def labels(self, source: Source) -> Tensor:
        """Class numbers, int64 (len(self),); errors as ``Source.labels``."""
        labels = source.labels(self.split)
        return labels if self.rows is None else labels[self.rows]


class Division(NamedTuple):
    """The split of each role (train, and val and test where there are any), by name, in a source that has them."""

    source: Source
    splits: dict[str, str]


def divide(
    source: Source, *, train_split: str | None = None, val_split: str | None = None, test_split: str | None = None
) -> Division:
    """Choose the split of each role: the named one or slice, or else the first of ``_NAMES`` that there is."""
    wanted = {"train": train_split, "val": val_split, "test": test_split}
    chosen: dict[str, str] = {}
    for role, given in wanted.items():
        if given is not None:
            source = _with_slice(source, given, f"{role}_split")
        name = given or next((name for name in _NAMES[role] if name in source.splits), None)
        if name is None and role == "train":
            listed = ", ".join(source.splits)
            raise ValueError(f"{source.name} has no split named 'train'; set train_split to one of: {listed}")
        shared = 0 if name is None or role == "train" else _shared_rows(source, chosen["train"], name)
        if shared and given is not None:
            text = f"{role}_split {name!r} and train_split {chosen['train']!r} have {shared} rows in common"
            raise ValueError(f"{text}, which would be trained and evaluated on; they must differ")
        if name is not None and not shared:
            chosen[role] = name
            if not source.streaming and not len(source.splits[name]):
                raise ValueError(f"{source.name} has no rows in the split {name!r}")
    others = (split for split in source.splits if not any(split in name for name in chosen.values()))
    if unused := [split for split in others if not split.startswith("test")]:
        cure = f"train_split={chosen['train']}+{unused[0]}"
        rank_zero_info(f"{source.name}: splits not used: {', '.join(unused)}; to train on {unused[0]} too, set {cure}")
    return Division(source, chosen)


def make_parts(division: Division, *, val_fraction: float, seed: int) -> dict[str, Part]:
    """Parts that never share a row with training: ``train`` and, where there are any, ``val`` and ``test``."""
    source = division.source
    splits, remote = division.splits.items(), source.remote
    parts = {role: Part(source.name, split, source.splits[split], remote=remote) for role, split in splits}
    if "val" in parts or val_fraction == 0:
        return parts
    train = parts["train"]
    n, n_val = len(train), max(1, round(len(train) * val_fraction))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed), device="cpu").numpy()
    if VARIANTS_COLUMN in train.dataset.features:
        order, n_val = _keep_together(order, list(train.dataset.with_format(None)[VARIANTS_COLUMN]), n_val)
    if n_val >= n:
        text = f"the split {train.split!r} of {train.source} has {counted(n, 'image')}; holding out {n_val} leaves none"
        raise ValueError(f"{text} to train on. Give more images, or set val_fraction=0 for no validation")
    rank_zero_info(f"no validation split in {train.source}: holding out {n_val} of {n} rows of {train.split!r}")
    held_out = {"train": order[n_val:], "val": order[:n_val]}
    return parts | {role: replace(train, rows=np.sort(rows)) for role, rows in held_out.items()}


def _keep_together(order: NDArray[np.int64], values: list[str], n_val: int) -> tuple[NDArray[np.int64], int]:
    """Rows of which the first are held out, and how many: whole groups of equal values, ``n_val`` rows if they fit."""
    groups = np.unique(values, return_inverse=True)[1]
    sizes, chosen = np.bincount(groups), []
    left = max(n_val, sizes.min())
    for group in order[order < len(sizes)]:  # all groups, and each place in the order is equally likely
        if sizes[group] <= left:
            chosen.append(group)
            left -= sizes[group]
    held_out = np.isin(groups, chosen)
    return np.argsort(~held_out, kind="stable"), int(held_out.sum())


def _with_slice(source: Source, name: str, option: str) -> Source:
    """The source with a split made for ``name`` where that is a slice or a sum."""
    if name in source.splits:
        return source
    if _PLAIN.fullmatch(name):
        raise ValueError(f"{option} is {name!r}, but {source.name} has the splits {', '.join(source.splits)}")
    if source.streaming:
        raise ValueError(f"{option} is {name!r}; a stream has no slices: name a whole split, or use streaming=False")
    try:
        ranges = _ranges(source, name)
        pieces = [source.splits[base].select(range(start, stop)) for base, start, stop in ranges]
        rows = pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)
    except Exception as error:  # of many classes: syntax, unknown splits, rows that are not there, other columns
        text = f"{option} is {name!r}, which is no slice of {source.name} ({', '.join(source.splits)}): {error}"
        raise ValueError(f"{text}. Write for instance train[:10%], train[100:], or train+test") from error
    if twice := sum(_overlap(a, b) for a, b in combinations(ranges, 2)):
        text = f"{option} is {name!r}, which takes {twice} rows of {source.name} twice"
        raise ValueError(f"{text}; a hold-out could then validate on images that are trained on. Name every row once")
    return replace(source, splits={**source.splits, name: rows})


def _ranges(source: Source, name: str) -> list[_Range]:
    """The rows that a name means."""
    lengths = {split: len(rows) for split, rows in source.splits.items() if _PLAIN.fullmatch(split)}
    if name in lengths:
        return [(name, 0, lengths[name])]
    absolute = datasets.ReadInstruction.from_spec(name).to_absolute(lengths)
    return [(piece.splitname, piece.from_, piece.to) for piece in absolute]


def _shared_rows(source: Source, train: str, name: str) -> int:
    if source.streaming:
        return int(train == name)
    return sum(_overlap(a, b) for a, b in product(_ranges(source, train), _ranges(source, name)))


def _overlap(a: _Range, b: _Range) -> int:
    return max(0, min(a[2], b[2]) - max(a[1], b[1])) if a[0] == b[0] else 0
