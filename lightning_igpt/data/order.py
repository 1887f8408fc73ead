"""Which image is read when: orders that are pure functions of the seed and the optimizer step, and one for evaluation.

All are samplers of (row, sample) pairs, where ``sample`` numbers the draw and decides crops, augmentation and masks.
They subclass torch's ``DistributedSampler`` because Lightning leaves only that class alone: any other sampler it
wraps a second time under several processes, unless the user passes ``use_distributed_sampler=False``.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import torch
from torch.utils.data import DistributedSampler

Draw: TypeAlias = tuple[int, int]  # (row of the data, number of the draw)


class EndlessOrder(DistributedSampler[Draw]):
    """The draws of optimizer step k are a pure function of (seed, k), for k = 0, 1, 2, ... without end.

    Every pass over the data is a new permutation; the rows that do not fill a whole step are left for another pass.
    Accumulated micro-batches and, within them, ranks take consecutive slices of a step, so neither changes the order.
    A stream, which decides itself what is read next, takes only the samples of passes of one step.

    An iteration has ``n_steps`` steps of ``batch_size`` rows and begins at ``first_step()``; where that is None,
    iterations follow each other, or begin with the epoch that ``set_epoch`` names.
    """

    def __init__(
        self,
        n_images: int,
        *,
        batch_size: int,
        n_steps: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        first_step: Callable[[], int | None] = lambda: None,
    ) -> None:
        parts = world_size * accumulate
        if batch_size % parts:
            sizes = [str(size) for size in (batch_size // parts * parts, -(-batch_size // parts) * parts) if size]
            text = f"batch_size {batch_size}, the images of an optimizer step, cannot be divided among {world_size}"
            cure = f"set batch_size to {' or '.join(sizes)}, or change one of the other two"
            raise ValueError(f"{text} devices x accumulate_grad_batches {accumulate}; {cure}")
        self.at_once = batch_size // parts  # what one device computes: its part of a micro-batch
        if n_images < batch_size:
            text = f"batch_size {batch_size} exceeds the number of training images, {n_images}"
            raise ValueError(f"{text}; lower batch_size or set val_fraction=0")
        super().__init__(range(n_images), num_replicas=world_size, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.n_images, self.batch_size, self.n_steps = n_images, batch_size, n_steps
        self.accumulate, self.first_step = accumulate, first_step
        self._pass, self._permutation = -1, np.empty(0, np.int64)

    def draws(self, step: int) -> Iterator[Draw]:
        """This rank's (row, sample) pairs of one step; ``sample`` is pass * n_images + place in the permutation."""
        number_of_pass, within = divmod(step, self.n_images // self.batch_size)
        if number_of_pass != self._pass:
            generator = torch.Generator().manual_seed(self.seed + number_of_pass)
            permutation = torch.randperm(self.n_images, generator=generator, device="cpu")
            self._pass, self._permutation = number_of_pass, permutation.numpy()
        for start in range(self.rank * self.at_once, self.batch_size, self.num_replicas * self.at_once):
            first = within * self.batch_size + start
            rows = self._permutation[first : first + self.at_once].tolist()
            yield from zip(rows, range(number_of_pass * self.n_images + first, 2**63), strict=False)

    def __iter__(self) -> Iterator[Draw]:
        first = self.first_step()
        if first is None:
            first, self.epoch = self.epoch * self.n_steps, self.epoch + 1
        for step in range(first, first + self.n_steps):
            yield from self.draws(step)

    def __len__(self) -> int:
        return self.n_steps * self.accumulate * self.at_once


class EvalOrder(DistributedSampler[list[Draw]]):
    """Every row exactly once, in order, in batches of nearly equal size.

    All ranks have the same number of batches, so that collective calls inside a step cannot hang.
    """

    def __init__(self, n_images: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        if n_images < world_size:
            raise ValueError(f"{world_size} devices exceed the number of images, {n_images}; use fewer devices")
        super().__init__(range(n_images), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.start, self.stop = rank * n_images // world_size, (rank + 1) * n_images // world_size
        smallest, largest = n_images // world_size, -(-n_images // world_size)
        self.n_batches = min(-(-largest // batch_size), smallest)

    def __iter__(self) -> Iterator[list[Draw]]:
        rows = self.stop - self.start
        edges = [self.start + i * rows // self.n_batches for i in range(self.n_batches + 1)]
        return ([(row, row) for row in range(first, last)] for first, last in pairwise(edges))

    def __len__(self) -> int:
        return self.n_batches
