"""The likelihood of masked networks against brute force: all orders, all masks, all pictures of 2 x 2 and 3 colors."""

import itertools
import math

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.objectives import antithetic_masks, draw_mask, hidden_nats, masked_pixel_loss
from lightning_igpt.sampling import inpaint, score
from tests.modules.helpers import BERT, TINY, labelled_images, quiet_trainer
from tests.modules.test_pretrain import module
from tests.networks import SMALL_BERT, random_network, random_tokens

SQUARE = ImageGPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=3, image_size=2, objective="bert")
PICTURES = torch.tensor(list(itertools.product(range(3), repeat=4)))  # (81, 4)


@pytest.fixture(scope="module")
def network():
    return random_network(SQUARE, dtype=torch.float64)


@torch.no_grad()
def nats_by_order(network):
    """Nats of whole pictures, one pixel after another, in each of the 24 orders: (24, 81)."""
    rows = []
    for order in itertools.permutations(range(4)):
        hidden, total = torch.ones(81, 4, dtype=torch.bool), torch.zeros(81, dtype=torch.float64)
        for pixel in order:
            log_p = network(PICTURES, masked=hidden)[:, pixel].log_softmax(-1)
            total -= log_p.gather(1, PICTURES[:, pixel : pixel + 1])[:, 0]
            hidden[:, pixel] = False
        rows.append(total)
    return torch.stack(rows)


@torch.no_grad()
def test_the_bound_is_the_average_over_all_orders(network):
    by_order, mean = nats_by_order(network), torch.zeros(81, dtype=torch.float64)
    for k in range(1, 5):
        for hidden in itertools.combinations(range(4), k):
            masked = torch.tensor([pixel in hidden for pixel in range(4)]).expand(81, 4)
            mean += hidden_nats(network(PICTURES, masked=masked), PICTURES, masked) / 4 / math.comb(4, k)
    torch.testing.assert_close(4 * mean, by_order.mean(0))
    likelihood = by_order.neg().exp().mean(0)  # of the mixture of all orders
    assert likelihood.sum().item() == pytest.approx(1)
    assert (4 * mean > -likelihood.log()).all()


@pytest.mark.parametrize("antithetic", [False, True])
def test_score_estimates_the_bound_and_its_error(network, antithetic):
    expected = nats_by_order(network).mean(0) / 4
    found = score(network, PICTURES.repeat(50, 1), n_draws=8, antithetic=antithetic, batch_size=4096)
    found = found.unflatten(0, (50, 81)).transpose(0, 1).flatten(1)  # (81, draws)
    assert found.shape[1] == 50 * (4 if antithetic else 8)
    deviations = (found.mean(1) - expected) / found.std(1) * math.sqrt(found.shape[1])  # standard normal
    assert deviations.abs().max() < 4.5 and deviations.std() < 1.3


def test_whole_pictures_in_random_order_follow_the_mixture_of_orders(network):
    likelihood = nats_by_order(network).neg().exp().mean(0).float()
    nothing = torch.zeros(20_000, 4, dtype=torch.bool)
    drawn = inpaint(network, nothing.long(), nothing, steps=99, order="random", generator=torch.manual_seed(0))
    frequency = torch.bincount((drawn * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81) / 20_000
    assert ((frequency - likelihood).abs() <= 5 * (likelihood * (1 - likelihood) / 20_000).sqrt()).all()


def test_random_order_draws_equally_many_in_each_step():
    network, seen = random_network(SMALL_BERT), []
    network.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["masked"]), with_kwargs=True)
    tokens, known = random_tokens(), torch.arange(32).view(2, 16) // 8 == 2  # nothing of one, half of the other
    filled = inpaint(network, tokens, known, steps=4, order="random", generator=torch.manual_seed(0))
    assert [masked.sum(1).tolist() for masked in seen] == [[16, 8], [12, 6], [8, 4], [4, 2]]
    assert all(not (later & ~earlier).any() for earlier, later in itertools.pairwise(seen))
    assert torch.equal(filled[known], tokens[known]) and not torch.equal(seen[1][0], seen[1][0].sort()[0])
    with pytest.raises(ValueError, match="order is 'raster'; it must be surest or random"):
        inpaint(network, tokens, known, order="raster")


def test_antithetic_draws_vary_less():
    """The network learns pictures of one color: a pixel costs ln 3 if all are hidden, and else nearly nothing."""
    network, tokens = random_network(SQUARE), torch.arange(1200)[:, None].expand(1200, 4) % 3
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for step in range(150):
        masked = draw_mask(torch.arange(32) + 32 * step, 4, seed=1, ratio="uniform")
        loss = masked_pixel_loss(network(tokens[:32], masked=masked), tokens[:32], masked)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    independent = score(network, tokens, n_draws=16, antithetic=False).mean(1)
    pairs = score(network, tokens, n_draws=16).mean(1)
    assert (pairs.mean().item(), independent.mean().item()) == pytest.approx((math.log(3) / 4,) * 2, abs=0.04)
    assert pairs.var() / independent.var() == pytest.approx(2 / 3, abs=0.12)  # 1 + rho, rho = -1/3


def test_draws_depend_on_seed_and_place_alone():
    network, tokens = random_network(SMALL_BERT).train(), random_tokens(batch=7)
    found = score(network, tokens, n_draws=6, seed=5)
    assert found.shape == (7, 3) and found.dtype == torch.float32 and network.training
    torch.testing.assert_close(score(network, tokens, n_draws=6, seed=5, batch_size=3), found)
    assert (score(network, tokens, n_draws=6, seed=6) - found).abs().min() > 1e-4
    with pytest.raises(ValueError, match="n_draws is 5; it must be at least 1, and even for antithetic pairs"):
        score(network, tokens, n_draws=5)


def test_uniform_masks_hide_every_set_of_whole_pixels_as_often_as_they_should():
    first, second = antithetic_masks(torch.arange(24_000), 12, seed=2, tokens_per_pixel=3)
    assert torch.equal(first, draw_mask(torch.arange(24_000), 12, seed=2, ratio="uniform", tokens_per_pixel=3))
    for masked in (first, second):
        pixels = masked.view(-1, 4, 3)
        assert torch.equal(pixels.all(2), pixels.any(2))
        sets = torch.bincount((pixels[:, :, 0] * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16)
        expected = [24_000 / 4 / math.comb(4, bin(code).count("1")) for code in range(1, 16)]
        assert sets[0] == 0 and sets[1:].tolist() == pytest.approx(expected, rel=0.12)
    assert (first.sum(1) + second.sum(1) == 15).all() and (first | second).all()


def test_a_network_trained_with_uniform_masks_logs_the_bound(tmp_path):
    images, _ = labelled_images(13)
    rows = [{"image": image, "sample": torch.tensor(i)} for i, image in enumerate(images)]
    model = module(BERT, mask_ratio="uniform", seed=4)
    torch.nn.init.normal_(model.network.lm_head.weight)
    found = quiet_trainer(tmp_path).validate(model, DataLoader(rows, batch_size=5), verbose=False)[0]
    tokens, masked = model.palette.quantize(images), draw_mask(torch.arange(13), 16, seed=4, ratio="uniform")
    expected = masked_pixel_loss(model.network(tokens, masked=masked), tokens, masked).item()
    assert found["val/nats_per_pixel_bound"] == found["val/nats_per_pixel"] == pytest.approx(expected, rel=1e-5)
    model.log = lambda *args, **kwargs: None
    assert model.training_step({"image": images, "sample": torch.arange(13)}, 0).item() == pytest.approx(expected)
    fixed = quiet_trainer(tmp_path).validate(module(BERT), DataLoader(rows, batch_size=5), verbose=False)[0]
    assert "val/nats_per_pixel_bound" not in fixed
    with pytest.raises(ValueError, match="mask_ratio is uniform, but an autoregressive network hides no pixels"):
        module(TINY, mask_ratio="uniform")
