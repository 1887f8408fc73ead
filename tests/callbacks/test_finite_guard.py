"""Steps that are not finite stop a run before they are taken; and so does a disk without room."""

import math
import re
import shutil

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_igpt.callbacks import DiskCheck, FiniteGuard
from lightning_igpt.callbacks.finite_guard import NonFiniteError
from lightning_igpt.data import PretrainDataModule
from lightning_igpt.modules import PretrainModule
from lightning_igpt.strategies import FullyShardedStrategy
from tests.image_files import tiny
from tests.modules.helpers import quiet_trainer
from tests.processes import in_processes

NETWORK = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 4, "image_size": 4}
SOURCE = tiny(22)  # 20 to train on, 5 batches of 4 per pass
NAN, INF = math.nan, math.inf


class Poisoned(PretrainModule):
    """Changes the loss of the batch that holds a certain draw; draw 26 is in the seventh of 4."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for draw in set(self.poison) & set(batch["sample"].tolist()):  # {draw: function of the loss}
            loss = self.poison[draw](loss)
        return loss


def plus(what):
    """A loss that is not finite, and a gradient that is."""
    return lambda loss: loss + what


def make_run(folder, *callbacks, poison=None, batch_size=4, **options):
    """A trainer, and what starts it."""
    torch.manual_seed(0)
    module = Poisoned(NETWORK, "gray:4", lr=0.01, warmup_steps=0)
    module.poison = poison or {}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    options = {"num_sanity_val_steps": 0, "limit_val_batches": 0, "max_steps": 12} | options
    trainer = quiet_trainer(folder, callbacks=list(callbacks), enable_checkpointing=checkpoints, **options)
    return trainer, lambda: trainer.fit(module, PretrainDataModule(SOURCE, batch_size=batch_size, image_size=4))


def fails(folder, *callbacks, **options):
    """The message, and the trainer after it."""
    trainer, start = make_run(folder, *callbacks, **options)
    with pytest.raises(NonFiniteError) as caught:
        start()
    return str(caught.value), trainer


def saved_steps(folder):
    """Steps of the checkpoints under a folder; weights and moments in all of them must be finite."""
    files = {path: torch.load(path, weights_only=True) for path in sorted(folder.rglob("*.ckpt"))}
    for path, checkpoint in files.items():
        moments = [state for one in checkpoint.get("optimizer_states", []) for state in one["state"].values()]
        tensors = [*checkpoint["state_dict"].values(), *(value for state in moments for value in state.values())]
        assert all(bool(tensor.isfinite().all()) for tensor in tensors), path
    return sorted(checkpoint["global_step"] for checkpoint in files.values())


@pytest.mark.parametrize(
    "what, numbers",
    [(lambda loss: loss * NAN, "loss nan and gradient norm nan"), (plus(INF), r"loss inf and gradient norm 1\.\d+")],
)
def test_the_step_is_not_taken_and_every_checkpoint_is_good(tmp_path, what, numbers):
    before = {}

    class Keep(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            before.update({name: value.clone() for name, value in module.state_dict().items()})

    savers = [ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_on_exception=True)]
    savers.append(OnExceptionCheckpoint(tmp_path / "b"))
    message, trainer = fails(tmp_path, Keep(), FiniteGuard(), *savers, poison={26: what})
    assert re.fullmatch(rf"optimizer step 7 has {numbers}, samples 24, 25, 26, 27, so it was not taken: .*", message)
    assert trainer.global_step == 6
    assert all(torch.equal(value, before[name]) for name, value in trainer.lightning_module.state_dict().items())
    assert {*saved_steps(tmp_path)} == {1, 2, 3, 4, 5, 6}


def test_all_micro_batches_are_named_and_numbers_are_those_of_the_step(tmp_path):
    """The norm of all of them, before clipping."""
    seen = {}

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            seen["norm"] = torch.cat([parameter.grad.flatten() for parameter in module.parameters()]).norm().item()

    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.001, "batch_size": 12}  # one step in a pass of 20
    message, _ = fails(tmp_path, Look(), FiniteGuard(), poison={26: plus(NAN)}, **options)
    assert message.startswith(f"optimizer step 2 has loss nan and gradient norm {seen['norm']:.4g}, samples 20, 21, ")
    assert ", 30, 31, so" in message


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=["", "more"])
def test_a_good_run_is_what_it_would_be_without(tmp_path, options):
    runs = [make_run(tmp_path, *callbacks, **options) for callbacks in ([], [FiniteGuard()])]
    for _, start in runs:
        torch.manual_seed(1)
        start()
    plain, guarded = (trainer.lightning_module.state_dict() for trainer, _ in runs)
    assert all(torch.equal(value, guarded[name]) for name, value in plain.items())


class Reads(TorchDispatchMode):
    """Counts how often a number on the device is asked for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal")
        return func(*args, **(kwargs or {}))


def test_one_number_is_read_per_step(tmp_path):
    def reads(*callbacks):
        _, start = make_run(tmp_path, *callbacks, accumulate_grad_batches=2)
        with Reads() as seen:
            start()
        return seen.count

    assert reads(FiniteGuard()) == reads() + 12


def test_under_a_grad_scaler_losses_alone_count(tmp_path):
    def options():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return {"plugins": MixedPrecision("16-mixed", "cpu", scaler=scaler), "max_steps": 8}

    trainer, start = make_run(tmp_path, FiniteGuard(), poison={26: lambda loss: loss * 1e30}, **options())
    start()  # the gradient overflows, and the scaler skips the step
    assert trainer.precision_plugin.scaler.get_scale() < 2.0**10
    message, _ = fails(tmp_path, FiniteGuard(), poison={26: plus(INF)}, **options())
    assert message.startswith("optimizer step 7 has loss inf, samples 24")


class OnOneProcess(Callback):
    """Leaves the bad batch to the other process."""

    def on_train_start(self, trainer, module):
        if trainer.is_global_zero:
            module.poison = {}


@pytest.mark.parametrize("sharded", [False, True])
def test_all_processes_stop_together(tmp_path, sharded):
    """Of sharded gradients, too, the norm is that of the whole."""

    def work(rank):
        saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
        strategy = FullyShardedStrategy(2) if sharded else "ddp"
        poison = {draw: plus(INF) for draw in (26, 27)}  # finite gradients: the other process sees nothing
        message, _ = fails(tmp_path, FiniteGuard(), saver, OnOneProcess(), poison=poison, devices=2, strategy=strategy)
        assert message.startswith(f"optimizer step 7 (process {rank} of 2) has loss ") and "gradient norm" in message
        assert ("loss inf" in message) == (rank == 1)

    assert in_processes(work) == [0, 0]
    assert saved_steps(tmp_path) == [5]


def test_a_folder_without_room_or_rights_stops_the_run_before_training(tmp_path, monkeypatch):
    def start(folder):
        make_run(folder, DiskCheck(), ModelCheckpoint(folder / "checkpoints"))[1]()

    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written"):
        start(tmp_path / "file")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"takes about [\d,]+ bytes, but .*checkpoints has 1,000 free") as error:
        start(tmp_path)
    assert not list(tmp_path.rglob("*.ckpt"))
    size = int(re.search(r"about ([\d,]+)", str(error.value))[1].replace(",", ""))
    usage = usage._replace(free=size * 3 // 2)
    with pytest.raises(OSError, match="room for two"):  # the next is written before the last is removed
        start(tmp_path)
    (tmp_path / "checkpoints" / "old.ckpt").write_bytes(b"0" * size)
    start(tmp_path)  # there is one already
