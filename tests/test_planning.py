import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.planning import forward_flops_per_token, parameter_count, train_flops_per_token, training_bytes
from tests.networks import SMALL, SMALL_BERT


@pytest.mark.parametrize(
    "config",
    [*PRESETS.values(), SMALL, SMALL_BERT, ImageGPTConfig(2, 2, 8, 5, 4, n_inner=12, bias=True)],
)
def test_parameters_equal_the_networks(config):
    with torch.device("meta"):
        network = ImageGPT(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("config", [SMALL, SMALL_BERT])
def test_flops_equal_torchs_count(config):
    """torch counts the whole square of attention; ours counts the causal part of it."""
    with torch.device("meta"):
        network = ImageGPT(config)
        tokens = torch.zeros(1, config.n_positions, dtype=torch.long)
        masked = torch.zeros(1, config.n_positions, dtype=torch.bool) if config is SMALL_BERT else None
    with FlopCounterMode(display=False) as counter:
        network(tokens, masked=masked)
    length, width, depth = config.n_positions, config.n_embd, config.n_layer
    square = 4 * depth * width * length
    causal = 2 * depth * width * (length + 1) if config is SMALL else square
    assert counter.get_total_flops() == length * (forward_flops_per_token(config) - causal + square)


def test_the_small_network_costs_what_is_known():
    assert forward_flops_per_token(PRESETS["igpt_s"]) == pytest.approx(0.177e9, rel=0.01)
    assert train_flops_per_token(PRESETS["igpt_s"]) == pytest.approx(0.530e9, rel=0.01)
    memory = training_bytes(PRESETS["igpt_s"], 1)
    assert memory["state"] == 16 * 76_571_648
    assert memory["activations"] / 2**30 == pytest.approx(0.80, abs=0.01)
