"""Which strategy is chosen, by what is known when a trainer is made; GPUs here are only declared to be there."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_igpt.config import PRESETS
from lightning_igpt.data import PretrainDataModule
from lightning_igpt.modules import PretrainModule
from lightning_igpt.strategies import FullyShardedStrategy, choose_strategy
from lightning_igpt.trainer import make_trainer
from tests.modules.helpers import TINY


def choose(given="auto", accelerator="auto", devices="auto", num_nodes=1, precision="bf16-mixed", **options):
    options |= {"accelerator": accelerator, "devices": devices, "num_nodes": num_nodes, "precision": precision}
    return choose_strategy(given, **options)


@pytest.fixture
def eight_gpus(monkeypatch):
    """80 GB each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))


@pytest.mark.parametrize(("devices", "num_nodes", "total"), [(2, 1, 2), ("2", 1, 2), (1, 2, 2), (3, 4, 12)])
def test_processes_on_cpus_each_hold_the_network(devices, num_nodes, total):
    chosen = choose(accelerator="cpu", devices=devices, num_nodes=num_nodes)
    assert type(chosen.strategy) is DDPStrategy
    assert chosen.reason == f"{total} devices, each with the whole network"


def test_one_device_needs_no_strategy_and_what_the_user_names_is_taken():
    for devices in (1, "auto", "1", None):
        assert choose(accelerator="cpu", devices=devices) == ("auto", "one device")
    for given in ("ddp", "ddp_spawn", "deepspeed_stage_2", DDPStrategy()):
        assert choose(given, accelerator="cpu", devices=2) == (given, "as given")


@pytest.mark.parametrize("given", ["fsdp2", "FSDP2"])
def test_fsdp2_is_ours(given):
    assert type(choose(given, accelerator="cpu", devices=2).strategy) is FullyShardedStrategy
    with pytest.raises(ValueError, match="set devices to a number"):
        choose(given, accelerator="cpu", devices="many")


@pytest.mark.parametrize(
    ("network", "batch_size", "accumulate", "devices", "strategy"),
    [
        ("igpt_s", 128, 1, "auto", DDPStrategy),
        ("igpt_l", 64, 1, 8, DDPStrategy),
        ("igpt_l", 96, 1, 8, FullyShardedStrategy),  # with activations, more than a GPU holds next to all of the state
        ("igpt_l", 96, 2, 8, DDPStrategy),
        ("igpt_xl", 8, 1, [0, 1, 2, 3, 4, 5, 6, 7], FullyShardedStrategy),
        ("igpt_xl", 1, 1, 1, str),
    ],
)
def test_gpus_are_chosen_for_by_their_memory(eight_gpus, network, batch_size, accumulate, devices, strategy):
    chosen = choose(devices=devices, config=PRESETS[network], batch_size=batch_size, accumulate=accumulate)
    assert type(chosen.strategy) is strategy
    assert "GiB" in chosen.reason


def test_what_is_not_known_is_not_planned(eight_gpus):
    assert type(choose(config=PRESETS["igpt_xl"]).strategy) is DDPStrategy
    assert type(choose(config=PRESETS["igpt_xl"], batch_size=8, precision="64-true").strategy) is DDPStrategy
    assert choose(devices="many") == ("auto", "Lightning's choice for this machine")
    assert choose(accelerator="tpu", devices=8).strategy == "auto"


def test_a_trainer_plans_for_its_module(monkeypatch):
    asked = []

    def noted(given, **options):
        asked.append(options)
        return choose(given)

    monkeypatch.setattr("lightning_igpt.trainer.choose_strategy", noted)
    module, data = PretrainModule(TINY, "gray:8"), PretrainDataModule("digits", batch_size=5)
    make_trainer(max_steps=1, accelerator="cpu", module=module, data=data, num_nodes=1)
    make_trainer(max_steps=1, accelerator="cpu")
    assert [(options["config"], options["batch_size"]) for options in asked] == [(module.config, 5), (None, None)]
