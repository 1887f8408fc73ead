"""The parts of a probe: layers that are fitted together, votes, counts."""

from collections import Counter

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from lightning_igpt.modules.heads import ConcatHead, Correct, vote


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
