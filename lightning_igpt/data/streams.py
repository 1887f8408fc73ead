"""Images from streams: shared among readers by shards, shuffled in blocks, and resumed without loss or repetition.

Each worker of each device is a reader with shards of its own, shuffled anew in every pass. It reads its rows in
blocks of ``shuffle_buffer``, each in a random order that is a function of the seed, and so its place is the state of
the stream at the beginning of a block and a number. A resumed reader reads that block again and goes on within it.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
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

_EMPTY_PASSES = 100  # a reader may get shards without rows in some passes, but hardly in so many on end


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
        self.part, self.index, self.count, self.cursor = part, index, count, cursor
        # The generator must not know this object: in a cycle it would live on until a garbage collection, in any
        # thread, but a mix cannot be closed in a thread in which it reads ahead: that one would wait for itself.
        self._rows = _Share(part, index, count, seed, block).rows(cursor)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        self.cursor, row = next(self._rows)
        return row

    def sample(self) -> int:
        """A number for the row given last that no other row of any reader has in this run."""
        return (self.cursor.n_rows - 1) * self.count + self.index


@dataclass(frozen=True)
class _Share:
    """What a reader reads, as ``StreamReader`` documents it."""

    part: StreamPart
    index: int
    count: int
    seed: int
    block: int

    def rows(self, cursor: Cursor) -> Iterator[tuple[Cursor, dict[str, Any]]]:
        """The rows from a place on, each with the place after it."""
        n_empty = 0
        while n_empty < _EMPTY_PASSES:
            before = cursor.n_rows
            cursor = yield from self._pass(cursor)
            n_empty = n_empty + 1 if cursor.n_rows == before else 0
            cursor = Cursor(cursor.number_of_pass + 1, n_rows=cursor.n_rows)
        raise ValueError(
            f"{self.part.source}, split {self.part.split!r}, gave no rows to reader {self.index} of {self.count} in "
            f"{_EMPTY_PASSES} passes; it is empty, or all of it is held out (val_fraction)"
        )

    def _pass(self, cursor: Cursor) -> Generator[tuple[Cursor, dict[str, Any]], None, Cursor]:
        stream = self._stream(cursor)
        for block in stream.iter(self.block):
            n_rows = len(block[self.part.image_column])
            for place in self._order(n_rows, cursor)[cursor.offset :]:
                row = self.part.row(block, place)
                cursor = replace(cursor, offset=cursor.offset + 1, n_rows=cursor.n_rows + (row is not None))
                if row is not None:
                    yield cursor, row
            state = json.dumps(stream.state_dict())
            cursor = replace(cursor, block=cursor.block + 1, state=state, offset=0)
        return cursor

    def _stream(self, cursor: Cursor) -> datasets.IterableDataset:
        strategy = "shards" if (self.part.stream.num_shards or 1) >= self.count else "auto"
        stream = split_dataset_by_node(self.part.stream, rank=self.index, world_size=self.count, strategy=strategy)
        # Any number but 0 shuffles the shards, the same way for all readers.
        stream.set_epoch(1 + self.seed * 1_000_003 + cursor.number_of_pass)
        if cursor.state is not None:
            stream.load_state_dict(json.loads(cursor.state))
        return stream

    def _order(self, n_rows: int, cursor: Cursor) -> list[int]:
        key = [self.seed, cursor.number_of_pass, self.index, cursor.block]
        order: list[int] = np.random.default_rng(key).permutation(n_rows).tolist()
        return order


class StreamBatches(Dataset[dict[str, Any]]):
    """Batches of a stream, to be asked for by number, as ``PlacedOrder`` does.

    A map-style data set, because torch then hands out the numbers in turn: batch k comes from reader k % workers, also
    after a resumption, and Lightning knows the length. Which worker process is which reader may differ from one
    iteration to the next, therefore the order says with the first batch of each where the reader stands.

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
    ) -> None:
        self.part, self.resize, self.batch_size, self.augment, self.policy = part, resize, batch_size, augment, policy
        self.num_readers = max(1, num_workers)
        self.seed, self.block = seed, block
        self.first, self.count = rank * self.num_readers, world_size * self.num_readers
        self._reader: StreamReader | None = None  # one in each worker process

    def __getitem__(self, draw: tuple[int, dict[str, Any] | None]) -> dict[str, Any]:
        """A batch of this process by its number, as ``ImageBatches`` gives them.

        Args:
            draw: The number, and the cursor of its reader before it; None where the reader stands there.

        Raises:
            BadImageError, ValueError: As ``StreamPart`` does.
            TypeError: The sampler is not one of this package's.
        """
        if isinstance(draw, int):
            raise TypeError(
                "a stream is read by its own order; overfit_batches and other samplers do not work with it. To "
                "overfit, give a small source, or stream.take(...)"
            )
        number, cursor = draw
        reader = self._reader_at(self.first + number % self.num_readers, cursor)
        batch = _collect(self.part, self.resize, reader, self.batch_size, self.augment, self.policy)
        batch[PLACE] = (number, asdict(reader.cursor))
        return batch

    def _reader_at(self, index: int, cursor: dict[str, Any] | None) -> StreamReader:
        reader = self._reader
        if cursor is None:
            assert reader is not None and reader.index == index
        elif reader is None or reader.index != index or asdict(reader.cursor) != cursor:
            # Another worker was this reader, or this one had read ahead of where the loop stopped.
            self._reader = reader = StreamReader(
                self.part, index=index, count=self.count, seed=self.seed, block=self.block, cursor=Cursor(**cursor)
            )
        return reader


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
        self._rows = part.rows()

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
            _check_bad(bad, len(grids), size, policy)
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


def _check_bad(bad: list[BadImage], n_good: int, size: int, policy: BadImagePolicy) -> None:
    last = f"{bad[-1].place}: {bad[-1].reason}"
    if policy.action == "error":
        raise BadImageError(f"{last}. Repair or remove it; on_bad_image=skip leaves such images out")
    if len(bad) > size + MAX_STAND_INS:
        raise BadImageError(
            f"{len(bad)} of {len(bad) + n_good} images on end cannot be read, which are too many to go on; the last is "
            f"{last}"
        )
