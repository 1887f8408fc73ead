"""What the sampler of a training loader tells of the images it reads."""

from __future__ import annotations

from typing import Any

from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import BatchSampler, DistributedSampler, SequentialSampler


def rows_before_padding(loader: Any) -> int | None:
    """Rows that torch's DistributedSampler shares out among processes, padded with repeats at the end.

    Its row k of process r is number ``k * processes + r`` of the whole, so the repeats are the numbers from the value
    returned on. None for any other loader: what its sampler repeats is unknown.
    """
    if type(getattr(loader, "batch_sampler", None)) not in (BatchSampler, type(None)):
        return None
    sampler = _sampler(loader)
    return len(sampler.dataset) if type(sampler) in (DistributedSampler, DistributedSamplerWrapper) else None


def reads_in_order(loader: Any) -> bool:
    """Whether a loader is known to give its rows in the order of the data."""
    sampler = _sampler(loader)
    if isinstance(sampler, DistributedSampler):
        return not sampler.shuffle and not isinstance(sampler, DistributedSamplerWrapper)
    return isinstance(sampler, SequentialSampler)


def _sampler(loader: Any) -> Any:
    inner = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    return getattr(loader, "sampler", None) if inner is None else inner
