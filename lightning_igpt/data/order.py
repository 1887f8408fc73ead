"""Which image is read when: an endless training order that can be resumed anywhere, and an order for evaluation.

Both are samplers for ``DataLoader(batch_size=None)``: what they yield is one batch, a list of (row, sample) pairs.
They subclass torch's ``DistributedSampler`` because Lightning leaves only that class alone: any other sampler it
wraps a second time under several processes, unless the user passes ``use_distributed_sampler=False``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TypeAlias

import torch
from torch.utils.data import DistributedSampler

Draw: TypeAlias = tuple[int, int]  # (row of the data, number of the draw)


class EndlessOrder(DistributedSampler[list[Draw]]):
    """Batch k is a pure function of (seed, k), for k = 0, 1, 2, ... without end.

    Every pass over the data is a new permutation; the rows that do not fill a global batch wait for another pass.
    The order is made of global batches that are then shared among the ranks, so it is the same for any number of
    devices, and one number, the count of batches done, is its whole state.

    Args:
        n_images: Number of rows.
        global_batch: Rows per batch over all ranks.
        length: Batches in one iteration, which is what ``len`` says.
        seed: Decides the order.
        rank: This process.
        world_size: Number of processes.
        batches_done: Asked whenever an iteration begins; the iteration starts at that batch and offers ``length``
            batches. The loop that reads them stops earlier when it resumes in the middle.

    Raises:
        ValueError: There are fewer rows than one global batch, or ``world_size`` does not divide ``global_batch``.
    """

    def __init__(
        self,
        n_images: int,
        *,
        global_batch: int,
        length: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batches_done: Callable[[], int] = lambda: 0,
    ) -> None:
        if global_batch % world_size:
            raise ValueError(f"a global batch of {global_batch} images cannot be shared by {world_size} devices")
        if n_images < global_batch:
            raise ValueError(
                f"there are {n_images} training images, but one step takes {global_batch} "
                f"({global_batch // world_size} on each of {world_size} devices); set batch_size to at most "
                f"{n_images // world_size}"
            )
        super().__init__(range(n_images), num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.n_images = n_images
        self.global_batch = global_batch
        self.length = length
        self.batches_done = batches_done
        self._pass, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    @property
    def batches_per_epoch(self) -> int:
        """Global batches in one pass over the data."""
        return self.n_images // self.global_batch

    @property
    def fingerprint(self) -> dict[str, int]:
        """What must not change when a run resumes."""
        return {"seed": self.seed, "n_images": self.n_images, "global_batch": self.global_batch}

    def batch(self, number: int) -> list[Draw]:
        """This rank's share of global batch ``number``.

        Returns:
            (row, sample) pairs; ``sample = pass * n_images + place in the permutation`` is unique to the draw.
        """
        number_of_pass, within = divmod(number, self.batches_per_epoch)
        if number_of_pass != self._pass:
            generator = torch.Generator().manual_seed(self.seed + number_of_pass)
            self._pass, self._permutation = number_of_pass, torch.randperm(self.n_images, generator=generator)
        share = self.global_batch // self.num_replicas
        start = within * self.global_batch + self.rank * share
        rows = self._permutation[start : start + share].tolist()
        return [(row, number_of_pass * self.n_images + start + i) for i, row in enumerate(rows)]

    def __iter__(self) -> Iterator[list[Draw]]:
        start = self.batches_done()
        return map(self.batch, range(start, start + self.length))

    def __len__(self) -> int:
        return self.length


class EvalOrder(DistributedSampler[list[Draw]]):
    """Every row exactly once, in order, never padded with repeats.

    Each rank reads a contiguous share in batches of nearly equal size. All ranks have the same number of batches,
    so that collective calls inside a step cannot hang.

    Args:
        n_images: Number of rows.
        batch_size: Largest number of rows per batch and rank.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: There are fewer rows than processes.
    """

    def __init__(self, n_images: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if n_images < world_size:
            raise ValueError(f"{n_images} images cannot be shared by {world_size} devices; use fewer devices")
        super().__init__(range(n_images), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.start, self.stop = rank * n_images // world_size, (rank + 1) * n_images // world_size
        smallest, largest = n_images // world_size, -(-n_images // world_size)
        self.n_batches = min(-(-largest // batch_size), smallest)

    def __iter__(self) -> Iterator[list[Draw]]:
        rows = self.stop - self.start
        edges = [self.start + i * rows // self.n_batches for i in range(self.n_batches + 1)]
        for first, last in pairwise(edges):
            yield [(row, row) for row in range(first, last)]

    def __len__(self) -> int:
        return self.n_batches
