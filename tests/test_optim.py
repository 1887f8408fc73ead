import math

import pytest
import torch

from lightning_igpt.optim import default_warmup, make_adam, make_schedule
from tests.networks import SMALL, random_network


def rates(warmup, total, schedule="cosine"):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    scheduler = make_schedule(schedule, optimizer, warmup, total, 0.25)
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found, optimizer.param_groups[0]["lr"]


def test_rises_linearly_then_falls_along_a_cosine_to_zero():
    found, after = rates(4, 20)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[4:] == pytest.approx([1 + math.cos(math.pi * i / 16) for i in range(16)])
    assert after == pytest.approx(0, abs=1e-12)


def test_a_constant_rate_has_no_end_and_wsd_falls_in_the_last_part_alone():
    start = [0.5, 1.0, 1.5, 2.0]
    assert rates(4, 20, "constant") == ([*start, *[2.0] * 16], 2.0)
    found, after = rates(4, 20, "wsd")
    assert found[:16] == [*start, *[2.0] * 12]
    assert found[16:] == pytest.approx([2 * (1 - math.sqrt(i / 5)) for i in range(1, 5)]) and after == 0
    assert rates(0, 4, "wsd") == ([2.0] * 4, 0.0)  # one step at least is not at the full rate: the one after the end
    with pytest.raises(ValueError, match="warmup_steps is 16 and the decay has 5 steps, but the run only 20; lower"):
        rates(16, 20, "wsd")


def test_default_warm_up_is_an_epoch_but_at_most_a_tenth():
    assert default_warmup(1_000_000, 10_009) == 10_009
    assert default_warmup(500, 10_009) == 50
    assert default_warmup(5, None) == 1


def test_only_matrices_are_decayed():
    network = random_network(SMALL)
    network.wpe.weight.requires_grad_(False)
    optimizer = make_adam(network.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.5)
    decayed, plain = optimizer.param_groups
    assert decayed["weight_decay"] == 0.5 and all(parameter.ndim == 2 for parameter in decayed["params"])
    assert plain["weight_decay"] == 0.0 and all(parameter.ndim == 1 for parameter in plain["params"])
    count = sum(1 for parameter in network.parameters() if parameter.requires_grad)
    assert len(decayed["params"]) + len(plain["params"]) == count
    assert decayed["betas"] == (0.9, 0.95)


def test_layers_below_train_slower_and_every_group_says_by_how_much():
    layers = [[torch.nn.Parameter(torch.zeros(2, 2)), torch.nn.Parameter(torch.zeros(2))] for _ in range(4)]
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    optimizer = make_adam(
        layers[0], lr=0.3, betas=(0.9, 0.95), weight_decay=0.5, below=[layers[1], [frozen], layers[3]], layer_decay=0.7
    )
    found = [(g["lr"], g["lr_scale"], g["weight_decay"], g["decayed"]) for g in optimizer.param_groups]
    scales = [1.0, 0.7, 0.7**3]
    # Exactly, as a resumed run computes the same product.
    assert found == [(0.3 * scale, scale, decay, bool(decay)) for scale in scales for decay in (0.5, 0.0)]
    assert [g["params"] for g in optimizer.param_groups] == [[p] for layer in (0, 1, 3) for p in layers[layer]]
