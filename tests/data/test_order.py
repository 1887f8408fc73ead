from itertools import chain, islice

import pytest
import torch

from lightning_igpt.data.order import EndlessOrder, EvalOrder


def order(n=26, batch_size=12, n_steps=6, **options):
    return EndlessOrder(n, batch_size=batch_size, n_steps=n_steps, **options)


def test_order_is_the_written_formula():
    by_hand = []
    for number_of_pass in range(3):
        permutation = torch.randperm(26, generator=torch.Generator().manual_seed(5 + number_of_pass)).tolist()
        by_hand += [(permutation[place], number_of_pass * 26 + place) for place in range(24)]
    endless = order(batch_size=4, seed=5, n_steps=18)
    assert list(endless) == by_hand and len(endless) == len(by_hand)
    assert list(endless.draws(9)) == by_hand[36:40] and list(endless.draws(0)) == by_hand[:4]


def test_iteration_starts_at_the_step_of_the_run():
    step = 0
    endless = order(n_steps=3, first_step=lambda: step)
    whole = [list(endless.draws(k)) for k in range(12)]
    for step in (0, 1, 5, 6, 7):
        assert list(endless) == list(chain(*whole[step : step + 3]))
    step, first = 0, iter(endless)
    assert (
        list(islice(first, 20)) + list(endless)[:2] + list(first)
        == list(chain(*whole[:2], whole[0][:2], *whole[2:3]))[:20] + whole[0][:2] + list(chain(*whole[:3]))[20:]
    )


def test_a_step_that_cannot_be_divided():
    assert order(100, batch_size=96, world_size=8, accumulate=4).at_once == 3
    with pytest.raises(ValueError, match=r"batch_size 46.* 4 devices x accumulate_grad_batches 3; .* to 36 or 48"):
        order(batch_size=46, world_size=4, accumulate=3)
    with pytest.raises(ValueError, match=r"batch_size 5.* 8 devices x accumulate_grad_batches 1; .* to 8, or"):
        order(batch_size=5, world_size=8)
    with pytest.raises(ValueError, match=r"batch_size 27 exceeds the number of training images, 26"):
        order(batch_size=27)


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 25])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_reads_every_row_once(n, batch_size, world_size):
    if n < world_size:
        with pytest.raises(ValueError, match=f"{world_size} devices exceed the number of images, {n}"):
            EvalOrder(n, batch_size=batch_size, world_size=world_size)
        return
    orders = [EvalOrder(n, batch_size=batch_size, rank=rank, world_size=world_size) for rank in range(world_size)]
    ranks = [list(each) for each in orders]
    assert list(chain(*chain(*ranks))) == [(row, row) for row in range(n)]
    assert len({len(batches) for batches in ranks}) == 1 and len(ranks[0]) == len(orders[0])
    sizes = [len(batch) for batch in chain(*ranks)]
    assert min(sizes) >= 1 and max(sizes) <= batch_size + (batch_size == 1 and n % world_size > 0)
