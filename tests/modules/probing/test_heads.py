from collections import Counter

import pytest
import torch

from lightning_igpt.modules.probing.heads import ConcatHead, places_around, vote


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
    assert places_around(layers, center, count) == places


@pytest.mark.parametrize(("layers", "name"), [(range(13), "8-12"), ([2, 4, 6, 8, 10], "2+4+6+8+10")])
def test_the_name_tells_the_layers(layers, name):
    head = ConcatHead(layers, 5, 2, 3)
    assert not head.fitted
    head.center.fill_(min(10, len(layers) - 1))
    assert head.fitted and head.name == name


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
