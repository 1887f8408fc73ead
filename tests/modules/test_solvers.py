"""The parts of a probe: stored features, classifiers shared among processes, votes."""

import threading
from collections import Counter

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from lightning_igpt.modules import solvers
from lightning_igpt.modules.heads import ConcatHead, Correct, vote
from lightning_igpt.modules.solvers import FeatureStore, Logistic, fit_heads

CPU = torch.device("cpu")
GROUPS = [[0], [1], [2], [0, 2]]
HOW = Logistic((0.1, 1.0, 10.0), standardize=True, max_iter=500, seed=0)


def fill(store, n_batches=3):
    generator = torch.manual_seed(0)
    features = torch.randn(n_batches * 5, 4, 7, generator=generator)
    for i, part in enumerate(features.split(5)):
        store.add(part, torch.full((5,), i), torch.arange(i * 5, i * 5 + 5))
    return features


@pytest.mark.parametrize("max_bytes", [10**6, 600, 0])
def test_columns_come_back_in_order_from_memory_and_files(max_bytes):
    store = FeatureStore(max_bytes)
    features = fill(store)
    assert len(store) == 15
    for index in range(4):
        column = store.column(index)
        assert column.is_contiguous() and torch.equal(column, features[:, index])
    assert store.labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert store.numbers.tolist() == list(range(15))


def rows(n=231):
    generator = torch.manual_seed(0)
    labels = torch.arange(n) % 3
    return torch.randn(n, 3, 6, generator=generator) + labels[:, None, None] * 0.3, labels


def stored(features, labels, numbers):
    store = FeatureStore(2**20)
    for part in torch.arange(len(labels)).split(50):
        store.add(features[part], labels[part], numbers[part])
    return store


def alone():
    features, labels = rows()
    return fit_heads(stored(features, labels, torch.arange(231)), GROUPS, HOW, num_classes=3, device=CPU)


def together(monkeypatch, stores):
    """Run every process in a thread; their collective calls meet at a barrier."""
    barrier, shelf, rank, found = threading.Barrier(len(stores)), [None] * len(stores), threading.local(), {}

    def exchange(value):
        shelf[rank.value] = value
        barrier.wait(20)
        values = list(shelf)
        barrier.wait(20)
        return values

    monkeypatch.setattr(solvers, "gather_all_tensors", exchange)

    def process(number):
        rank.value = number
        options = {"num_classes": 3, "device": CPU, "world_size": len(stores)}
        found[number] = fit_heads(stores[number], GROUPS, HOW, **options)

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
        expected = HOW.fit(features[:, group].flatten(1), labels, 3)
        assert_equal([head], [expected])
    assert len({head.c for head in heads}) > 1  # so the choice is a choice


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_several_processes_equal_one_though_samplers_pad(monkeypatch, world_size):
    """231 rows do not divide by 2 or 5, so some samplers repeat the first ones at the end."""
    features, labels = rows()
    numbers = torch.arange(-(-231 // world_size) * world_size) % 231
    stores = [stored(features[shard], labels[shard], shard) for shard in numbers.view(-1, world_size).T]
    for found in together(monkeypatch, stores):
        assert_equal(found, alone())


@pytest.mark.parametrize(
    ("layers", "center", "count", "places"),
    [
        (range(13), 6, 5, [4, 5, 6, 7, 8]),
        (range(13), 11, 5, [8, 9, 10, 11, 12]),
        (range(13), 0, 3, [0, 1, 2]),
        (range(3), 2, 3, [0, 1, 2]),
        ([4], 0, 1, [0]),
        ([8, 2, 6, 4], 3, 3, [1, 3, 2]),  # by depth: 2, 4, 6
    ],
)
def test_places_around_the_best(layers, center, count, places):
    head = ConcatHead(layers, count, 2, 3)
    head.center.fill_(center)
    assert head.places == places


def test_logits_are_those_of_the_concatenated_features():
    generator = torch.manual_seed(0)
    head, features = ConcatHead(range(4), 3, 5, 7), torch.randn(2, 6, 4, 7, generator=generator)
    head.center.fill_(3)
    head.weight.normal_(generator=generator)
    head.bias.normal_(generator=generator)
    expected = features[:, :, 1:].flatten(2) @ head.weight.T + head.bias
    torch.testing.assert_close(head(lambda place: features[:, :, place]), expected)


def test_votes_equal_a_count_for_each_classifier():
    logits = torch.randn(5, 40, 3, 4, generator=torch.manual_seed(0))
    found = vote(logits, torch.arange(40), seed=0)
    assert found.shape == (40, 3)
    ties = 0
    for row in range(40):
        for head in range(3):
            counts = Counter(logits[:, row, head].argmax(-1).tolist()).most_common()
            winners = {value for value, number in counts if number == counts[0][1]}
            assert int(found[row, head]) in winners
            ties += len(winners) > 1
    assert ties > 10
    assert torch.equal(found[7:9], vote(logits[:, 7:9], torch.tensor([7, 8]), seed=0))  # however images are batched
    assert not torch.equal(found, vote(logits, torch.arange(40), seed=1))
    assert torch.equal(vote(logits[:1], torch.arange(40), seed=0), logits[0].argmax(-1))


def test_accuracies_are_those_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    labels, predictions = torch.randint(3, (50,), generator=generator), torch.randint(3, (50, 4), generator=generator)
    ours, theirs = Correct(4), [MulticlassAccuracy(3, average="micro") for _ in range(4)]
    for rows in torch.arange(50).split(7):
        ours.update(predictions[rows, :3], labels[rows])
        ours.update(predictions[rows, 3:], labels[rows], first=3)
        for number, metric in enumerate(theirs):
            metric.update(predictions[rows, number], labels[rows])
    assert torch.equal(ours.compute(), torch.stack([metric.compute() for metric in theirs]))
