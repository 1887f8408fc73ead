"""What a folder of shards holds, read by one process without torch.distributed: a few tensors, or all of it, joined.

Lightning's FSDPStrategy and ModelParallelStrategy write such folders. In a shard every tensor, or part of one, is what
``torch.save`` wrote, with checksums of its own.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_igpt.checkpointing.complete import check_complete
from lightning_igpt.checkpointing.index import INDEX, Entry
from lightning_igpt.checkpointing.intact import check_archive, check_storages
from lightning_igpt.checkpointing.shard_safety import EXTRA, check_shards, is_deepspeed
from lightning_igpt.weights.safety import read_torch

KEYS = ("state_dict", "model")  # under which ModelParallelStrategy and FSDPStrategy put the module's tensors
OPTIMIZER = re.compile(r"optimizer_(\d{1,4})\.")


class ShardsFile:
    """The module's tensors in a folder of shards, in the form of a TensorFile.

    Args:
        folder: A whole sharded checkpoint.

    Attributes:
        key: What FSDPStrategy or ModelParallelStrategy calls the module's part of the checkpoint.
        n_optimizers: How many optimisers' states are there.

    Raises:
        ValueError: It is not whole, is damaged, or could run code.
    """

    def __init__(self, folder: Path) -> None:
        self.where, self._folder = str(folder), folder
        self._entries: dict[str, list[Entry]] = {}
        found = check_shards(folder)
        check_complete(folder)
        for entry in found:
            self._entries.setdefault(entry.name, []).append(entry)
        heads = {name.partition(".")[0] for name in self._entries}
        self.key = next((key for key in KEYS if key in heads), KEYS[0])
        mine = (name for name in self._entries if name.startswith(f"{self.key}."))
        self.names = {name.partition(".")[2] for name in mine if self._entries[name][0].is_tensor}
        self.n_optimizers = len({match[1] for match in map(OPTIMIZER.match, self._entries) if match})

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As TensorFile.read."""
        return {name: self._tensor(self._entries[f"{self.key}.{name}"]) for name in names}

    def optimizer_state(self, number: int) -> dict[str, Any]:
        """The state of an optimiser, by positions as its own ``state_dict`` has it."""
        values: dict[tuple[str | int, ...], Any] = {}
        for name, entries in self._entries.items():
            if not name.startswith(f"optimizer_{number}."):
                continue
            if not entries[0].path:
                raise ValueError(f"{self._folder / INDEX} does not say where in the optimiser's state {name} belongs")
            values[entries[0].path[1:]] = self._tensor(entries) if entries[0].is_tensor else self._value(entries[0])
        return by_position(_nested(values, self.where), self.where)

    def check_intact(self, process: int = 0, processes: int = 1) -> None:
        """Compare what lies in the shards with its checksums: all of it, or the share of one of several processes.

        Raises:
            ValueError: A shard is damaged; the message names it.
        """
        everything = [entry for entries in self._entries.values() for entry in entries]
        for entry in everything[process::processes]:
            self._content(entry)

    def _tensor(self, parts: list[Entry]) -> Tensor:
        first = parts[0]
        _check_cover(parts, self.where)
        whole = torch.empty(first.shape, dtype=first.dtype)
        for part in parts:
            value = self._value(part)
            place = self._folder / part.file
            if not isinstance(value, Tensor) or value.shape != part.size or value.dtype != first.dtype:
                raise ValueError(f"{place} is damaged: {part.name} in it is not what {INDEX} says")
            check_storages([value], None, place)
            target = whole[tuple(slice(start, start + size) for start, size in zip(part.start, part.size, strict=True))]
            target.copy_(value.detach())
        return whole

    def _value(self, entry: Entry) -> Any:
        try:
            return torch.load(io.BytesIO(self._content(entry)), map_location="cpu", weights_only=True)
        except ValueError:
            raise
        except Exception as error:  # damage ends in any kind of error
            raise ValueError(f"{self._folder / entry.file} is damaged: {entry.name} in it cannot be opened") from error

    def _content(self, entry: Entry) -> bytes:
        with (self._folder / entry.file).open("rb") as file:
            file.seek(entry.offset)
            content = file.read(entry.length)
        check_archive(content, f"{self._folder / entry.file}: {entry.name} in it")
        return content


def join_shards(folder: str | Path) -> dict[str, Any]:
    """A checkpoint as a strategy that shards nothing saves it, from one of shards.

    Args:
        folder: A whole sharded checkpoint of FSDPStrategy's or ModelParallelStrategy's.

    Returns:
        Lightning's checkpoint with all tensors on the CPU. It takes as much memory as the folder takes on the disk.

    Raises:
        ValueError: The folder is not whole, is damaged, or could run code.
    """
    shards = ShardsFile(Path(folder))
    checkpoint = read_torch(Path(folder) / EXTRA)
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{Path(folder) / EXTRA} is damaged: it holds a {type(checkpoint).__name__}")
    checkpoint["state_dict"] = shards.read(sorted(shards.names))
    if shards.n_optimizers:
        checkpoint["optimizer_states"] = [shards.optimizer_state(number) for number in range(shards.n_optimizers)]
    return checkpoint


def by_position(state: Any, where: str) -> dict[str, Any]:
    """An optimiser's state by positions: the k-th parameter of its groups, one after the other, is number k.

    Sharded checkpoints key it by the parameters' names, and whole ones of sharded runs by their place in the module,
    which is another one where an optimiser's groups are not in the module's order.

    Raises:
        ValueError: It is no state of an optimiser, or is about parameters that its groups do not name.
    """
    state = state if isinstance(state, Mapping) else {}
    moments, groups = state.get("state", {}), state.get("param_groups")
    if not isinstance(moments, Mapping) or not isinstance(groups, list):
        raise ValueError(f"{where} is damaged: the optimiser's state in it is none")
    listed: list[Any] = [group.get("params") if isinstance(group, Mapping) else None for group in groups]
    if not all(isinstance(names, list) and all(isinstance(name, str | int) for name in names) for names in listed):
        raise ValueError(f"{where} is damaged: the optimiser's groups in it do not say what they train")
    order = {name: number for number, name in enumerate(name for names in listed for name in names)}
    unknown = [str(name) for name in moments if name not in order]
    if unknown or len(order) != sum(map(len, listed)):
        raise ValueError(f"{where} is damaged: the optimiser's groups in it do not fit to its moments {unknown[:3]}")
    numbered = iter(range(len(order)))
    return {
        "state": {order[name]: moments[name] for name in sorted(moments, key=order.__getitem__)},
        "param_groups": [{**group, "params": [next(numbered) for _ in group["params"]]} for group in groups],
    }


def is_shards(path: str | Path) -> bool:
    """Whether a path is a folder of shards, or one of DeepSpeed's, which is refused by who reads it."""
    path = Path(path)
    return path.is_dir() and ((path / INDEX).exists() or is_deepspeed(path))


def _check_cover(parts: list[Entry], where: str) -> None:
    """Raise unless the parts of a tensor make it up, without gaps, once each."""
    first = parts[0]
    if any((part.shape, part.dtype) != (first.shape, first.dtype) for part in parts):
        raise ValueError(f"{where} is damaged: {first.name} in it is of two kinds")
    filled = [part for part in parts if math.prod(part.size)]
    if sum(math.prod(part.size) for part in filled) != math.prod(first.shape):
        raise ValueError(f"{where} is damaged: the parts of {first.name} in it do not make up {first.shape}")
    by_rows = all(part.size[1:] == first.shape[1:] for part in filled)
    filled.sort(key=lambda part: part.start)
    pairs: Iterable[tuple[Entry, Entry]] = pairwise(filled) if by_rows else combinations(filled, 2)
    if any(_overlap(one, other) for one, other in pairs):
        raise ValueError(f"{where} is damaged: parts of {first.name} in it overlap")


def _overlap(one: Entry, other: Entry) -> bool:
    places = zip(one.start, one.size, other.start, other.size, strict=True)
    return all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in places)


def _nested(values: Mapping[tuple[str | int, ...], Any], where: str) -> Any:
    """Mappings and lists from values by the keys that lead to them."""
    below: dict[str | int, dict[tuple[str | int, ...], Any]] = {}
    for path, value in values.items():
        below.setdefault(path[0], {})[path[1:]] = value
    if any(() in inner and len(inner) > 1 for inner in below.values()):
        raise ValueError(f"{where} is damaged: a value of the optimiser's state has others in it")
    made = {key: inner[()] if () in inner else _nested(inner, where) for key, inner in below.items()}
    if not any(isinstance(key, int) for key in made):
        return made
    if set(made) != set(range(len(made))):
        raise ValueError(f"{where} is damaged: a list of the optimiser's state has gaps")
    return [made[number] for number in range(len(made))]
