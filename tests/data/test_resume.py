"""Stopped and resumed runs see exactly the images that an uninterrupted twin sees."""

import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_igpt.data import FineTuneDataModule, PretrainDataModule
from tests.image_files import tiny

SOURCE = tiny(26)  # 23 to train on, 5 batches of 4 per pass


class Recorder(LightningModule):
    def __init__(self, fail_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.fail_at = [], fail_at

    def training_step(self, batch, batch_idx):
        if self.fail_at == len(self.seen):
            raise RuntimeError("power cut")
        self.seen.append(list(zip(batch["sample"].tolist(), batch["image"][:, 0, 0, 0].tolist(), strict=True)))
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveEverywhere(Callback):
    """A checkpoint at every place where one may be made: <event>-<batches done>.ckpt."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, event, trainer):
        done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
        trainer.save_checkpoint(self.folder / f"{event}-{done}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self.save("step", trainer)

    def on_validation_end(self, trainer, _):
        self.save("validation", trainer)

    def on_train_epoch_end(self, trainer, _):
        self.save("epoch", trainer)

    def on_train_end(self, trainer, _):
        self.save("end", trainer)

    def on_exception(self, trainer, *_):
        self.save("exception", trainer)


def fit(options, ckpt=None, save_to=None, cls=PretrainDataModule, module=None, **data):
    module = module or Recorder()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[SaveEverywhere(save_to)] if save_to else [], **options,
    )  # fmt: skip
    data = cls(SOURCE, **{"batch_size": 4, "image_size": 4, **data})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable")
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module.seen


def checkpoints(folder):
    found = sorted(Path(folder).iterdir())
    assert found
    return [(path, int(path.stem.split("-")[1])) for path in found]


RUNS = {
    "endless": {"max_steps": 12, "val_check_interval": 4, "check_val_every_n_epoch": None},
    "endless, validation at the end": {"max_steps": 7},
    "endless, accumulating": {
        "max_steps": 4, "accumulate_grad_batches": 3, "val_check_interval": 6, "check_val_every_n_epoch": None,
    },
    "epochs": {"max_epochs": 2},
    "epochs, validation within": {"max_epochs": 2, "val_check_interval": 2},
    "epochs, no validation": {"max_epochs": 2, "limit_val_batches": 0},
    "epochs, accumulating": {"max_epochs": 2, "accumulate_grad_batches": 3},
    "epochs, cut short": {"max_epochs": 3, "limit_train_batches": 3},
}  # fmt: skip


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_resume_from_every_checkpoint(options, tmp_path):
    whole = fit(options, save_to=tmp_path)
    for path, done in checkpoints(tmp_path):
        assert fit(options, ckpt=path) == whole[done:], path.stem


LONGER = [({"max_steps": 4}, {"max_steps": 9}), ({"max_epochs": 1}, {"max_epochs": 2})]


@pytest.mark.parametrize("short, long", LONGER, ids=["endless", "epochs"])
def test_a_finished_run_can_be_made_longer(short, long, tmp_path):
    fit(short, save_to=tmp_path)
    whole = fit(long)
    for path, done in checkpoints(tmp_path):
        assert fit(long, ckpt=path) == whole[done:], path.stem


@pytest.mark.parametrize("options", [{"max_steps": 12}, {"max_epochs": 2}], ids=["endless", "epochs"])
def test_workers_do_not_move_the_place(options, tmp_path):
    whole = fit(options)
    assert fit(options, save_to=tmp_path, num_workers=2) == whole
    for name, workers in (("step-3", 2), ("step-5", 0)):
        assert fit(options, ckpt=tmp_path / f"{name}.ckpt", num_workers=workers) == whole[int(name[-1]) :]


def test_resume_after_an_exception(tmp_path):
    options = {"max_steps": 12}
    with pytest.raises(RuntimeError, match="power cut"):
        fit(options, save_to=tmp_path, module=Recorder(fail_at=6))
    assert fit(options, ckpt=tmp_path / "exception-6.ckpt") == fit(options)[6:]


def test_augmentation_resumes_too(tmp_path):
    whole = fit({"max_epochs": 2}, save_to=tmp_path, cls=FineTuneDataModule, pad=2)
    assert fit({"max_epochs": 2}, ckpt=tmp_path / "step-7.ckpt", cls=FineTuneDataModule, pad=2) == whole[7:]


def test_half_the_batch_on_twice_the_devices_is_the_same_order(tmp_path):
    """The global batch counts; what each rank sees is tested with the order."""
    fit({"max_steps": 6}, save_to=tmp_path)
    state = torch.load(tmp_path / "step-5.ckpt", weights_only=True)["PretrainDataModule"]
    assert state == {"batches_done": 5, "seed": 0, "n_images": 23, "global_batch": 4}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "seed=0, this run has seed=1: after 2 batches"),
        ({"batch_size": 2}, "global_batch=4, this run has global_batch=2"),
        ({"val_fraction": 0.2}, "n_images=23, this run has n_images=21"),
    ],
)
def test_another_order_is_refused(change, message, tmp_path):
    fit({"max_steps": 3}, save_to=tmp_path)
    with pytest.raises(ValueError, match=message):
        fit({"max_steps": 3}, ckpt=tmp_path / "step-2.ckpt", **change)


def test_evaluation_does_not_mind_another_batch_size(tmp_path):
    fit({"max_steps": 3}, save_to=tmp_path)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data = PretrainDataModule(SOURCE, batch_size=2, image_size=4)
    trainer.validate(Recorder(), data, ckpt_path=tmp_path / "step-2.ckpt", verbose=False, weights_only=True)
