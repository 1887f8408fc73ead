import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_igpt.callbacks import ClassificationReport, LayerCurve
from lightning_igpt.checkpointing import AtomicCheckpointIO
from lightning_igpt.modules import FineTuneModule, PretrainModule, ProbeModule
from lightning_igpt.trainer import best_precision, make_trainer
from tests.modules.helpers import TINY, loader


def checkpoints(trainer):
    return [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]


def test_defaults_for_a_run_counted_in_steps(tmp_path):
    trainer = make_trainer(max_steps=100, accelerator="cpu", default_root_dir=tmp_path, accumulate_grad_batches=3)
    assert trainer.max_steps == 100 and trainer.max_epochs == -1
    assert trainer.val_check_interval == 30 and trainer.check_val_every_n_epoch is None
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert any(isinstance(callback, LearningRateMonitor) for callback in trainer.callbacks)
    assert trainer.precision == best_precision("cpu")


def test_every_choice_can_be_overridden(tmp_path):
    mine = ModelCheckpoint()
    io = TorchCheckpointIO()
    trainer = make_trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, precision="64-true", val_check_interval=0.5,
        callbacks=mine, plugins=io, logger=False,
    )  # fmt: skip
    assert checkpoints(trainer) == [mine] and trainer.strategy.checkpoint_io is io
    assert trainer.precision == "64-true" and trainer.val_check_interval == 0.5 and trainer.check_val_every_n_epoch == 1
    assert not any(isinstance(callback, LearningRateMonitor) for callback in trainer.callbacks)
    assert not checkpoints(make_trainer(max_steps=1, accelerator="cpu", enable_checkpointing=False))


def test_a_run_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"max_steps.*or max_epochs"):
        make_trainer()


def test_precision_follows_the_hardware(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert best_precision("cpu") == "32-true"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert best_precision("cpu") == "bf16-mixed"


def test_a_run_leaves_a_checkpoint_of_its_last_step(tmp_path):
    trainer = make_trainer(
        max_steps=7, checkpoint_every=3, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False
    )
    trainer.fit(PretrainModule(TINY, "gray:8"), loader(64), loader())
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.rglob("*.ckpt")}
    assert steps == {"final.ckpt": 7, "step=6.ckpt": 6}


def test_monitor_keeps_the_best(tmp_path):
    torch.manual_seed(0)
    trainer = make_trainer(
        max_epochs=4, monitor="val/accuracy", accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False
    )
    module = FineTuneModule(num_classes=3, network=TINY, palette="gray:8", lr=0.02)
    seen = []
    module.on_validation_end = lambda: seen.append(trainer.callback_metrics["val/accuracy"].item())
    trainer.fit(module, loader(), loader())
    (callback,) = checkpoints(trainer)
    assert callback.best_model_score.item() == max(seen[1:])  # the first is the sanity check's


def test_pictures_of_what_was_found_come_by_themselves(tmp_path):
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False}
    for name, module in {
        "probe": ProbeModule(network=TINY, palette="gray:8", num_classes=3),
        "finetune": FineTuneModule(num_classes=3, network=TINY, palette="gray:8"),
    }.items():
        trainer = make_trainer(default_root_dir=tmp_path / name, **options)
        trainer.fit(module, loader(), loader())
        trainer.test(module, loader(), verbose=False)
    found = {(path.relative_to(tmp_path).parts[0], path.name) for path in tmp_path.rglob("*.png")}
    assert ("probe", "probe_by_layer.png") in found and ("finetune", "confusion.png") in found
    mine = [LayerCurve(), ClassificationReport(n_worst=2)]
    callbacks = make_trainer(callbacks=mine, **options).callbacks
    assert [one for one in callbacks if isinstance(one, (LayerCurve, ClassificationReport))] == mine


def test_the_command_lines_defaults_are_no_choices(tmp_path):
    """LightningCLI passes every option of Trainer, those not given with Trainer's default."""
    given = {"logger": None, "enable_checkpointing": None, "max_time": None, "check_val_every_n_epoch": 1}
    trainer = make_trainer(max_steps=20, accelerator="cpu", default_root_dir=tmp_path, **given)
    assert trainer.check_val_every_n_epoch is None and len(checkpoints(trainer)) == 2
    assert any(isinstance(callback, LearningRateMonitor) for callback in trainer.callbacks)
    with pytest.raises(ValueError, match="how long to train"):
        make_trainer(**given)
