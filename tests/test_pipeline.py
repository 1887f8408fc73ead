"""Modules and data together: the chain of a user's day, and a run that stops and goes on."""

import torch

import lightning_igpt as igpt
from lightning_igpt.data import FineTuneDataModule, PretrainDataModule, ProbeDataModule

NETWORK = igpt.ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=16, image_size=8)


def trainer(folder, **options):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return igpt.make_trainer(default_root_dir=folder, **(quiet | {"precision": "32-true"} | options))


def test_pretrain_probe_finetune_chain_by_run_folder(tmp_path):
    torch.manual_seed(0)
    pretrain = igpt.PretrainModule(NETWORK, "gray:16")
    trainer(tmp_path / "pretrain", max_steps=3).fit(pretrain, PretrainDataModule("digits"))
    probe = igpt.ProbeModule(pretrained=str(tmp_path / "pretrain"), c=1.0)
    runner = trainer(tmp_path / "probe", max_epochs=1)
    runner.fit(probe, ProbeDataModule("digits"))
    accuracy = runner.test(probe, ProbeDataModule("digits"), verbose=False)[0]["test/accuracy"]
    assert accuracy > 0.3 and probe.class_names == list("0123456789")  # chance is 0.1
    finetune = igpt.FineTuneModule(pretrained=str(tmp_path / "pretrain"), num_classes=10)
    for name, value in pretrain.network.state_dict().items():
        assert torch.equal(value, probe.network.state_dict()[name])
        assert torch.equal(value, finetune.network.state_dict()[name])
    runner = trainer(tmp_path / "finetune", max_epochs=1, monitor="val/accuracy")
    runner.fit(finetune, FineTuneDataModule("digits", flip=False, pad=1))
    (path,) = (tmp_path / "finetune").rglob("epoch=*.ckpt")
    assert igpt.FineTuneModule.load_from_checkpoint(path).class_names == list("0123456789")
