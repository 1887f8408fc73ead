import math

import pytest
import torch

from lightning_igpt.objectives import (
    counter_uniform,
    draw_mask,
    majority_vote,
    masked_pixel_loss,
    next_pixel_loss,
    pixel_nats,
)


def brute_force_nats(logits, tokens):
    """-log softmax, pixel by pixel."""
    return torch.stack([
        torch.stack([-torch.log(row.exp()[token] / row.exp().sum()) for row, token in zip(rows, image, strict=True)])
        for rows, image in zip(logits, tokens, strict=True)
    ])  # fmt: skip


def some(batch=3, length=5, colours=7):
    torch.manual_seed(0)
    return torch.randn(batch, length, colours, dtype=torch.float64), torch.randint(colours, (batch, length))


def test_next_pixel_loss_is_the_mean_over_all_pixels():
    logits, tokens = some()
    expected = brute_force_nats(logits, tokens)
    torch.testing.assert_close(pixel_nats(logits, tokens), expected)
    torch.testing.assert_close(next_pixel_loss(logits, tokens), expected.mean())


def test_masked_loss_averages_per_image_first():
    logits, tokens = some()
    masked = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    nats = brute_force_nats(logits, tokens)
    expected = (nats[0, 0] + nats[1, :4].mean()) / 2  # the third image hides nothing and says nothing
    torch.testing.assert_close(masked_pixel_loss(logits, tokens, masked), expected)
    assert masked_pixel_loss(logits, tokens, torch.zeros_like(masked)).item() == 0


def test_masks_depend_on_seed_and_sample_alone():
    samples = torch.tensor([5, 9, 5])
    masks = draw_mask(samples, 256, seed=1)
    assert torch.equal(masks[0], masks[2])
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(draw_mask(torch.tensor([9]), 256, seed=1)[0], masks[1])
    assert not torch.equal(draw_mask(samples, 256, seed=2), masks)


def test_counter_uniform_is_uniform_and_uncorrelated():
    drawn = counter_uniform(torch.arange(2000), 500, seed=3).double()
    assert drawn.min() >= 0 and drawn.max() < 1
    assert drawn.mean().item() == pytest.approx(0.5, abs=5 * math.sqrt(1 / 12 / drawn.numel()))
    histogram = torch.histc(drawn, 64, 0, 1) / drawn.numel() * 64
    assert (histogram - 1).abs().max() < 0.05
    centred = drawn - 0.5
    for neighbour in (centred.roll(1, 0), centred.roll(1, 1)):
        assert (centred * neighbour).mean().abs() * 12 < 0.006  # 6 standard errors
    assert draw_mask(torch.arange(2000), 500, seed=0).float().mean().item() == pytest.approx(0.15, abs=0.002)


def test_masks_are_pinned():
    """A changed generator would silently change every resumed BERT run."""
    mask = draw_mask(torch.tensor([0, 1]), 32, seed=0)
    assert mask.nonzero().tolist() == [[0, 2], [0, 4], [1, 5], [1, 11], [1, 12], [1, 19], [1, 26]]


def test_majority_vote_counts_and_breaks_ties_by_seed():
    votes = torch.tensor([[2, 0, 1], [2, 1, 1], [0, 2, 1], [2, 0, 0], [1, 1, 1]])  # 5 masks, 3 samples
    samples = torch.arange(3)
    assert majority_vote(votes[:, [0, 2]], samples[:2], 3, seed=0).tolist() == [2, 1]
    tied = torch.tensor([[0], [2], [0], [2]]).expand(4, 2000)
    found = majority_vote(tied, torch.arange(2000), 3, seed=0)
    assert torch.equal(found, majority_vote(tied, torch.arange(2000), 3, seed=0))
    assert set(found.tolist()) == {0, 2} and 800 < (found == 0).sum() < 1200
    assert not torch.equal(found, majority_vote(tied, torch.arange(2000), 3, seed=1))
