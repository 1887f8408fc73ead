from itertools import chain, islice

import pytest
import torch
from torch.utils.data import DistributedSampler

from lightning_igpt.data.order import EndlessOrder, EvalOrder


def order(n=26, global_batch=4, length=6, **options):
    return EndlessOrder(n, global_batch=global_batch, length=length, **options)


def test_order_is_the_written_formula():
    by_hand = []
    for number_of_pass in range(3):
        permutation = torch.randperm(26, generator=torch.Generator().manual_seed(5 + number_of_pass)).tolist()
        for batch in range(6):
            places = range(batch * 4, batch * 4 + 4)
            by_hand.append([(permutation[place], number_of_pass * 26 + place) for place in places])
    endless = order(seed=5, length=18)
    assert list(endless) == by_hand
    assert [endless.batch(k) for k in (17, 0, 9)] == [by_hand[k] for k in (17, 0, 9)]


def test_a_pass_repeats_no_row_and_samples_are_unique():
    draws = list(chain(*order(length=60)))
    assert len({sample for _, sample in draws}) == len(draws)
    for start in range(0, len(draws), 24):
        assert len({row for row, _ in draws[start : start + 24]}) == 24


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_global_batches(world_size):
    ranks = [list(order(rank=rank, world_size=world_size, length=13)) for rank in range(world_size)]
    assert [list(chain(*shares)) for shares in zip(*ranks, strict=True)] == list(order(length=13))


def test_iteration_starts_where_the_run_is():
    done = 0
    endless = order(length=9, batches_done=lambda: done)
    assert len(endless) == 9
    whole = [endless.batch(k) for k in range(30)]
    for done in (0, 1, 5, 6, 7, 13):
        assert list(endless) == whole[done : done + 9]
        assert len(endless) == 9


def test_state_of_another_iteration_does_not_leak():
    endless = order(length=18)
    first = iter(endless)
    list(islice(first, 8))
    assert list(endless)[:8] == [endless.batch(k) for k in range(8)]
    assert list(first) == [endless.batch(k) for k in range(8, 18)]


def test_seeds_differ():
    assert list(order(seed=0)) != list(order(seed=1))


def test_lightning_leaves_the_orders_alone():
    assert isinstance(order(), DistributedSampler) and isinstance(EvalOrder(3, batch_size=2), DistributedSampler)


def test_too_few_images_name_both_numbers_and_the_cure():
    with pytest.raises(ValueError, match=r"26 training images, .* takes 32 \(16 on each of 2 devices\).*at most 13"):
        order(global_batch=32, world_size=2)
    with pytest.raises(ValueError, match="5 images cannot be shared by 2"):
        order(global_batch=5, world_size=2)
    assert order(global_batch=26).batches_per_epoch == 1


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 25])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_reads_every_row_once(n, batch_size, world_size):
    if n < world_size:
        with pytest.raises(ValueError, match=f"{n} images cannot be shared by {world_size} devices"):
            EvalOrder(n, batch_size=batch_size, world_size=world_size)
        return
    orders = [EvalOrder(n, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    ranks = [list(each) for each in orders]
    assert list(chain(*chain(*ranks))) == [(row, row) for row in range(n)]
    assert len({len(batches) for batches in ranks}) == 1 and len(ranks[0]) == len(orders[0])
    sizes = [len(batch) for batch in chain(*ranks)]
    assert min(sizes) >= 1 and max(sizes) <= batch_size + (batch_size == 1 and n % world_size > 0)
