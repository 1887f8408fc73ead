"""Which strategy is chosen, by what is known when a trainer is made; GPUs here are only said to be there."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_igpt.config import PRESETS
from lightning_igpt.data import PretrainDataModule
from lightning_igpt.modules import PretrainModule
from lightning_igpt.strategies import LAUNCHERS, FullyShardedStrategy, StaticDDPStrategy, choose_strategy
from lightning_igpt.trainer import make_trainer
from tests.modules.helpers import TINY, loader


def choose(told="auto", accelerator="auto", devices="auto", num_nodes=1, precision="bf16-mixed", **options):
    return choose_strategy(
        told, accelerator=accelerator, devices=devices, num_nodes=num_nodes, precision=precision, **options
    )


@pytest.fixture
def eight_gpus(monkeypatch):
    """80 GB each."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 2**30))


@pytest.mark.parametrize(("devices", "num_nodes", "total"), [(2, 1, 2), ("2", 1, 2), (1, 2, 2), (3, 4, 12)])
def test_processes_on_cpus_each_hold_the_network(devices, num_nodes, total):
    chosen = choose(accelerator="cpu", devices=devices, num_nodes=num_nodes)
    assert type(chosen.strategy) is StaticDDPStrategy and not chosen.sharded
    assert chosen.reason == f"{total} devices, each with the whole network"


@pytest.mark.parametrize("devices", [1, "auto", "1", None])
def test_one_device_needs_no_strategy(devices):
    assert choose(accelerator="cpu", devices=devices)[:2] == ("auto", "one device")


def test_ddp_is_set_up_for_a_network_that_never_changes():
    options = StaticDDPStrategy(broadcast_buffers=True)._ddp_kwargs
    assert options == {"static_graph": True, "gradient_as_bucket_view": True, "broadcast_buffers": True}


@pytest.mark.parametrize("told", ["ddp", "ddp_spawn", "deepspeed_stage_2", DDPStrategy()])
def test_what_the_user_names_is_taken(told):
    assert choose(told, accelerator="cpu", devices=2)[:2] == (told, "as told")


@pytest.mark.parametrize("told", ["fsdp2", "FSDP2"])
def test_fsdp2_is_ours(told):
    chosen = choose(told, accelerator="cpu", devices=2)
    assert type(chosen.strategy) is FullyShardedStrategy and chosen.sharded and chosen.reason == "as told"


@pytest.mark.parametrize(
    ("network", "batch_size", "devices", "strategy"),
    [
        ("igpt_s", 16, "auto", StaticDDPStrategy),
        ("igpt_l", 8, 8, StaticDDPStrategy),
        ("igpt_l", 12, 8, FullyShardedStrategy),  # with activations, more than a GPU holds beside all of the state
        ("igpt_xl", 1, [0, 1, 2, 3, 4, 5, 6, 7], FullyShardedStrategy),
        ("igpt_xl", 1, 1, str),
    ],
)
def test_gpus_are_chosen_for_by_their_memory(eight_gpus, network, batch_size, devices, strategy):
    chosen = choose(devices=devices, config=PRESETS[network], batch_size=batch_size)
    assert type(chosen.strategy) is strategy and chosen.sharded == (strategy is FullyShardedStrategy)
    assert "GiB" in chosen.reason


def test_what_is_not_known_is_not_planned(eight_gpus):
    assert type(choose(config=PRESETS["igpt_xl"]).strategy) is StaticDDPStrategy
    assert type(choose(config=PRESETS["igpt_xl"], batch_size=1, precision="64-true").strategy) is StaticDDPStrategy
    assert choose(devices="many")[:2] == ("auto", "Lightning's choice for this machine")
    assert choose(accelerator="tpu", devices=8).strategy == "auto"


def test_a_trainer_plans_for_its_module(monkeypatch):
    asked = []

    def noted(told, **options):
        asked.append(options)
        return choose(told)

    monkeypatch.setattr("lightning_igpt.trainer.choose_strategy", noted)
    module, data = PretrainModule(TINY, "gray:8"), PretrainDataModule("digits", batch_size=5)
    make_trainer(max_steps=1, accelerator="cpu", module=module, data=data, num_nodes=1)
    make_trainer(max_steps=1, accelerator="cpu")
    assert [(one["config"], one["batch_size"]) for one in asked] == [(module.config, 5), (None, None)]


def test_the_choice_is_told(tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer = make_trainer(
            max_steps=1, accelerator="cpu", default_root_dir=tmp_path, logger=False, enable_progress_bar=False
        )
        trainer.fit(PretrainModule(TINY, "gray:8"), loader())
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    told = "strategy SingleDeviceStrategy (one device), recompute none (memory is not reckoned on cpu)"
    assert caplog.messages.count(told) == 1


def test_machines_without_a_launcher_are_told_of(caplog, monkeypatch):
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    choose(accelerator="cpu", devices=1, num_nodes=2)
    assert "num_nodes is 2, and nothing here says which machine this is" in caplog.text
    caplog.clear()
    monkeypatch.setenv("NODE_RANK", "0")
    choose(accelerator="cpu", devices=1, num_nodes=2)
    assert not caplog.text
