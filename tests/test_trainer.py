import logging

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader

from lightning_igpt import trainer as making
from lightning_igpt.callbacks import CompileBlocks, LearningRate, Throughput
from lightning_igpt.checkpointing import AtomicCheckpointIO
from lightning_igpt.modules import FineTuneModule, PretrainModule, ProbeModule
from lightning_igpt.trainer import best_precision, make_trainer
from tests.modules.helpers import TINY, loader


def checkpoints(trainer):
    return [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]


def test_every_choice_can_be_overridden(tmp_path):
    mine = ModelCheckpoint()
    io = TorchCheckpointIO()
    trainer = make_trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=tmp_path, precision="64-true", val_check_interval=0.5,
        callbacks=mine, plugins=io, logger=False,
    )  # fmt: skip
    assert checkpoints(trainer) == [mine] and trainer.strategy.checkpoint_io is io
    assert trainer.precision == "64-true" and trainer.val_check_interval == 0.5 and trainer.check_val_every_n_epoch == 1
    assert not any(isinstance(callback, LearningRate) for callback in trainer.callbacks)
    assert not checkpoints(make_trainer(max_steps=1, accelerator="cpu", enable_checkpointing=False))


@pytest.mark.parametrize(("width", "side", "given"), [(96, 16, 0), (128, 8, 0), (64, 32, 0), (8, 8, "bf16-mixed")])
def test_precision_follows_hardware_and_network(width, side, given, bfloat16, tmp_path):
    expected = "bf16-mixed" if given or (bfloat16 and width != 96) else "32-true"
    options = {"max_steps": 1, "accelerator": "cpu", "precision": given or None, "logger": False}
    module, dtypes = PretrainModule({**TINY.to_dict(), "n_embd": width, "image_size": side}, "gray:8"), set()
    module.network.lm_head.register_forward_hook(lambda _, inputs, logits: dtypes.add(logits.dtype))
    assert make_trainer(module=module, **options).precision == expected
    trainer = make_trainer(default_root_dir=tmp_path, enable_progress_bar=False, **options)  # made for any module
    assert trainer.precision == given or trainer.precision == best_precision("cpu")[0]
    trainer.fit(module, DataLoader(torch.zeros(2, 3, side, side, dtype=torch.uint8), 2))
    assert trainer.precision == expected and dtypes == {torch.bfloat16 if "bf16" in expected else torch.float32}
    trainer.validate(PretrainModule(TINY, "gray:8"), loader(), verbose=False)  # a trainer may run another network
    assert trainer.precision == (given or "32-true")
    plugin = MixedPrecision("bf16-mixed", "cpu")  # gives a precision, too
    assert make_trainer(plugins=plugin, **options | {"precision": None}).precision_plugin is plugin


class Products(Callback):
    """Notes how float32 matrices are multiplied in training."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen = torch.get_float32_matmul_precision()


def test_choices_for_speed_are_told_once(tmp_path, caplog, bfloat16):
    options = {"max_steps": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    with caplog.at_level(logging.INFO):
        trainer = make_trainer(default_root_dir=tmp_path, **options)
        trainer.fit(PretrainModule(TINY, "gray:8"), loader(64), loader())
        trainer.validate(trainer.lightning_module, loader(), verbose=False)
    assert caplog.messages.count("strategy SingleDeviceStrategy (one device), activation checkpointing: off") == 1
    why = "faster on a CPU at width 16 with 16 tokens" if bfloat16 else "this CPU has no AMX or AVX512-BF16"
    for line in (f"precision 32-true ({why})", "compile off (saves nothing in 32-true on a CPU)"):
        assert line in caplog.messages and len(line) <= 80


def test_choices_for_speed_can_be_overridden(tmp_path, caplog):
    products = Products()
    options = {"max_steps": 3, "accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    mine = {"precision": "64-true", "compile": False, "matmul_precision": "high", "callbacks": products}
    with caplog.at_level(logging.INFO):
        make_trainer(default_root_dir=tmp_path, **mine, **options).fit(PretrainModule(TINY, "gray:8"), loader(64))
    assert "precision 64-true (as given)" in caplog.text
    assert "compile off (as set), float32 products as TF32 where" in caplog.text
    assert products.seen == "high" and torch.get_float32_matmul_precision() == "highest"  # it ends with the run
    mine = [CompileBlocks(False), Throughput(peak_tflops=1)]
    callbacks = make_trainer(callbacks=mine, **options).callbacks
    assert [one for one in callbacks if isinstance(one, (CompileBlocks, Throughput))] == mine
    ours = [one for one in make_trainer(**options).callbacks if isinstance(one, (CompileBlocks, Throughput))]
    assert {type(one) for one in ours} == {CompileBlocks, Throughput} and len(ours) == 2


def test_tf32_is_for_networks_trained_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "_has_tf32", lambda device: True)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "default_root_dir": tmp_path}

    def products(module, precision):
        seen = Products()
        make_trainer(max_epochs=1, precision=precision, callbacks=seen, **options).fit(module, loader())
        return seen.seen

    assert products(PretrainModule(TINY, "gray:8"), "32-true") == "high"
    assert products(PretrainModule(TINY, "gray:8"), "bf16-mixed") == "highest"
    assert products(ProbeModule(network=TINY, palette="gray:8", num_classes=3), "32-true") == "highest"


def test_a_run_leaves_a_checkpoint_of_its_last_step(tmp_path):
    options = {"accelerator": "cpu", "default_root_dir": tmp_path, "enable_progress_bar": False}
    trainer = make_trainer(max_steps=7, checkpoint_every=3, **options)
    trainer.fit(PretrainModule(TINY, "gray:8"), loader(64), loader())
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.rglob("*.ckpt")}
    assert steps == {"final.ckpt": 7, "step=6.ckpt": 6}


def test_runs_without_a_logger_keep_the_checkpoints_of_others(tmp_path):
    options = {"accelerator": "cpu", "default_root_dir": tmp_path, "enable_progress_bar": False, "logger": False}
    for steps, path in ((1, None), (2, None), (3, tmp_path / "checkpoints" / "final-v1.ckpt")):  # the last one resumes
        make_trainer(max_steps=steps, **options).fit(PretrainModule(TINY, "gray:8"), loader(64), ckpt_path=path)
    steps = {path.name: torch.load(path, weights_only=True)["global_step"] for path in tmp_path.rglob("final*")}
    assert steps == {"final.ckpt": 1, "final-v1.ckpt": 3}


def test_monitor_keeps_the_best(tmp_path):
    torch.manual_seed(0)
    options = {"accelerator": "cpu", "default_root_dir": tmp_path, "enable_progress_bar": False}
    trainer = make_trainer(max_epochs=4, monitor="val/accuracy", **options)
    module = FineTuneModule(num_classes=3, network=TINY, palette="gray:8", lr=0.02)
    seen = []
    module.on_validation_end = lambda: seen.append(trainer.callback_metrics["val/accuracy"].item())
    trainer.fit(module, loader(), loader())
    callback, newest = checkpoints(trainer)
    assert torch.load(newest.best_model_path, weights_only=True)["epoch"] == 3  # a run goes on from there
    assert callback.best_model_score.item() == max(seen[1:])  # the first is the sanity check's


@pytest.mark.parametrize(
    ("monitor", "mode", "best"),
    [
        ("val/layer_3/accuracy", None, "max"), ("val/accuracy/dataloader_idx_1", None, "max"),
        ("val/nats_per_pixel", None, "min"), ("val_loss", None, "min"), ("val/cross_entropy", None, "min"),
        ("val/f1", "max", "max"), ("val/error", "min", "min"), ("val/accuracy", "min", "min"),
        *((name, None, None) for name in ("val/f1", "val/auroc", "val/inaccuracy", "neg_log_loss", "val/gloss")),
        ("val/f1", "best", None), (None, "max", None),
    ],
)  # fmt: skip
def test_the_mode_of_monitor_is_known_or_asked_for(monitor, mode, best):
    options = {"max_steps": 1, "accelerator": "cpu", "monitor": monitor, "mode": mode}
    if best is None:
        with pytest.raises(ValueError, match="min or max"):
            make_trainer(**options)
    else:
        mine = ModelCheckpoint()
        for given in (None, mine):  # also next to a ModelCheckpoint of the user's
            (kept,) = [one for one in checkpoints(make_trainer(callbacks=given, **options)) if one.monitor]
            assert (kept.monitor, kept.mode) == (monitor, best)


class Validations(Callback):
    def __init__(self):
        self.steps = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.steps.append(trainer.global_step)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 20, "check_val_every_n_epoch": 2}, [16]),
        ({"max_steps": 7, "check_val_every_n_epoch": 2}, [7]),  # the run ends in the first epoch of 8 batches
        ({"max_steps": 7, "val_check_interval": 100}, [7]),
        ({"max_epochs": 1, "check_val_every_n_epoch": 5}, [8]),
        ({"max_steps": 7, "limit_val_batches": 0, "val_check_interval": 100}, []),
        ({"max_steps": 10, "val_check_interval": 0.5}, [4, 8]),
        ({"max_steps": 5, "accumulate_grad_batches": 4, "val_check_interval": 8}, [2, 4]),
        ({"max_steps": 10, "callbacks": [GradientAccumulationScheduler({0: 1, 1: 8})]}, [8, 9, 10]),
    ],
)
def test_a_run_validates_when_asked_and_at_least_once(tmp_path, options, steps):
    seen = Validations()
    callbacks = [seen, *options.get("callbacks", [])]
    options = options | {"callbacks": callbacks, "default_root_dir": tmp_path, "enable_progress_bar": False}
    make_trainer(accelerator="cpu", **options).fit(PretrainModule(TINY, "gray:8"), loader(64), loader(8))
    assert seen.steps == steps


INTERVALS = ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch", "checkpoint_every")


@pytest.mark.parametrize(("name", "value"), [*((name, 0) for name in INTERVALS), (INTERVALS[0], "2")])
def test_intervals_of_no_batches_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value!r}; it must be a whole number from 1 on"):
        make_trainer(max_steps=3, **{name: value})


def test_the_command_lines_defaults_are_no_choices(tmp_path):
    """LightningCLI passes every option of Trainer, those not given with Trainer's default."""
    given = {"logger": None, "enable_checkpointing": None, "max_time": None, "check_val_every_n_epoch": 1}
    common = {"max_steps": 100, "accelerator": "cpu", "default_root_dir": tmp_path, "accumulate_grad_batches": 3}
    for options in ({}, given):
        trainer = make_trainer(**common, **options)
        assert trainer.max_steps == 100 and trainer.max_epochs == -1
        assert trainer.val_check_interval == 30 and trainer.check_val_every_n_epoch is None
        assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO) and len(checkpoints(trainer)) == 2
    assert any(isinstance(callback, LearningRate) for callback in trainer.callbacks)
    with pytest.raises(ValueError, match="how long to train"):
        make_trainer(**given)
