"""Streams: rows that arrive in their own order, shuffled, shared and resumed as ``datasets`` does it.

A resumed reader continues at the shard and row that ``datasets`` reports, and skips the rows that its buffer held.
"""

import itertools
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from lightning_igpt.data.columns import HIDDEN, VARIANTS_COLUMN, mode_of
from lightning_igpt.data.folders import DamagedDataError
from lightning_igpt.data.order import Draw
from lightning_igpt.data.readers import MAX_STAND_INS, BadImage, OnBadImage, as_grids, check_draws, make_batch
from lightning_igpt.data.sources import Source
from lightning_igpt.data.splits import Part
from lightning_igpt.data.tokens import CHECKSUM_COLUMN
from lightning_igpt.data.transforms import Augment, Resize, square
from lightning_igpt.files import counted, shown
from lightning_igpt.images import BadImageError, decode, fetch
from lightning_igpt.palette import PALETTE_COLUMN

STATE = "stream_state"  # key of a batch: (worker, where it is in its stream); the loader removes it
_EMPTY_PASSES = 100  # a reader may get shards without rows in some passes, but hardly in so many in succession


def belongs(row: Mapping[str, Any], column: str, fraction: float, held_out: bool, remote: bool = False) -> bool:
    """For ``filter``: divides by a hash of content or ``variants_of``, so that copies of an image stay together."""
    value = row[column]
    with suppress(BadImageError):  # reported when it is read
        value = fetch(value, remote=remote)
    if isinstance(value, Mapping):
        content = value.get("bytes") or str(value.get("path") or "").encode()
    else:
        content = b"" if value is None else np.asarray(value).tobytes()
    content = str(row[VARIANTS_COLUMN]).encode() if VARIANTS_COLUMN in row else content
    return (zlib.crc32(content) < fraction * 2**32) == held_out


@dataclass(frozen=True)
class StreamPart:
    """Rows of one split of a stream, and how they become batches."""

    source: Source
    split: str
    rows: datasets.IterableDataset
    own_names: Sequence[str] | None  # the classes as this split numbers them
    need_labels: bool  # a label that is missing or no class is an error; else it is -1
    resize: Resize
    augment: Augment | None
    on_bad_image: OnBadImage

    def read(self, row: Mapping[str, Any], sample: int) -> NDArray[Any] | BadImage:
        """One row as a grid, uint8 (3, S, S) or int16 (tokens per pixel, S, S), or what is wrong with it."""
        value, resize = row[self.source.image_column], self.resize
        if self.source.tokens is not None:
            mine, mark = self.source.tokens.sha256, row.get(PALETTE_COLUMN)
            if isinstance(mark, str) and mark != mine:
                raise ValueError(f"{self.where} holds tokens of two palettes, {mine[:12]} and {mark[:12]}; use one")
            each = self.source.tokens.tokens_per_pixel
            if len(value) != each * resize.size**2:
                raise ValueError(f"{self.where}, draw {sample}: {len(value)} tokens, not {each} x {resize.size}^2")
            tokens = np.asarray(value, "<i2")
            if row.get(CHECKSUM_COLUMN, checksum := zlib.crc32(tokens.tobytes())) != checksum:
                raise DamagedDataError(f"{self.where}, draw {sample}: tokens and checksum differ; tokenize again")
            grid: NDArray[Any] = as_grids(tokens.astype(np.int16)[None], resize.size)[0]
            return grid
        try:
            mode = mode_of(self.rows, self.source.image_column)
            return square(resize, decode(value, mode=mode, remote=self.source.remote), sample)
        except BadImageError as error:
            # Paths within archives may be alike, and the same image must be recognized in another pass.
            path, content = (value.get("path"), value.get("bytes")) if isinstance(value, Mapping) else (None, b"")
            crc = f"CRC-32 {zlib.crc32(content):08x}" if content else f"draw {sample}"
            names = ([shown(path)] if path else []) + ([crc] if content or not path else [])
            return BadImage(f"{self.where}, {', '.join(names)}", str(error))

    def label(self, row: Mapping[str, Any]) -> int:
        """The class number of a row among the training split's classes; -1 where there is none and none is needed."""
        label, classes = row.get(str(self.source.label_column)), self.source.class_names or []
        names = classes if self.own_names is None else self.own_names
        name = names[label] if isinstance(label, int) and 0 <= label < len(names) else None
        if name in classes:
            return classes.index(name)
        if not self.need_labels:
            return -1
        if name is not None:
            raise ValueError(f"{self.where} has the class {name!r}, which the training split does not have")
        hint = HIDDEN if label == -1 else ""
        raise ValueError(f"{self.where}: a label is {label!r}, outside 0..{len(names) - 1}{hint}")

    def labels(self, rows: datasets.Dataset) -> Tensor | None:
        if self.source.label_column is None:
            return None
        return torch.tensor([self.label(row) for row in rows.select_columns([self.source.label_column])], device="cpu")

    @property
    def where(self) -> str:
        """Source and split, for messages."""
        return f"{self.source.name}, split {self.split!r}"

    def batch(self, rows: Iterator[Mapping[str, Any]], samples: Sequence[int]) -> dict[str, Any]:
        """The next ``len(samples)`` rows that can be read; fewer where the rows end."""
        grids: list[NDArray[Any]] = []
        labels: list[int] = []
        bad: list[BadImage] = []
        while len(grids) < len(samples) and (row := next(rows, None)) is not None:
            grid = self.read(row, samples[len(grids)])
            if not isinstance(grid, BadImage):
                grids.append(grid)
                labels.append(self.label(row) if self.source.label_column else -1)
                continue
            bad.append(grid)
            if self.on_bad_image == "error":
                raise grid.error()
            if len(bad) > len(samples) + MAX_STAND_INS:
                share = f"{len(bad)} of {len(bad) + len(grids)} images in succession"
                raise BadImageError(f"{share} cannot be read; the last is {grid.place}: {grid.reason}")
        if not grids:
            return {}
        classes = torch.tensor(labels, device="cpu") if self.source.label_column else None
        return make_batch(np.stack(grids), samples[: len(grids)], classes, bad, self.augment)


class StreamBatches(Dataset[dict[str, Any]]):
    """Endless batches of a stream, a map-style dataset, so that torch knows a length and deals draws out to workers."""

    def __init__(
        self, part: StreamPart, rank: int, world_size: int, seed: int, buffer: int, states: Sequence[str]
    ) -> None:
        self.part, self.rank, self.world_size, self.seed, self.buffer = part, rank, world_size, seed, buffer
        self.states = states  # where each worker of this process begins, as STATE reports it
        self._rows: Iterator[Mapping[str, Any]] | None = None  # of each worker process its own
        self._place: dict[str, Any] = {}  # the pass of this worker, and the stream of that pass

    def __getitems__(self, draws: list[Draw]) -> dict[str, Any]:
        """The next batch of this worker, with its ``STATE``."""
        check_draws(draws)
        info = get_worker_info()
        worker, n_workers = (0, 1) if info is None else (info.id, info.num_workers)
        if self._rows is None:
            index, count = self.rank * n_workers + worker, self.world_size * n_workers
            seed, begin = self.seed * 1_000_003, json.loads(self.states[worker])
            self._rows = _endless(self.part, index, count, seed, self.buffer, begin, self._place)
        batch = self.part.batch(self._rows, [sample for _, sample in draws])
        state = {"pass": self._place["pass"], "stream": self._place["stream"].state_dict()}
        batch[STATE] = (worker, json.dumps(state))
        return batch


def _endless(
    part: StreamPart, index: int, count: int, seed: int, buffer: int, begin: dict[str, Any], place: dict[str, Any]
) -> Iterator[Mapping[str, Any]]:
    """The rows of one reader of ``count``, pass after pass; keeps ``place`` up to date.

    No method, since a generator that is part of a cycle is closed by the garbage collector, in any thread.
    """
    empty, saved = 0, begin["stream"]
    for number in itertools.count(begin["pass"]):
        # Not set_epoch: workers share its number, and each is in a pass of its own. One shard at a time: datasets 5.2
        # takes 5 seconds to close a stream that reads ahead in several.
        stream = part.rows.shuffle(seed + number, buffer_size=buffer, max_buffer_input_shards=1)
        strategy = "shards" if (stream.num_shards or 1) >= count else "auto"
        stream = split_dataset_by_node(stream, rank=index, world_size=count, strategy=strategy)
        if saved is not None:
            stream.load_state_dict(saved)
            saved = None
        place.update({"pass": number, "stream": stream})
        # Not iter(stream), which divides the rows among workers once more and then cannot load a state.
        n_rows = 0
        for row in stream.iter(1):
            n_rows += 1
            yield {name: value[0] for name, value in row.items()}
        empty = empty + 1 if n_rows == 0 else 0
        if empty == _EMPTY_PASSES:
            text = f"{part.where} gave no rows to reader {index} of {count} in {empty} passes"
            raise ValueError(f"{text}; it is empty, or all of it is held out (val_fraction)")


class StreamOnce(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Every row of a stream once, in its own order, for one process without workers or with one."""

    def __init__(self, part: StreamPart, batch_size: int) -> None:
        self.part, self.batch_size = part, batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = iter(self.part.rows)
        for start in itertools.count(0, self.batch_size):
            batch = self.part.batch(rows, range(start, start + self.batch_size))
            if not batch:
                return
            yield batch


def open_part(
    source: Source, split: str, need_labels: bool, with_labels: bool, fraction: float, *, held_out: bool
) -> tuple[Source, str, datasets.IterableDataset, Sequence[str] | None]:
    """The rows of a split, or those of a hold-out of it, or the others, without unused columns."""
    rows, own_names = source.splits[split], None
    assert isinstance(rows, datasets.IterableDataset)
    has_labels = rows.features is None or source.label_column in rows.features
    if need_labels and not has_labels:
        raise ValueError(f"{source.name}, split {split!r}, has no labels: no column {source.label_column!r}")
    if source.class_names is None or not has_labels or not with_labels:
        source = replace(source, label_column=None)
    if rows.features is not None:
        wanted = [source.image_column, source.label_column, PALETTE_COLUMN, CHECKSUM_COLUMN, VARIANTS_COLUMN]
        own_names = getattr(rows.features.get(source.label_column), "names", None)
        rows = rows.select_columns([name for name in wanted if name in rows.features])
    if fraction > 0:
        options = {"column": source.image_column, "fraction": fraction, "held_out": held_out, "remote": source.remote}
        rows = rows.filter(belongs, fn_kwargs=options)
    return source, split, rows, own_names


def n_readers(part: StreamPart, num_workers: int, world_size: int) -> int:
    """Workers that have shards of their own on every device; 0 reads in the main process."""
    shards = part.rows.num_shards or 1
    used = min(num_workers, max(1, shards // world_size))
    if used < num_workers:
        text = f"{used} of {num_workers} workers can read {part.where}: its shards are {shards}, devices {world_size}"
        rank_zero_info(f"{text}. More shards: several files, stream.reshard(), or to_iterable_dataset(num_shards=...)")
    return used


def begin(saved: Sequence[Sequence[str]], rank: int, world_size: int, n_readers: int) -> Sequence[str]:
    """Where the workers of this process begin: at the first row, or where a checkpoint says.

    With another number of readers the places cannot be handed over; then the next pass begins, and a warning says so.
    """
    before, number = [len(states) for states in saved], 0
    if before == [n_readers] * world_size:
        return saved[rank]
    if saved:
        number = 1 + max(json.loads(state)["pass"] for states in saved for state in states)
        rank_zero_warn(
            f"the checkpoint comes from {counted(len(before), 'process')} of {before[0]} stream readers, this run has "
            f"{world_size} with {n_readers}: the stream begins its next pass (number {number}). Use as many as before"
        )
    return [json.dumps({"pass": number, "stream": None})] * n_readers


def keep(part: StreamPart, n_images: int) -> Part:
    """The first rows of a part, undecoded, as a dataset in memory."""
    kept = list(part.rows.take(n_images))
    if not kept:
        cure = "set val_split or another val_fraction, or val_fraction=0 for no validation"
        raise ValueError(f"{part.where} has no rows to validate on; {cure}")
    column = part.source.image_column
    if part.source.tokens is None:
        for row in kept:
            with suppress(BadImageError):  # reported when it is read
                row[column] = fetch(row[column], remote=part.source.remote)
    rank_zero_info(f"validating on the first {counted(len(kept), 'image')} of {part.where} (val_images)")
    dataset = datasets.Dataset.from_list(kept, features=part.rows.features)
    if part.source.tokens is None:
        dataset = dataset.cast_column(column, datasets.Image(mode=mode_of(part.rows, column), decode=False))
    return Part(part.source.name, f"{part.split} (kept in memory)", dataset)
