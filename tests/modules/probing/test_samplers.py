import pytest
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler

from lightning_igpt.data.order import EndlessOrder, EvalOrder
from lightning_igpt.modules.probing.samplers import reads_in_order, rows_before_padding

DATA = range(7)


def shared(rank=0, world_size=2, **options):
    return DistributedSampler(DATA, num_replicas=world_size, rank=rank, **options)


@pytest.mark.parametrize("world_size", [2, 3, 4, 10])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_rows_numbered_below_the_limit_are_each_row_once(world_size, batch_size):
    read = {}
    for rank in range(world_size):
        loader = DataLoader(DATA, batch_size=batch_size, sampler=shared(rank, world_size, shuffle=True))
        assert rows_before_padding(loader) == 7
        for k, row in enumerate(row for batch in loader for row in batch.tolist()):
            read[k * world_size + rank] = row
    assert sorted(row for number, row in read.items() if number < 7) == list(DATA)


class Reordering(BatchSampler):
    pass


@pytest.mark.parametrize(
    ("loader", "limit", "in_order"),
    [
        (DataLoader(DATA), None, True),
        (DataLoader(DATA, shuffle=True), None, False),
        (DataLoader(DATA, sampler=shared(shuffle=False)), 7, True),
        (DataLoader(DATA, sampler=shared()), 7, False),
        (DataLoader(DATA, batch_size=None, sampler=shared(shuffle=False)), 7, True),
        (DataLoader(DATA, sampler=DistributedSamplerWrapper(SequentialSampler(DATA), 2, 0)), 7, False),
        (DataLoader(DATA, batch_sampler=Reordering(RandomSampler(DATA), 2, False)), None, False),
        (DataLoader(DATA, batch_sampler=Reordering(shared(), 2, False)), None, False),
        (DataLoader(DATA, batch_size=None, sampler=EvalOrder(7, batch_size=2)), None, True),
        (DataLoader(DATA, batch_size=2, sampler=EndlessOrder(7, batch_size=2, n_steps=3)), None, False),
        ([DATA], None, False),
    ],
)
def test_only_layouts_that_are_known_are_relied_on(loader, limit, in_order):
    assert rows_before_padding(loader) == limit
    assert reads_in_order(loader) == in_order
