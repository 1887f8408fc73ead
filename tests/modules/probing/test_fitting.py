import threading

import pytest
import torch

from lightning_igpt.modules.probing import fitting
from lightning_igpt.modules.probing.feature_store import FeatureStore
from lightning_igpt.modules.probing.fitting import Logistic, fit_heads, rows_once

CPU = torch.device("cpu")
GROUPS = [[0], [1], [2], [0, 2]]
HOW = Logistic((0.1, 1.0, 10.0), standardize=True, max_iter=500, seed=0)


def rows(n=231):
    generator = torch.manual_seed(0)
    labels = torch.arange(n) % 3
    return torch.randn(n, 3, 6, generator=generator) + labels[:, None, None] * 0.3, labels


def stored(features, labels, numbers, max_bytes=2**20):
    store = FeatureStore(max_bytes)
    for part in torch.arange(len(labels)).split(50):
        store.add(features[part], labels[part], numbers[part])
    return store


def alone(**options):
    features, labels = rows()
    return fit_heads(stored(features, labels, torch.arange(231), **options), GROUPS, HOW, num_classes=3, device=CPU)


def together(monkeypatch, stores, n_rows=None):
    """Run every process in a thread; their collective calls meet at a barrier."""
    barrier, shelf, rank, found = threading.Barrier(len(stores)), [None] * len(stores), threading.local(), {}

    def exchange(value):
        shelf[rank.value] = value
        barrier.wait(20)
        values = list(shelf)
        barrier.wait(20)
        return values

    monkeypatch.setattr(fitting, "gather_all_tensors", exchange)
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda into, value: into.__setitem__(slice(None), exchange(value))
    )

    def process(number):
        rank.value = number
        ranks = {"rank": number, "world_size": len(stores), "n_rows": n_rows}
        found[number] = fit_heads(stores[number], GROUPS, HOW, num_classes=3, device=CPU, **ranks)

    threads = [threading.Thread(target=process, args=(number,)) for number in range(len(stores))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(len(stores))]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for mine, other in zip(found, expected, strict=True):
        assert mine.c == other.c
        assert torch.equal(mine.weight, other.weight) and torch.equal(mine.bias, other.bias)


def test_a_group_is_fitted_to_its_concatenated_columns():
    features, labels = rows()
    heads = alone()
    for group, head in zip(GROUPS, heads, strict=True):
        expected = HOW(features[:, group].flatten(1), labels, 3)
        assert_equal([head], [expected])
    assert len({head.c for head in heads}) > 1  # so the choice is a choice


def test_files_change_nothing():
    assert_equal(alone(max_bytes=0), alone())


def test_the_order_of_reading_changes_nothing():
    features, labels = rows()
    order = torch.randperm(231, generator=torch.manual_seed(1))
    assert_equal(
        fit_heads(stored(features[order], labels[order], order), GROUPS, HOW, num_classes=3, device=CPU), alone()
    )


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_several_processes_equal_one_though_samplers_pad(monkeypatch, world_size):
    """231 rows do not divide by 2 or 5: DistributedSampler repeats the first ones at the end."""
    features, labels = rows()
    per_process = -(-231 // world_size)
    numbers = torch.arange(per_process * world_size)
    shards = [numbers[rank::world_size] for rank in range(world_size)]
    stores = [stored(features[shard % 231], labels[shard % 231], shard) for shard in shards]
    for found in together(monkeypatch, stores, n_rows=231):
        assert_equal(found, alone())


def test_repeated_sample_numbers_count_once(monkeypatch, caplog):
    features, labels = rows()
    parts = [torch.arange(0, 120), torch.cat([torch.arange(100, 231), torch.tensor([230, 5])])]  # of unequal size
    stores = [stored(features[part], labels[part], part) for part in parts]
    for found in together(monkeypatch, stores):
        assert_equal(found, alone())
    assert not caplog.messages
    both = torch.cat(parts)
    assert_equal(fit_heads(stored(features[both], labels[both], both), GROUPS, HOW, num_classes=3, device=CPU), alone())
    assert "22 of 253 training images came before and are left out" in caplog.text


def test_rows_once_equals_a_loop():
    numbers = torch.randint(0, 40, (60,), generator=torch.manual_seed(0))
    first = {}
    for place, number in enumerate(numbers.tolist()):
        first.setdefault(number, place)
    assert rows_once(numbers).tolist() == [first[number] for number in sorted(first)]
    assert rows_once(numbers, 25).tolist() == [first[number] for number in sorted(first) if number < 25]


def test_too_few_rows_are_told_once(caplog):
    features, labels = rows(30)
    heads = fit_heads(stored(features, labels, torch.arange(30)), GROUPS, HOW, num_classes=3, device=CPU)
    assert [head.c for head in heads] == [1.0] * 4
    assert len(caplog.messages) == 1 and "30 training images leave 3 to choose c on" in caplog.text
