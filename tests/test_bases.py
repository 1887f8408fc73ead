"""Modules and data modules under the Trainer of the other package called PyTorch Lightning, ours and theirs."""

import runpy

import lightning.pytorch as lightning
import pytest
import torch
from torch.distributed.tensor import DTensor

import lightning_igpt as igpt
from lightning_igpt.bases import LightningDataModule, LightningModule
from tests.sharding import process_group

other = pytest.importorskip("pytorch_lightning")
demos = pytest.importorskip("pytorch_lightning.demos.boring_classes")
NETWORK = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 16, "image_size": 8}
QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}
OURS = {
    "pretrain": (igpt.PretrainModule, igpt.PretrainDataModule, {}),
    "probe": (igpt.ProbeModule, igpt.ProbeDataModule, {"layers": [1], "num_classes": 10}),
    "finetune": (igpt.FineTuneModule, igpt.FineTuneDataModule, {"num_classes": 10}),
}
process_group = process_group


class Images(other.LightningDataModule):
    """A data module of another project, without validation."""

    def train_dataloader(self):
        return torch.randint(0, 256, (3, 4, 3, 8, 8), dtype=torch.uint8)


class OurImages(Images, LightningDataModule): ...


class OurBoringModel(demos.BoringModel, LightningModule): ...


def ours(kind="pretrain"):
    module, data, options = OURS[kind]
    torch.manual_seed(0)
    return module(network=NETWORK, palette="gray:16", **options), data("digits", batch_size=200)


def trainer(package, folder, **options):
    length = {} if "max_steps" in options else {"max_epochs": 1}
    return package.Trainer(default_root_dir=folder, logger=False, **length, **QUIET, **options)


@pytest.mark.parametrize("kind", OURS)
def test_both_trainers_do_the_same(kind, tmp_path):
    ends = []
    for package in (lightning, other):
        (module, data), runs = ours(kind), trainer(package, tmp_path)
        runs.fit(module, data)
        assert module.example_input_array is not None and igpt.find_checkpoint(runs)
        test = runs.test(module, data, verbose=False)
        ends.append((module.state_dict(), test, [len(batch) for batch in runs.predict(module, data)]))
    (weights, *results), (others, *other_results) = ends
    assert results == other_results and all(torch.equal(weights[name], others[name]) for name in weights)


def test_schedules_follow_callbacks_of_the_other_package(tmp_path):
    changing = other.callbacks.GradientAccumulationScheduler({0: 1, 1: 3})
    runs = trainer(other, tmp_path, max_steps=-1, max_epochs=2, callbacks=[changing])
    runs.fit(ours()[0], Images())
    assert runs.global_step == 4 and runs.optimizers[0].param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("first, second", [(lightning, other), (other, lightning)])
def test_the_other_trainer_resumes(first, second, tmp_path):
    module, data = ours()
    trainer(first, tmp_path, max_steps=2).fit(module, data)
    runs = trainer(second, tmp_path, max_steps=3)
    runs.fit(*ours(), ckpt_path=igpt.find_checkpoint(runs))
    assert runs.global_step == 3


@pytest.mark.parametrize("package, data", [(lightning, OurImages), (other, OurImages), (other, Images)])
def test_their_data_trains_our_module(package, data, tmp_path):
    runs = trainer(package, tmp_path)
    runs.fit(ours()[0], data())
    assert runs.global_step == 3


@pytest.mark.parametrize("package", [lightning, other])
def test_their_module_runs_under_both(package, tmp_path):
    runs = trainer(package, tmp_path, max_steps=2)
    assert issubclass(runpy.run_path(igpt.bases.__file__)["LightningModule"], package.LightningModule)
    runs.fit(OurBoringModel())
    assert runs.global_step == 2


def test_the_other_strategy_shards_our_network(tmp_path, process_group):
    module, data = ours()
    trainer(other, tmp_path, max_steps=1, strategy=other.strategies.ModelParallelStrategy()).fit(module, data)
    assert all(isinstance(parameter, DTensor) for parameter in module.network.parameters())
