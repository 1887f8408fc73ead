"""Which image is read when: endless training orders that can be resumed anywhere, and an order for evaluation.

All are samplers for ``DataLoader(batch_size=None)``: what they yield is one batch, a list of (row, sample) pairs.
They subclass torch's ``DistributedSampler`` because Lightning leaves only that class alone: any other sampler it
wraps a second time under several processes, unless the user passes ``use_distributed_sampler=False``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DistributedSampler

Draw: TypeAlias = tuple[int, int]  # (row of the data, number of the draw)

MIX_BLOCK = 1000  # draws in which the sources of a mixture keep their shares exactly


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
            shares = f" ({global_batch // world_size} on each of {world_size} devices)" if world_size > 1 else ""
            raise ValueError(
                f"there are {n_images} training images, but one step takes {global_batch}{shares}; set batch_size to "
                f"at most {n_images // world_size}"
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
    def fingerprint(self) -> dict[str, Any]:
        """What must not change when a run resumes; plain values."""
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


class MixedOrder(EndlessOrder):
    """An endless order over several sources, each with a fixed share of the draws.

    Draw s is a pure function of (seed, s). In every thousand draws each source has its exact share, in a random order;
    each source is read in permutations of its own, so that none of its images comes twice before all came once.

    Args:
        sizes: Rows of each source; their rows follow one another.
        weights: Share of each source, in any unit.
        **common: The other options of ``EndlessOrder``.

    Raises:
        ValueError: A weight is not above 0, or too small for a place among a thousand draws.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], **common: Any) -> None:
        super().__init__(sum(sizes), **common)
        self.sizes, self.quotas = list(sizes), mix_quotas(weights)
        self._starts = [0, *accumulate(self.sizes)]
        self._block = -1
        self._sources = self._turns = np.empty(0, np.int64)
        self._permutations: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must not change when a run resumes; plain values."""
        return super().fingerprint | {"quotas": self.quotas}

    def batch(self, number: int) -> list[Draw]:
        """This rank's share of global batch ``number``.

        Returns:
            (row, sample) pairs; ``sample`` numbers the draws of the run.
        """
        share = self.global_batch // self.num_replicas
        start = number * self.global_batch + self.rank * share
        return [(self._row(draw), draw) for draw in range(start, start + share)]

    def _row(self, draw: int) -> int:
        block, place = divmod(draw, MIX_BLOCK)
        if block != self._block:
            self._enter(block)
        source = int(self._sources[place])
        turn = block * self.quotas[source] + int(self._turns[place])  # draws of this source before this one
        number_of_pass, within = divmod(turn, self.sizes[source])
        return self._starts[source] + int(self._permutation_of(source, number_of_pass)[within])

    def _enter(self, block: int) -> None:
        """Deal a thousand draws out to the sources."""
        sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
        sources = np.random.Generator(np.random.Philox(key=[self.seed, block])).permutation(sources)
        turns = np.empty(MIX_BLOCK, np.int64)
        for source, quota in enumerate(self.quotas):
            turns[sources == source] = np.arange(quota)
        self._block, self._sources, self._turns = block, sources, turns

    def _permutation_of(self, source: int, number_of_pass: int) -> torch.Tensor:
        key = (source, number_of_pass)
        if key not in self._permutations:
            # One pass may end within a batch, hence the one before is kept; older ones are gone.
            self._permutations = {
                kept: order
                for kept, order in self._permutations.items()
                if kept[0] != source or kept[1] >= number_of_pass - 1
            }
            generator = torch.Generator().manual_seed(self.seed + number_of_pass + 1_000_003 * source)
            self._permutations[key] = torch.randperm(self.sizes[source], generator=generator)
        return self._permutations[key]


def mix_quotas(weights: Sequence[float]) -> list[int]:
    """Draws of each source in a block: proportional to the weights, by largest remainders.

    Raises:
        ValueError: A weight is not above 0, or too small for a place among a thousand draws.
    """
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"source_weights are {list(weights)}; each must be a number above 0")
    exact = [weight * MIX_BLOCK / sum(weights) for weight in weights]
    quotas = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])
    for i in by_remainder[: MIX_BLOCK - sum(quotas)]:
        quotas[i] += 1
    if 0 in quotas:
        raise ValueError(f"source_weights are {list(weights)}; the smallest must be at least a thousandth of the sum")
    return quotas


class StreamOrder(DistributedSampler[int]):
    """Numbers of the batches of a stream, from those done on; the stream knows itself what comes next.

    Args:
        length: Batches in one iteration, which is what ``len`` says.
        batches_done: Asked whenever an iteration begins.
    """

    def __init__(self, *, length: int, batches_done: Callable[[], int] = lambda: 0) -> None:
        super().__init__(range(length), num_replicas=1, rank=0, shuffle=False)  # type: ignore[arg-type]
        self.length, self.batches_done = length, batches_done

    def __iter__(self) -> Iterator[int]:
        start = self.batches_done()
        return iter(range(start, start + self.length))

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
        batches_done: Asked whenever an iteration begins; where a training pass was interrupted, it goes on there.

    Raises:
        ValueError: There are fewer rows than processes.
    """

    def __init__(
        self,
        n_images: int,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        batches_done: Callable[[], int] = lambda: 0,
    ) -> None:
        if n_images < world_size:
            raise ValueError(f"{n_images} images cannot be shared by {world_size} devices; use fewer devices")
        super().__init__(range(n_images), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.start, self.stop = rank * n_images // world_size, (rank + 1) * n_images // world_size
        smallest, largest = n_images // world_size, -(-n_images // world_size)
        self.n_batches = min(-(-largest // batch_size), smallest)
        self.batches_done = batches_done

    def __iter__(self) -> Iterator[list[Draw]]:
        rows = self.stop - self.start
        edges = [self.start + i * rows // self.n_batches for i in range(self.n_batches + 1)]
        for first, last in pairwise(edges[self.batches_done() % self.n_batches :]):
            yield [(row, row) for row in range(first, last)]

    def __len__(self) -> int:
        return self.n_batches
