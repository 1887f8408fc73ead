"""A run resumed from a checkpoint between two optimizer steps equals its uninterrupted twin bit for bit.

Compared are losses, which follow from the order, masks, augmentation and dropout; validation; and at the end weights
and the optimizer's state.
"""

import functools
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import lightning_igpt as igpt
from lightning_igpt.checkpointing import find_checkpoint
from tests.image_files import tiny
from tests.processes import in_processes

SOURCE = tiny(26)  # 23 to train on, 3 to validate on
NETWORK = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 4, "image_size": 4}
VALIDATED = ("val/nats_per_pixel", "val/cross_entropy", "val/accuracy", "probe/layer_1/accuracy")


class Recorder(Callback):
    """Losses and validations by optimizer step; and a checkpoint at every place where Lightning's callbacks save."""

    def __init__(self, folder=None):
        self.folder, self.saved_at, self.losses, self.validations = folder, 0, defaultdict(list), {}

    def save(self, event, trainer):
        if self.folder is not None and not trainer.sanity_checking:
            trainer.save_checkpoint(Path(self.folder) / f"{event}-{trainer.global_step}.ckpt")

    def on_before_backward(self, trainer, module, loss):
        self.losses[trainer.global_step].append(loss.item())

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step > self.saved_at:  # an optimizer step is done
            self.saved_at = trainer.global_step
            self.save("step", trainer)

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics
            self.validations[trainer.global_step] = {
                name: metrics[name].item() for name in VALIDATED if name in metrics
            }
            self.save("validation", trainer)

    def on_train_epoch_end(self, trainer, _):
        self.save("epoch", trainer)


def pretraining(workers=0, objective="autoregressive", dropout=0.0):
    module = igpt.PretrainModule(NETWORK | {"dropout": dropout}, "gray:4", objective=objective, seed=3, warmup_steps=2)
    return module, igpt.PretrainDataModule(SOURCE, batch_size=6, num_workers=workers, seed=5)


def finetuning(workers=0, dropout=0.0, **options):
    network = NETWORK | {"dropout": dropout}
    module = igpt.FineTuneModule(network=network, palette="gray:4", num_classes=3, warmup_steps=2, **options)
    return module, igpt.FineTuneDataModule(SOURCE, batch_size=6, num_workers=workers, seed=5, pad=1)


def probing(workers=0):
    module = igpt.ProbeModule(network=NETWORK, palette="gray:4", solver="sgd", seed=1)
    return module, igpt.ProbeDataModule(SOURCE, shuffle=True, batch_size=6, num_workers=workers, seed=5)


def fit(make, options, *, ckpt=None, save_to=None, callbacks=()):
    torch.manual_seed(0 if ckpt is None else 99)  # a resumed process does not start with the same random numbers
    module, data = make()
    recorder = Recorder(save_to)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[recorder, *callbacks], **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    return recorder, state, trainer.optimizers[0].state_dict()["state"]


def assert_resumes(make, options, whole, path):
    twin, state, moments = whole
    step = torch.load(path, weights_only=True)["global_step"]
    again, state_again, moments_again = fit(make, options, ckpt=path)
    assert again.losses == {at: losses for at, losses in twin.losses.items() if at >= step}
    assert again.validations == {at: metrics for at, metrics in twin.validations.items() if at > step}
    assert state.keys() == state_again.keys()
    for name, value in state.items():  # a step's checkpoint has the scores of the validation before
        assert torch.equal(value, state_again[name]) or (name.startswith("scores.") and path.stem == "step-6")
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
}


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    """The uninterrupted run of a case, and the folder with all of its checkpoints."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp("twin")
        return fit(*CASES[name], save_to=folder), folder

    return run


@pytest.mark.parametrize("name", CASES)
def test_resume_from_every_place(name, twin):
    whole, folder = twin(name)
    paths = sorted(folder.iterdir())
    assert {"step", "validation", "epoch"} == {path.stem.split("-")[0] for path in paths}
    for path in paths:
        assert_resumes(*CASES[name], whole, path)


@pytest.mark.parametrize("make", [pretraining, finetuning, probing])
def test_workers_change_nothing(make, tmp_path):
    options = ENDLESS if make is pretraining else EPOCHS
    whole = fit(lambda: make(workers=2), options, save_to=tmp_path)
    assert whole[0].losses == fit(make, options)[0].losses
    assert_resumes(lambda: make(workers=2), options, whole, tmp_path / "step-2.ckpt")
    assert_resumes(make, options, whole, tmp_path / "step-2.ckpt")


class Seen(Callback):
    """The numbers of the images of each optimizer step."""

    def __init__(self):
        self.samples = defaultdict(list)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.samples[trainer.global_step] += batch["sample"].tolist()


def observe(make, options, accumulate, **rest):
    """Images, losses and validations by optimizer step."""
    seen, options = Seen(), options | {"accumulate_grad_batches": accumulate}
    if "val_check_interval" in options:
        options["val_check_interval"] *= accumulate
    recorder, *_ = fit(make, options, callbacks=[seen], **rest)
    losses = {step: sum(parts) for step, parts in recorder.losses.items()}  # Lightning divides each
    return dict(seen.samples), losses, recorder.validations


@pytest.mark.parametrize("make, options", [(pretraining, ENDLESS), (finetuning, EPOCHS)])
def test_accumulation_leaves_the_steps_as_they_are(make, options, tmp_path):
    """Also where a resumed run accumulates more or less than the run that it continues."""
    twin = observe(make, options, 1, save_to=tmp_path / "1")
    again = observe(make, options, 3, save_to=tmp_path / "3")
    assert again[0] == twin[0] and again[2].keys() == twin[2].keys()
    assert again[1] == pytest.approx(twin[1], rel=1e-5)
    for path in [*(tmp_path / "1").iterdir(), *(tmp_path / "3").iterdir()]:
        step = torch.load(path, weights_only=True)["global_step"]
        samples, losses, validations = observe(make, options, 2 if path.parent.name == "1" else 1, ckpt=path)
        assert samples == {at: numbers for at, numbers in twin[0].items() if at >= step}, path.stem
        assert losses == pytest.approx({at: loss for at, loss in twin[1].items() if at >= step}, rel=1e-5)
        assert [at for at in validations if at > step] == [at for at in twin[2] if at > step]


def test_devices_leave_the_order_as_it_is(tmp_path):
    twin, _, _ = observe(pretraining, ENDLESS, 1, save_to=tmp_path)

    def work(rank):
        options = ENDLESS | {"devices": 2, "strategy": "ddp"}  # with 3 micro-batches: one image at once
        for ckpt, first in ((None, 0), (tmp_path / "step-2.ckpt", 2)):
            mine, parts = observe(pretraining, options, 3, ckpt=ckpt)[0], [None, None]
            torch.distributed.all_gather_object(parts, mine)
            pairs = {step: zip(*(part[step] for part in parts), strict=True) for step in mine}
            merged = {step: [number for pair in pairs[step] for number in pair] for step in pairs}
            assert merged == {step: twin[step] for step in range(first, 6)}

    assert in_processes(work) == [0, 0]


@pytest.mark.parametrize(
    "name, first", [("ar", "step-3"), ("fine-tuning, dropout", "step-3"), ("fine-tuning, dropout", "epoch-3")]
)
def test_resumed_runs_can_be_resumed(name, first, twin, tmp_path):
    """Also from the last step of an epoch."""
    whole, folder = twin(name)
    fit(*CASES[name], ckpt=folder / f"{first}.ckpt", save_to=tmp_path)
    for path in sorted(tmp_path.iterdir()):
        assert_resumes(*CASES[name], whole, path)


class Killed(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [2, 4, 5])
def test_a_run_of_make_trainer_owes_no_validation(step, tmp_path):
    """Its checkpoints are written after the validation of their step: a resumed run validates as its twin does."""

    def run(folder, callbacks=(), ckpt_path=None):
        torch.manual_seed(0)
        module, data = pretraining(dropout=0.1)
        recorder = Recorder()
        trainer = igpt.make_trainer(
            max_steps=6, val_check_interval=2, checkpoint_every=1, accelerator="cpu", default_root_dir=folder,
            precision="32-true", logger=False, enable_progress_bar=False, callbacks=[recorder, *callbacks],
        )  # fmt: skip
        trainer.fit(module, data, ckpt_path=ckpt_path)
        return recorder, module, trainer

    twin, module, _ = run(tmp_path / "twin")
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(tmp_path / "run", [Killed(step)])
    path = find_checkpoint(tmp_path / "run", module)
    assert path.name == f"step={step}.ckpt"
    if step % 2 == 0:
        assert torch.load(path, weights_only=True)["lightning_igpt"]["validation"]["step"] == step
    again, resumed, _ = run(tmp_path / "run", ckpt_path=path)
    assert again.validations == {at: metrics for at, metrics in twin.validations.items() if at > step}
    assert again.losses == {at: losses for at, losses in twin.losses.items() if at >= step}
    for name, value in module.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
