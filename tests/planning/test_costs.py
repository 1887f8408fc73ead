import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.planning import (
    block_matrices,
    forward_flops_per_token,
    matrix_parameters,
    parameter_count,
    train_flops_per_token,
)
from tests.networks import SMALL, SMALL_BERT

ODD = ImageGPTConfig(2, 2, 8, 5, 4, n_inner=12, bias=True)


def on_meta(config):
    with torch.device("meta"):
        return ImageGPT(config)


@pytest.mark.parametrize("config", [*PRESETS.values(), SMALL, SMALL_BERT, ODD])
def test_parameters_equal_the_networks(config):
    network = on_meta(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in network.parameters())
    matrices = [p.numel() for block in network.blocks() for p in block.parameters() if p.ndim == 2]
    assert config.n_layer * block_matrices(config) == sum(matrices)
    assert matrix_parameters(config) == sum(matrices) + network.lm_head.weight.numel()


@pytest.mark.parametrize("config", [SMALL, SMALL_BERT, ODD])
def test_flops_equal_torchs_count(config):
    """torch counts the whole square of attention; ours counts the causal part of it."""
    network = on_meta(config)
    with torch.device("meta"):
        tokens = torch.zeros(1, config.n_positions, dtype=torch.long)
        masked = torch.zeros(1, config.n_positions, dtype=torch.bool) if config is SMALL_BERT else None
    with FlopCounterMode(display=False) as counter:
        network(tokens, masked=masked)
    length, width, depth = config.n_positions, config.n_embd, config.n_layer
    square = 4 * depth * width * length
    causal = square if config is SMALL_BERT else 2 * depth * width * (length + 1)
    assert counter.get_total_flops() == length * (forward_flops_per_token(config) - causal + square)


def test_a_training_step_takes_three_forward_passes():
    """Attention's kernels apart, of which torch counts what they compute again."""
    network, tokens = ImageGPT(SMALL), torch.zeros(2, SMALL.n_positions, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        network(tokens).sum().backward()
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert counted == tokens.numel() * 3 * 2 * matrix_parameters(SMALL)
    assert train_flops_per_token(SMALL) == 3 * forward_flops_per_token(SMALL)
