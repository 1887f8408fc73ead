"""Counts against the network and torch's own counter; memory against what autograd keeps; tables as they are printed.

The tables (floors, memory, decoding) were computed by hand for the four sizes of the paper on an H100.
"""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules import PretrainModule
from lightning_igpt.optim import make_adam
from lightning_igpt.planning import (
    DEVICES,
    PAPER,
    PAPER_XL,
    RECOMPUTE,
    WIDTHS,
    Run,
    block_matrices,
    cache_bytes,
    checkpoint_bytes,
    choose,
    decode_seconds,
    device_called,
    find_device,
    forward_flops_per_token,
    largest_batch,
    matrix_parameters,
    parameter_count,
    train_flops_per_token,
    training_bytes,
    usual_mfu,
)
from tests.modules.helpers import quiet_trainer
from tests.networks import SMALL, SMALL_BERT

GIB = 2**30
ODD = ImageGPTConfig(2, 2, 8, 5, 4, n_inner=12, bias=True)
H100 = DEVICES["h100"]
USABLE = 74 * GIB


def shows(value, printed):
    """Whether a value rounds to the printed number, whose trailing zeros before the point may be rounded too."""
    digits = printed.replace(",", "")
    whole, _, decimals = digits.partition(".")
    unit = 10.0 ** -len(decimals) if decimals else 10.0 ** (len(whole) - len(whole.rstrip("0") or "0"))
    return abs(value - float(digits)) <= 0.5000001 * unit


def config_of(name, side=32):
    return replace(PRESETS[f"igpt_{name}"], image_size=side)


def paper_run(name, side=32, **options):
    config = config_of(name, side)
    return Run(config, PAPER_XL if name == "xl" else PAPER, H100, mfu=usual_mfu(config), **options)


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
    """Without attention's kernels, of which torch counts what they compute again."""
    network, tokens = ImageGPT(SMALL), torch.zeros(2, SMALL.n_positions, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        network(tokens).sum().backward()
    counted = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert counted == tokens.numel() * 3 * 2 * matrix_parameters(SMALL)
    assert train_flops_per_token(SMALL) == 3 * forward_flops_per_token(SMALL)


# Size, side; millions of parameters, GFLOP per token forward and in training, share of attention in percent, floor in
# images per second, MFU in percent at best, floor forward.
FLOORS = [
    ("s", 32, "76.6 0.177 0.530 14 1,474 36 4,421"),
    ("m", 32, "455.2 0.983 2.948 8 265 49 795"),
    ("xl", 64, "6811 15.10 45.31 10 4.3 66 13"),
]


@pytest.mark.parametrize(("name", "side", "printed"), FLOORS)
def test_the_table_of_floors(name, side, printed):
    config, run = config_of(name, side), paper_run(name, side)
    attention = 2 * config.n_layer * config.n_embd * (config.n_positions + 1)
    values = [
        parameter_count(config) / 1e6,
        forward_flops_per_token(config) / 1e9,
        train_flops_per_token(config) / 1e9,
        100 * attention / forward_flops_per_token(config),
        run.schedule.images / run.floor_device_seconds,
        100 * run.ceiling_mfu,
        H100.reached("bf16-mixed") / (config.n_positions * forward_flops_per_token(config)),
    ]
    assert all(shows(value, text) for value, text in zip(values, printed.split(), strict=True)), values


# Size, side; GiB of state under DDP and FSDP over 8 and 64; of activations of an image eager, compiled, all computed
# again; images on 80 GB under DDP compiled, DDP all computed again, FSDP over 8 compiled.
MEMORY = [
    ("s", 32, "1.1 0.17 0.04 0.80 0.42 0.08 170 855 173"),
    ("m", 32, "6.8 0.94 0.20 2.39 1.27 0.21 52 313 57"),
    ("xl", 64, "101 13.5 2.4 47.8 25.3 3.6 0 0 2"),
]


@pytest.mark.parametrize(("name", "side", "printed"), MEMORY)
def test_the_table_of_memory(name, side, printed):
    config = config_of(name, side)
    plain, compiled = training_bytes(config, 1), training_bytes(config, 1, compiled=True)
    full = training_bytes(config, 1, recompute="full")
    shards = [training_bytes(config, 1, devices=n, sharded=True) for n in (8, 64)]
    sizes = [plain["weights"] + plain["gradients"] + plain["optimizer"]]
    sizes += [sum(parts[name] for name in ("weights", "gradients", "optimizer", "copies")) for parts in shards]
    sizes += [parts["activations"] for parts in (plain, compiled, full)]
    images = [
        largest_batch(config, USABLE, devices=8, compiled=True),
        largest_batch(config, USABLE, devices=8, recompute="full"),
        largest_batch(config, USABLE, devices=8, sharded=True, compiled=True),
    ]
    assert [int(text) for text in printed.split()[6:]] == images
    assert all(shows(size / GIB, text) for size, text in zip(sizes, printed.split(), strict=False))


def test_one_image_more_than_the_largest_batch_does_not_fit():
    layouts = itertools.product(
        WIDTHS, [(1, False), (3, False), (3, True)], RECOMPUTE, [500_000, 3_000_001, 12_345_678]
    )
    for precision, (devices, sharded), how, usable in layouts:
        options = {"precision": precision, "devices": devices, "sharded": sharded, "recompute": how}
        most = largest_batch(SMALL, usable, **options)
        assert not most or sum(training_bytes(SMALL, most, **options).values()) <= usable
        assert sum(training_bytes(SMALL, most + 1, **options).values()) > usable


def test_state_of_a_real_optimizer():
    network = ImageGPT(SMALL)
    optimizer = make_adam(network.parameters(), lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    network(torch.zeros(1, SMALL.n_positions, dtype=torch.long)).sum().backward()
    optimizer.step()
    parts = training_bytes(SMALL, 1, "32-true")
    assert sum(p.nbytes for p in network.parameters()) == parts["weights"]
    assert sum(p.grad.nbytes for p in network.parameters()) == parts["gradients"]
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert sum(value.nbytes for value in moments) == parts["optimizer"]


def test_size_of_a_real_checkpoint(tmp_path):
    config = ImageGPTConfig(n_layer=2, n_head=2, n_embd=128, vocab_size=8, image_size=4)
    rows = [{"tokens": torch.zeros(16, dtype=torch.int16)}] * 4
    trainer = quiet_trainer(tmp_path, max_steps=1, enable_checkpointing=False, plugins=TorchCheckpointIO())
    trainer.fit(PretrainModule(config, "gray:8", warmup_steps=0), DataLoader(rows, batch_size=4))
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    planned = checkpoint_bytes(config)
    assert planned == 12 * parameter_count(config)
    assert planned < (tmp_path / "whole.ckpt").stat().st_size < planned + 60_000


# Size; tokens per second of 1, 16, 64 and 256 images decoded together, where printed; MiB of keys and values of an
# image at 32, 48 and 64 pixels.
@pytest.mark.parametrize(
    ("name", "printed", "cache"),
    [
        ("s", "16,979 86,616 108,959 116,470", "48 108 192"),
        ("m", "3,053 22,695 33,456 37,955", "144 324 576"),
        ("l", "1,045 9,347 15,505 18,562", "288 648 1152"),
        ("xl", "215 2,445 5,086", "720 1620 2880"),
    ],
)
def test_the_tables_of_decoding(name, printed, cache):
    for size, text in zip((1, 16, 64, 256), printed.split(), strict=False):
        assert shows(size / decode_seconds(config_of(name), H100, size), text)
    for side, text in zip((32, 48, 64), cache.split(), strict=True):
        assert cache_bytes(config_of(name, side)) == int(text) * 2**20
    fast, config = replace(H100, bandwidth=1e18), config_of(name)  # then arithmetic is what takes time
    flops = 2 * matrix_parameters(config) + 2 * config.n_layer * config.n_embd * config.n_positions
    assert decode_seconds(config, fast, 100) == pytest.approx(100 * flops / 800e12)


def test_the_first_that_fits_is_chosen_or_the_smallest():
    seen = set()
    for name, batch_size, devices in itertools.product(("s", "l", "xl"), (1, 2, 12, 64, 1000), (1, 8)):
        config, kinds = PRESETS[f"igpt_{name}"], ("ddp", "fsdp") if devices > 1 else ("single",)
        needed = {}
        for how, kind in itertools.product(RECOMPUTE, kinds):
            parts = training_bytes(config, batch_size, devices=devices, sharded=kind == "fsdp", recompute=how)
            needed[kind, how] = sum(parts.values())
        fitting = [key for key, size in needed.items() if size <= USABLE]
        wanted = fitting[0] if fitting else min(needed, key=needed.__getitem__)
        choice = choose(config, batch_size, devices, USABLE)
        assert choice._replace(reason="") == (*wanted, "", needed[wanted], bool(fitting))
        assert f"{choice.bytes / GIB:.1f}" in choice.reason and "74.0" in choice.reason
        if cure := re.search(r"take (\d+) and accumulate_grad_batches (\d+)", choice.reason):
            micro_batch, parts = map(int, cure.groups())
            assert micro_batch * parts == batch_size and choose(config, micro_batch, devices, USABLE).fits
        else:
            assert fitting or "not even one image fits" in choice.reason
        seen.add((choice.strategy, choice.recompute, choice.fits))
    assert len(seen) >= 8


NAMES = {
    **{"gh200": "NVIDIA GH200 480GB", "h100": "NVIDIA H100 80GB HBM3", "h100-pcie": "NVIDIA H100 PCIe"},
    **{"h100-nvl": "NVIDIA H100 NVL", "a100-80": "NVIDIA A100-SXM4-80GB", "a100-40": "NVIDIA A100-SXM4-40GB"},
    **{"l40s": "NVIDIA L40S", "l4": "NVIDIA L4", "v100": "Tesla V100-SXM2-32GB", "v100-16": "Tesla V100-PCIE-16GB"},
    **{"rtx4090": "NVIDIA GeForce RTX 4090", "rtx3090": "NVIDIA GeForce RTX 3090"},
}


def test_devices_are_known_by_torchs_names():
    for key, name in NAMES.items():
        assert device_called(name) is find_device(name) is find_device(name.lower()) is DEVICES[key]


def test_other_devices_are_not_mistaken_for_these():
    others = ["", "NVIDIA A40", "NVIDIA L40", "NVIDIA H20", "NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090 Laptop GPU"]
    others += ["NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti", "nvidia h100 80gb hbm3 mig 1g.10gb"]
    assert [device_called(name) for name in others] == [None] * len(others)
