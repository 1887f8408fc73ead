"""How far the readers of a stream have come, for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch.distributed
from lightning.pytorch.utilities import rank_zero_warn

from lightning_igpt.data.order import StreamOrder
from lightning_igpt.data.streams import Cursor

_KEPT = 64  # batches of each reader; the loop asks for those done, and has taken few more


class StreamProgress:
    """Where each reader of this process stood after each recent batch.

    Args:
        cursors: Where the readers begin.
    """

    def __init__(self, cursors: Sequence[Cursor]) -> None:
        self.start = [asdict(cursor) for cursor in cursors]
        self._after: dict[int, dict[str, Any]] = {}

    def note(self, number: int, cursor: dict[str, Any]) -> None:
        """Batch ``number`` was read, and left its reader at ``cursor``."""
        self._after[number] = cursor
        self._after.pop(number - _KEPT * len(self.start), None)

    def places(self, batches_done: int) -> list[dict[str, Any]]:
        """Where each reader of this process stands after its first ``batches_done`` batches."""
        n_readers = len(self.start)
        lasts = [batches_done - 1 - (batches_done - 1 - reader) % n_readers for reader in range(n_readers)]
        return [self._after.get(last, start) for last, start in zip(lasts, self.start, strict=True)]

    def state(self, batches_done: int) -> list[list[dict[str, Any]]]:
        """The places of all processes; plain values.

        Under several processes all must call it together: the checkpoint is one file.
        """
        own = self.places(batches_done)
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return [own]
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, own)
        return everyone


class PlacedOrder(StreamOrder):
    """Numbers of batches, the first of each reader with the place where it begins.

    Args:
        progress: Knows the places.
        **common: The options of ``StreamOrder``.
    """

    def __init__(self, progress: StreamProgress, **common: Any) -> None:
        super().__init__(**common)
        self.progress = progress

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any] | None]]:  # type: ignore[override]
        places = self.progress.places(self.batches_done())
        begun: set[int] = set()
        for number in super().__iter__():
            reader = number % len(places)
            yield number, None if reader in begun else places[reader]
            begun.add(reader)


def resume(state: list[list[dict[str, Any]]] | None, *, rank: int, world_size: int, n_readers: int) -> list[Cursor]:
    """Where the readers of this process begin, from what a checkpoint says.

    With another number of readers the places cannot be handed over; then the next pass begins, and a warning says so.
    """
    if not state:
        return [Cursor()] * n_readers
    before = [len(readers) for readers in state]
    if before == [n_readers] * world_size:
        return [Cursor(**cursor) for cursor in state[rank]]
    cursors = [Cursor(**cursor) for readers in state for cursor in readers]
    n_passes = max(cursor.number_of_pass for cursor in cursors) + 1
    rank_zero_warn(
        f"the checkpoint was made by {len(before)} processes with {before[0]} stream readers each, this run has "
        f"{world_size} with {n_readers}: the stream begins its next pass (number {n_passes}). To go on exactly where "
        "it stopped, use as many devices and num_workers as before"
    )
    draws = max(cursor.n_rows for cursor in cursors) * len(cursors)
    return [Cursor(n_passes, n_rows=-(-draws // (world_size * n_readers)))] * n_readers
