import copy

import lightning
import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_igpt.callbacks import CompileBlocks, CompletionGrid, OnlineProbe
from lightning_igpt.callbacks.compile import Decision, decide
from lightning_igpt.data import PretrainDataModule
from lightning_igpt.modules import PretrainModule
from lightning_igpt.sampling import complete
from lightning_igpt.weights import load_pretrained
from tests.modules.helpers import BERT, TINY, loader, quiet_trainer


class Losses(lightning.pytorch.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


class Look(lightning.pytorch.Callback):
    """Does to a module in training what other code may do to it."""

    was_on = False

    def on_before_backward(self, trainer, pl_module, loss):
        self.was_on |= is_on(pl_module.network)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.copy = copy.deepcopy(pl_module.network)
        trainer.save_checkpoint(trainer.default_root_dir + "/part.ckpt")


def is_on(network):
    return any("forward" in vars(block) for block in network.blocks())


def counting():
    """A backend that knows of no earlier compilation and counts its own."""
    torch._dynamo.reset()
    return CompileCounterWithBackend("eager")


def pretrain(folder, *callbacks, config=TINY, batches=None, **options):
    """The module and the losses of a short run, the same for the same arguments."""
    torch.manual_seed(0)
    module, losses = PretrainModule(config, "gray:8", lr=0.01, warmup_steps=0), Losses()
    options = {"max_epochs": 2, "enable_checkpointing": False} | options
    trainer = quiet_trainer(folder, callbacks=[*callbacks, losses], **options)
    trainer.fit(module, loader(24) if batches is None else batches, loader(12))
    return module, losses.values


def test_losses_are_those_of_the_uncompiled_network(tmp_path):
    for config in (TINY, BERT):
        _, want = pretrain(tmp_path, config=config)
        _, found = pretrain(tmp_path, CompileBlocks(True, backend="aot_eager"), config=config)
        assert found == pytest.approx(want, rel=1e-5)
        assert want[-1] < want[0]


def test_only_steps_of_training_run_compiled(tmp_path):
    """Validation, completions and an online probe have other shapes and modes, and would each compile anew."""
    backend = counting()
    callbacks = [CompileBlocks(True, backend=backend), CompletionGrid(n_images=2), OnlineProbe(num_classes=3)]
    pretrain(tmp_path, *callbacks)
    assert backend.frame_count == 1  # for both blocks, both passes, both epochs
    backend.clear()
    pretrain(tmp_path, CompileBlocks(True, backend=backend), batches=loader(28))
    assert backend.frame_count == 1  # for the smaller last batch, whatever its size


def test_nothing_of_it_remains(tmp_path):
    look = Look()
    module, _ = pretrain(tmp_path, look, CompileBlocks(True, backend="aot_eager"))
    assert look.was_on and not is_on(module.network) and not is_on(look.copy)
    names = list(PretrainModule(TINY, "gray:8").state_dict())
    assert list(module.state_dict()) == names
    loaded = load_pretrained(tmp_path / "part.ckpt").network
    assert all(torch.equal(mine, module.network.state_dict()[name]) for name, mine in loaded.state_dict().items())
    prompt = torch.zeros(2, 8, dtype=torch.int64)
    same = [complete(one, prompt, n_samples=2, generator=torch.manual_seed(0)) for one in (loaded, module.network)]
    assert torch.equal(*same)


def broken(*args):
    raise RuntimeError("cc1plus is not here")


BACKWARD = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=broken)


@pytest.mark.parametrize("backend", [broken, BACKWARD], ids=["forward", "backward"])
def test_a_broken_compiler_ends_no_run(tmp_path, backend, caplog):
    _, want = pretrain(tmp_path)
    torch._dynamo.reset()
    _, found = pretrain(tmp_path, CompileBlocks(True, backend=backend))
    assert found == want
    warned = [record.message for record in caplog.records if "torch.compile failed" in record.message]
    assert len(warned) == 1 and "cc1plus is not here" in warned[0]


def test_trying_the_compiler_leaves_gradients_and_random_numbers_alone(tmp_path):
    """Of dropout alone the compiled network may draw others; what the run draws beside it stays."""
    state = {}
    for name, callbacks in {"plain": [], "compiled": [CompileBlocks(True, backend="eager")]}.items():
        _, losses = pretrain(tmp_path, *callbacks, config={**TINY.to_dict(), "dropout": 0.1})
        state[name] = (losses, torch.get_rng_state())
    assert state["plain"][0] == pytest.approx(state["compiled"][0], rel=1e-5)
    assert torch.equal(state["plain"][1], state["compiled"][1])


def test_compiling_pays_in_long_runs():
    assert decide("cpu", 4e13, "bf16-mixed") == Decision(False, "about 7 minutes of work at 0.1 TFLOP/s")
    assert decide("cpu", 9e13, "bf16-mixed") == Decision(True, "about 15 minutes of work at 0.1 TFLOP/s")
    assert decide("cpu", 9e18, "32-true") == Decision(False, "saves nothing in 32-true on a CPU")
    assert decide("cuda", 4e16, "32-true") == Decision(False, "about 7 minutes of work at 100 TFLOP/s")
    assert decide("cuda", 4e18, "").how and not decide("cuda", None, "").how and not decide("mps", 1e30, "").how


@pytest.mark.parametrize("length", [{"max_epochs": 2}, {"max_steps": 30}], ids=["epochs", "steps"])
def test_a_resumed_run_decides_as_its_first_part_did(tmp_path, length):
    """The second part is reckoned as the whole run, wherever the first was cut."""

    class Stop(lightning.pytorch.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 10:
                trainer.save_checkpoint(tmp_path / "part.ckpt")
                trainer.should_stop = True

    network = {**TINY.to_dict(), "image_size": 8}
    reasons = []
    for more in ([Stop()], []):
        callback = CompileBlocks()
        trainer = quiet_trainer(
            tmp_path, callbacks=[callback, *more], limit_val_batches=0, **length, precision="bf16-mixed"
        )
        path = None if more else tmp_path / "part.ckpt"
        trainer.fit(PretrainModule(network, "gray:8"), PretrainDataModule("digits", batch_size=64), ckpt_path=path)
        reasons.append(callback.decision)
    assert reasons[0] == reasons[1] and "of work" in reasons[0].reason
