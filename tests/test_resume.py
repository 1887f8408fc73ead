"""A run resumed from any checkpoint equals its uninterrupted twin bit for bit.

Compared are losses, which follow from the order, masks, augmentation and dropout; validation; and at the end weights
and the optimiser's state. The order alone, and streams, are tested in tests/data.
"""

import functools
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import lightning_igpt as igpt
from tests.image_files import tiny

SOURCE = tiny(26)  # 23 to train on: 5 batches of 4 per pass; 3 to validate on
NETWORK = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 4, "image_size": 4}


class Recorder(Callback):
    """Losses by batch, validations by optimiser step; and a checkpoint at every place where one may be made."""

    def __init__(self, folder=None, fail_at=None):
        self.folder, self.fail_at, self.losses, self.validations = folder, fail_at, {}, {}

    def on_train_start(self, trainer, _):
        self.batches_per_epoch = trainer.num_training_batches

    def save(self, event, trainer):
        if self.folder is not None and not trainer.sanity_checking:
            done = trainer.fit_loop.epoch_loop.batch_progress.total.processed
            trainer.save_checkpoint(Path(self.folder) / f"{event}-{done}.ckpt")

    def on_before_backward(self, trainer, module, loss):
        batch = trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1
        assert batch not in self.losses
        if batch == self.fail_at:
            raise RuntimeError("power cut")
        self.losses[batch] = loss.item() * trainer.accumulate_grad_batches

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.save("window" if trainer.fit_loop._should_accumulate() else "step", trainer)

    def on_validation_batch_end(self, trainer, *_):
        self.save("within", trainer)

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            names = ("val/nats_per_pixel", "val/cross_entropy", "val/accuracy", "probe/layer_1/accuracy")
            found = {name: trainer.callback_metrics[name].item() for name in names if name in trainer.callback_metrics}
            assert found
            self.validations[trainer.global_step] = found
            self.save("validation", trainer)

    def on_train_epoch_end(self, trainer, _):
        self.save("epoch", trainer)

    def on_exception(self, trainer, *_):
        self.save("exception", trainer)


def pretraining(workers=0, objective="autoregressive", dropout=0.0, batch_size=4):
    network = NETWORK | {"dropout": dropout}
    module = igpt.PretrainModule(network, "gray:4", objective=objective, seed=3, warmup_steps=2)
    return module, igpt.PretrainDataModule(SOURCE, batch_size=batch_size, num_workers=workers, seed=5)


def finetuning(workers=0, dropout=0.0, **options):
    network = NETWORK | {"dropout": dropout}
    module = igpt.FineTuneModule(network=network, palette="gray:4", num_classes=3, warmup_steps=2, **options)
    return module, igpt.FineTuneDataModule(SOURCE, batch_size=4, num_workers=workers, seed=5, pad=1)


def probing(workers=0, shuffle=True):
    module = igpt.ProbeModule(network=NETWORK, palette="gray:4", solver="sgd", seed=1)
    return module, igpt.ProbeDataModule(SOURCE, shuffle=shuffle, batch_size=4, num_workers=workers, seed=5)


def fit(make, options, *, ckpt=None, save_to=None, fail_at=None, callbacks=()):
    torch.manual_seed(0 if ckpt is None else 99)  # a resumed process does not start with the same random numbers
    module, data = make()
    recorder = Recorder(save_to, fail_at)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[recorder, *callbacks], **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable")
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    moments = trainer.optimizers[0].state_dict()["state"]
    return recorder, state, moments


def assert_resumes(make, options, whole, path):
    twin, state, moments = whole
    event, done = path.stem.split("-")
    accumulate, done = options.get("accumulate_grad_batches", 1), int(done)
    if options.get("max_epochs"):
        done -= done % twin.batches_per_epoch % accumulate
    else:
        done -= done % accumulate
    again, state_again, moments_again = fit(make, options, ckpt=path)
    assert again.losses == {batch: loss for batch, loss in twin.losses.items() if batch >= done}
    step = torch.load(path, weights_only=True)["global_step"]
    owed = event in ("step", "within")  # the validation after this step was not, or not wholly, done
    expected = {at: found for at, found in twin.validations.items() if at > step or (owed and at == step)}
    if owed and step == options.get("max_steps"):  # Lightning leaves a run at once that has all its steps
        expected = {}
    assert again.validations == expected
    assert state.keys() == state_again.keys()
    assert all(torch.equal(value, state_again[name]) for name, value in state.items())
    for mine, other in zip(moments.values(), moments_again.values(), strict=True):
        assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(other[key])) for key in mine)


ENDLESS = {"max_steps": 6, "val_check_interval": 3, "check_val_every_n_epoch": None}
ENDLESS_3 = {"max_steps": 4, "accumulate_grad_batches": 3, "val_check_interval": 6, "check_val_every_n_epoch": None}
EPOCHS, EPOCHS_3 = {"max_epochs": 2}, {"max_epochs": 2, "accumulate_grad_batches": 3}
CASES = {
    "ar": (pretraining, ENDLESS),
    "ar, dropout, accumulating": (lambda: pretraining(dropout=0.1), ENDLESS_3),
    "bert, dropout": (lambda: pretraining(objective="bert", dropout=0.1), ENDLESS),
    "bert, accumulating": (lambda: pretraining(objective="bert"), ENDLESS_3),
    "ar, epochs, dropout": (lambda: pretraining(dropout=0.1), EPOCHS),
    "fine-tuning, dropout": (lambda: finetuning(dropout=0.1), EPOCHS),
    "fine-tuning, accumulating, dropout": (lambda: finetuning(dropout=0.1, layer_decay=0.7), EPOCHS_3),
    "probe by sgd": (probing, EPOCHS),
    "probe by sgd, accumulating": (probing, EPOCHS_3),
    "probe by sgd, in order": (lambda: probing(shuffle=False), EPOCHS),
}


EVERY_LOOP = {"ar", "bert, accumulating", "fine-tuning, dropout", "probe by sgd, accumulating"}


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The uninterrupted run of a case, and the folder with all of its checkpoints."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp("twin")
        return fit(*CASES[name], save_to=folder), folder

    return run


def assert_resume_from(paths, name, whole):
    for path in paths:
        try:
            assert_resumes(*CASES[name], whole, path)
        except AssertionError as error:
            raise AssertionError(f"from {path.stem}: {error}") from error


@pytest.mark.parametrize("name", CASES)
def test_resume_from_every_place(name, twin):
    """Every place in every kind of loop; what else differs between cases is tried at every other one."""
    whole, folder = twin(name)
    paths = sorted(folder.iterdir())[:: 1 if name in EVERY_LOOP else 2]
    assert {"step", "within", "validation", "epoch"} <= {path.stem.split("-")[0] for path in paths}
    assert_resume_from(paths, name, whole)


@pytest.mark.parametrize("fail_at", [0, 5])
@pytest.mark.parametrize("name", CASES)
def test_resume_after_an_exception(name, fail_at, twin, tmp_path):
    """The state saved while an exception is handled is that of the last optimiser step."""
    make, options = CASES[name]
    with pytest.raises(RuntimeError, match="power cut"):
        fit(make, options, save_to=tmp_path, fail_at=fail_at)
    assert_resumes(make, options, twin(name)[0], tmp_path / f"exception-{fail_at}.ckpt")


@pytest.mark.parametrize("make", [pretraining, finetuning, probing])
def test_workers_change_nothing(make, tmp_path):
    options = ENDLESS if make is pretraining else EPOCHS
    whole = fit(lambda: make(workers=2), options, save_to=tmp_path)
    assert whole[0].losses == fit(make, options)[0].losses
    assert_resumes(lambda: make(workers=2), options, whole, tmp_path / "step-4.ckpt")
    assert_resumes(make, options, whole, tmp_path / "step-4.ckpt")


@pytest.mark.parametrize("name, first", [("ar", "within-3"), ("ar", "step-3"), ("fine-tuning, dropout", "within-5")])
def test_resumed_runs_can_be_resumed(name, first, twin, tmp_path):
    whole, folder = twin(name)
    fit(*CASES[name], ckpt=folder / f"{first}.ckpt", save_to=tmp_path)
    assert_resume_from(sorted(tmp_path.iterdir()), name, whole)
