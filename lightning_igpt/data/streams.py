"""Images from streams: shared among readers by shards, shuffled in blocks, and resumed without loss or repetition.

Each worker of each device is a reader with shards of its own, shuffled anew in every pass. It reads its rows in
blocks of ``shuffle_buffer``, each in a random order that is a function of the seed, and so its place is the state of
the stream at the beginning of a block and a number. A resumed reader reads that block again and goes on within it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from numpy.typing import NDArray
from torch.utils.data import Dataset, IterableDataset

from lightning_igpt.data.bad_images import MAX_STAND_INS, BadImage
from lightning_igpt.data.dataset import Reading, make_batch
from lightning_igpt.data.readers import STOP, BadImagePolicy
from lightning_igpt.data.stream_parts import StreamPart
from lightning_igpt.data.transforms import Augment, Resize
from lightning_igpt.images import BadImageError

PLACE = "place_in_stream"  # key of a batch: (its number, the cursor of its reader after it); loaders take it off


@dataclass(frozen=True)
class Cursor:
    """Where a reader stands; plain values.

    Args:
        number_of_pass: Passes finished.
        block: Blocks of this pass finished.
        state: The stream at the beginning of the block, as JSON; None at the beginning of a pass.
        offset: Rows of the block used.
        n_rows: Rows used since the beginning of the run.
    """

    number_of_pass: int = 0
    block: int = 0
    state: str | None = None
    offset: int = 0
    n_rows: int = 0


class StreamReader:
    """The rows of one reader, pass after pass without end.

    Args:
        part: The rows.
        index: This reader.
        count: All readers.
        seed: Decides the order of shards and rows.
        block: Rows that are shuffled together.
        cursor: Where to begin.
    """

    def __init__(
        self, part: StreamPart, *, index: int, count: int, seed: int, block: int, cursor: Cursor = Cursor()
    ) -> None:
        self.part, self.index, self.count, self.seed, self.block = part, index, count, seed, block
        self.cursor = cursor
        self._rows = self._endless()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        return next(self._rows)

    def sample(self) -> int:
        """A number for the row given last that no other row of any reader has in this run."""
        return (self.cursor.n_rows - 1) * self.count + self.index

    def _endless(self) -> Iterator[dict[str, Any]]:
        while True:
            before = self.cursor.n_rows
            yield from self._pass()
            if self.cursor.n_rows == before and self.cursor.state is None:
                raise ValueError(
                    f"{self.part.source}, split {self.part.split!r}, gave no rows to reader "
                    f"{self.index} of {self.count}"
                )
            self.cursor = Cursor(self.cursor.number_of_pass + 1, n_rows=self.cursor.n_rows)

    def _pass(self) -> Iterator[dict[str, Any]]:
        stream = self._stream()
        for block in stream.iter(self.block):
            n_rows = len(block[self.part.image_column])
            for place in self._order(n_rows)[self.cursor.offset :]:
                self.cursor = replace(self.cursor, offset=self.cursor.offset + 1)
                if self.part.hold_out is None or self.part.hold_out.keeps(block[self.part.image_column][place]):
                    self.cursor = replace(self.cursor, n_rows=self.cursor.n_rows + 1)
                    yield {name: values[place] for name, values in block.items()}
            state = json.dumps(stream.state_dict())
            self.cursor = replace(self.cursor, block=self.cursor.block + 1, state=state, offset=0)

    def _stream(self) -> datasets.IterableDataset:
        strategy = "shards" if (self.part.stream.num_shards or 1) >= self.count else "auto"
        stream = split_dataset_by_node(self.part.stream, rank=self.index, world_size=self.count, strategy=strategy)
        # Any number but 0 shuffles the shards, the same way for all readers.
        stream.set_epoch(1 + self.seed * 1_000_003 + self.cursor.number_of_pass)
        if self.cursor.state is not None:
            stream.load_state_dict(json.loads(self.cursor.state))
        return stream

    def _order(self, n_rows: int) -> list[int]:
        key = [self.seed, self.cursor.number_of_pass, self.index, self.cursor.block]
        order: list[int] = np.random.default_rng(key).permutation(n_rows).tolist()
        return order


class StreamBatches(Dataset[dict[str, Any]]):
    """Batches of a stream, to be asked for by number, each worker's numbers in ascending order.

    A map-style data set, because torch then hands out the numbers in turn: batch k comes from reader k % workers, also
    after a resumption, and Lightning knows the length.

    Args:
        part: The rows.
        resize: Makes an image square.
        batch_size: Rows per batch.
        rank: This process.
        world_size: Number of processes.
        num_workers: Readers of this process.
        seed: Decides the order.
        block: Rows that are shuffled together.
        augment: Changes training images.
        policy: What happens to images that cannot be read.
        cursors: Where each reader of this process begins.
    """

    def __init__(
        self,
        part: StreamPart,
        resize: Resize,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 1,
        seed: int = 0,
        block: int = 1000,
        augment: Augment | None = None,
        policy: BadImagePolicy = STOP,
        cursors: Sequence[Cursor] = (),
    ) -> None:
        self.part, self.resize, self.batch_size, self.augment, self.policy = part, resize, batch_size, augment, policy
        self.num_readers = max(1, num_workers)
        self.seed, self.block = seed, block
        self.first, self.count = rank * self.num_readers, world_size * self.num_readers
        self.cursors = list(cursors) or [Cursor()] * self.num_readers
        self._readers: dict[int, StreamReader] = {}
        self._next: dict[int, int] = {}  # the batch that each reader gives next
        self._history: dict[int, Cursor] = {}  # where readers stood after recent batches

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Batch ``number`` of this process: as ``ImageBatches`` gives them.

        Raises:
            BadImageError, ValueError: As ``StreamPart`` does.
        """
        own = number % self.num_readers
        reader = self._reader_at(own, number)
        batch = _collect(self.part, self.resize, reader, self.batch_size, self.augment, self.policy)
        self._next[own] = number + self.num_readers
        self._remember(number, reader.cursor)
        batch[PLACE] = (number, asdict(reader.cursor))
        return batch

    def _reader_at(self, own: int, number: int) -> StreamReader:
        if own not in self._readers:
            self._readers[own] = self._make_reader(own, self.cursors[own])
        elif self._next[own] != number:  # the loop stopped before batches that were read ahead
            self._readers[own] = self._make_reader(own, self._history.get(number - self.num_readers, self.cursors[own]))
        return self._readers[own]

    def _make_reader(self, own: int, cursor: Cursor) -> StreamReader:
        return StreamReader(
            self.part, index=self.first + own, count=self.count, seed=self.seed, block=self.block, cursor=cursor
        )

    def _remember(self, number: int, cursor: Cursor) -> None:
        self._history[number] = cursor
        self._history.pop(number - 64 * self.num_readers, None)


class StreamOnce(IterableDataset[dict[str, Any]]):
    """Every row of a stream once, in its own order, for one process without workers or with one.

    Args:
        part: The rows.
        resize: Makes an image square.
        batch_size: Rows per batch.
        policy: What happens to images that cannot be read.
    """

    def __init__(self, part: StreamPart, resize: Resize, *, batch_size: int, policy: BadImagePolicy = STOP) -> None:
        self.part, self.resize, self.batch_size, self.policy = part, resize, batch_size, policy

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rows = iter(_Numbered(self.part))
        while True:
            batch = _collect(self.part, self.resize, rows, self.batch_size, None, self.policy)
            if not batch:
                return
            yield batch


class _Numbered:
    """The rows of a part from the first to the last."""

    def __init__(self, part: StreamPart) -> None:
        self._n_rows = 0
        self._rows = (
            {name: values[place] for name, values in block.items()}
            for block in part.stream.iter(100)
            for place, value in enumerate(block[part.image_column])
            if part.hold_out is None or part.hold_out.keeps(value)
        )

    def __iter__(self) -> _Numbered:
        return self

    def __next__(self) -> dict[str, Any]:
        row: dict[str, Any] = next(self._rows)
        self._n_rows += 1
        return row

    def sample(self) -> int:
        return self._n_rows - 1


def _collect(
    part: StreamPart,
    resize: Resize,
    rows: StreamReader | _Numbered,
    size: int,
    augment: Augment | None,
    policy: BadImagePolicy,
) -> dict[str, Any]:
    """A batch of the next ``size`` rows that can be read; of fewer where they end, or empty."""
    grids: list[NDArray[Any]] = []
    samples: list[int] = []
    labels: list[int] = []
    bad: list[BadImage] = []
    for row in rows:
        sample = rows.sample()
        grid = part.read(row, resize, sample)
        if isinstance(grid, BadImage):
            bad.append(grid)
            if policy.action == "error" or len(bad) > size + MAX_STAND_INS:
                cure = "; on_bad_image=skip leaves such images out" if policy.action == "error" else ""
                raise BadImageError(f"{grid.place}: {grid.reason}{cure}")
            continue
        grids.append(grid)
        samples.append(sample)
        if part.label_column is not None:
            labels.append(part.label(row))
        if len(grids) == size:
            break
    if not grids:
        return {}
    reading = Reading(np.stack(grids), [], samples, bad)
    return make_batch(reading, torch.tensor(labels) if part.label_column is not None else None, augment)
