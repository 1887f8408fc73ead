"""Bad steps stop a run, or are passed over, and never reach a file."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_igpt.callbacks import FiniteGuard, OnlineProbe
from lightning_igpt.callbacks.finite_guard import NonFiniteError
from lightning_igpt.checkpointing import AtomicCheckpointIO
from lightning_igpt.data import PretrainDataModule, ProbeDataModule
from lightning_igpt.modules import PretrainModule, ProbeModule
from lightning_igpt.objectives import next_pixel_loss
from lightning_igpt.optim import make_adam
from tests.image_files import tiny
from tests.modules.helpers import loader, quiet_trainer

NETWORK = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 4, "image_size": 4}
SOURCE = tiny(22)  # 20 to train on, 5 batches of 4 per pass
NAN, INF = math.nan, math.inf


class Poisoned(PretrainModule):
    """Something happens to the loss of the batch that holds a certain draw; draw 26 is in the seventh of 4."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        for draw in set(self.poison) & set(batch["sample"].tolist()):  # {draw: what becomes of the loss}
            loss = self.poison[draw](loss)
        return loss


def times(factor):
    return lambda loss: loss * factor


def plus(what):
    """A loss that is not finite, and a gradient that is."""
    return lambda loss: loss + what


class Losses(Callback):
    """The loss of each batch by the number of its first draw, and the learning rates."""

    def __init__(self):
        self.of, self.rates = {}, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.of[int(batch["sample"].min()) // 4] = outputs["loss"].item()
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def every(steps, **options):
    return ModelCheckpoint(filename="{step}", every_n_train_steps=steps, save_top_k=-1, **options)


def make_run(folder, *callbacks, poison=None, max_steps=12, lr=0.01, ckpt=None, **options):
    """A trainer, and what starts it."""
    torch.manual_seed(0)
    module = Poisoned(NETWORK, "gray:4", lr=lr, warmup_steps=0)
    module.poison = poison or {}
    options = {"plugins": AtomicCheckpointIO(), "num_sanity_val_steps": 0, "limit_val_batches": 0} | options
    checkpoints = any(isinstance(one, Checkpoint) for one in callbacks)
    options |= {"enable_checkpointing": checkpoints, "max_steps": max_steps}
    trainer = quiet_trainer(folder, callbacks=list(callbacks), **options)
    data = PretrainDataModule(SOURCE, batch_size=4, image_size=4)
    return trainer, lambda: trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)


def run(folder, *callbacks, **options):
    """Losses by batch, and the trainer after it."""
    losses = Losses()
    trainer, start = make_run(folder, *callbacks, losses, **options)
    start()
    return losses, trainer


def fails(folder, *callbacks, **options):
    """The message, and the trainer after it."""
    trainer, start = make_run(folder, *callbacks, **options)
    with pytest.raises(NonFiniteError) as caught:
        start()
    return str(caught.value), trainer


def files(folder):
    """(steps, file) of every checkpoint under a folder, none of which may hold anything that is not finite."""
    found = {path: torch.load(path, weights_only=True) for path in sorted(folder.rglob("*.ckpt"))}
    for path, checkpoint in found.items():
        moments = [state for one in checkpoint.get("optimizer_states", []) for state in one["state"].values()]
        tensors = [*checkpoint["state_dict"].values(), *(value for state in moments for value in state.values())]
        assert all(bool(tensor.isfinite().all()) for tensor in tensors), path
    return sorted((checkpoint["global_step"], path.stem) for path, checkpoint in found.items())


def same(one, other):
    mine, others = one.lightning_module.state_dict(), other.lightning_module.state_dict()
    return all(torch.equal(value, others[name]) for name, value in mine.items())


@pytest.mark.parametrize("check_every, factor", [(None, NAN), (5, NAN), (100, INF)])
def test_a_bad_step_stops_the_run_and_reaches_no_file(tmp_path, check_every, factor):
    checkpoints = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_last=True)
    message, trainer = fails(tmp_path, FiniteGuard(check_every=check_every), checkpoints, poison={26: times(factor)})
    assert trainer.global_step == 7
    assert files(tmp_path) == [(6, "last"), (6, "step=6")]
    assert re.match(r"optimiser step 7: (loss and )?gradient not finite\nloss (nan|inf), gradient norm nan, ", message)
    assert "learning rate 0.005\nsamples 24, 25, 26, 27\n" in message  # the cosine's middle
    assert f"The last good checkpoint is {tmp_path / 'last.ckpt'}. Lower lr, set or lower grad" in message


def test_steps_wait_for_the_next_look_but_files_do_not(tmp_path):
    message, trainer = fails(tmp_path, FiniteGuard(check_every=5), poison={26: times(NAN)})
    assert trainer.global_step == 10 and message.startswith("optimiser step 7: ")
    assert "No checkpoint was written so far" in message
    message, trainer = fails(tmp_path, FiniteGuard(check_every=5), every(4), poison={26: times(NAN)})
    assert trainer.global_step == 8 and message.startswith("optimiser step 7: ")
    assert files(tmp_path) == [(4, "step=4")]


def test_validation_and_the_end_look_too(tmp_path):
    class Validated(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            assert trainer.global_step < 7

    options = {"limit_val_batches": 1, "val_check_interval": 4, "check_val_every_n_epoch": None}
    guard = FiniteGuard(check_every=100)
    assert fails(tmp_path, guard, Validated(), poison={26: times(NAN)}, **options)[1].global_step == 8
    assert fails(tmp_path, guard, poison={26: times(NAN)}, max_steps=9)[1].global_step == 9
    final = ModelCheckpoint(tmp_path, "final", save_on_train_epoch_end=True)
    fails(tmp_path, guard, final, poison={26: times(NAN)}, max_steps=9)
    assert not files(tmp_path)


def test_files_of_weights_alone_are_guarded_too(tmp_path):
    fails(tmp_path, FiniteGuard(check_every=100), every(1, save_weights_only=True), poison={26: times(NAN)})
    assert [steps for steps, _ in files(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_an_update_that_overflows_is_found_though_loss_and_gradient_are_finite(tmp_path):
    message, _ = fails(tmp_path, FiniteGuard(), every(1), lr=1e39, gradient_clip_val=1.0)
    assert message.startswith("optimiser step 1: the weights are not finite after it\nloss 1.3")
    assert not files(tmp_path)
    message, _ = fails(tmp_path, FiniteGuard(), lr=1e39, max_steps=1)  # without a file, too
    assert message.startswith("optimiser step 1: the weights are not finite after it")


class Saver(Callback):
    """Saves by hand, wherever it stands in the list of callbacks."""

    def __init__(self, folder, fail_at=None):
        self.folder, self.fail_at = folder, fail_at

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.fail_at:
            raise RuntimeError("power cut")
        if self.fail_at is None:
            trainer.save_checkpoint(self.folder / f"by-hand-{trainer.global_step}.ckpt")

    def on_exception(self, trainer, *_):
        trainer.save_checkpoint(self.folder / "emergency.ckpt")


def test_whoever_saves_and_whenever(tmp_path):
    """First in the list, before the guard has seen the step's end."""
    message, _ = fails(tmp_path, Saver(tmp_path), FiniteGuard(), poison={26: times(NAN)})
    assert message.startswith("optimiser step 7: ")
    assert [steps for steps, _ in files(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("poison", [{26: times(NAN)}, {}], ids=["bad", "good"])
def test_after_an_error_good_states_are_saved_and_bad_ones_not(tmp_path, poison):
    """The error arrives that there was, even where a bad step had not been read yet."""
    (tmp_path / "a").mkdir()
    savers = [Saver(tmp_path / "a", fail_at=8), FiniteGuard(check_every=100)]
    checkpoints = [every(5, save_on_exception=True, dirpath=tmp_path), OnExceptionCheckpoint(tmp_path / "b")]
    for callbacks in ([savers[0], savers[1]], [savers[1], savers[0], checkpoints[0]], [*savers, checkpoints[1]]):
        _, start = make_run(tmp_path, *callbacks, poison=poison)
        with pytest.raises(RuntimeError, match="power cut"):
            start()
    saved = {(5, "step=5")} | (set() if poison else {(8, "step=8"), (8, "emergency"), (8, "on_exception")})
    assert set(files(tmp_path)) == saved


def test_weights_that_cannot_be_read_hide_no_error(tmp_path):
    class Broken(Saver):
        """After a failure of the device, whatever reads its memory fails."""

        def on_exception(self, trainer, *_):
            trainer.optimizers[0].param_groups[0]["params"].append(torch.nn.Parameter(torch.empty(3, device="meta")))
            super().on_exception(trainer)

    _, start = make_run(tmp_path, Broken(tmp_path, fail_at=3), FiniteGuard())
    with pytest.raises(RuntimeError, match="power cut"):
        start()
    assert not files(tmp_path)


def test_checkpoint_callbacks_are_not_asked_after_an_error_and_lightning_cleans_up(tmp_path):
    guard, checkpoints = FiniteGuard(), every(5, save_on_exception=True, dirpath=tmp_path)
    _, trainer = fails(tmp_path, guard, checkpoints, poison={26: times(NAN)})
    assert trainer.state.stage is None  # set at the very end of Lightning's clean-up
    assert checkpoints.save_on_exception is False
    with pytest.raises(NonFiniteError, match="optimiser step 7"):
        trainer.save_checkpoint(tmp_path / "later.ckpt")
    assert files(tmp_path) == [(5, "step=5")]
    _, start = make_run(tmp_path, guard, checkpoints)
    start()
    assert checkpoints.save_on_exception is True
    assert files(tmp_path) == [(5, "step=5"), (10, "step=10")]


def test_patience_counts_bad_steps_in_a_row(tmp_path):
    once, apart, twice = {26: plus(INF)}, {26: plus(INF), 34: plus(INF)}, {26: plus(INF), 30: plus(-INF)}
    message, _ = fails(tmp_path, FiniteGuard(), poison=once)
    assert message.startswith("optimiser step 7: loss not finite\nloss inf, gradient norm 1.")
    for check_every, survived in ((1, once), (100, apart)):
        guard = FiniteGuard(patience=2, check_every=check_every)
        assert run(tmp_path, guard, poison=survived)[1].global_step == 12
        message, _ = fails(tmp_path, guard, poison=twice)
        assert message.startswith("optimiser step 7: loss not finite, 2 steps in a row\nloss inf")
    fails(tmp_path, FiniteGuard(patience=2), every(1), poison=once)  # nothing to save
    assert [steps for steps, _ in files(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_all_micro_batches_are_named(tmp_path):
    message, trainer = fails(tmp_path, FiniteGuard(), poison={26: times(NAN)}, accumulate_grad_batches=3)
    assert trainer.global_step == 3
    lines = message.splitlines()
    assert lines[0] == "optimiser step 3: loss and gradient not finite" and lines[1].startswith("loss nan, ")
    assert lines[2] == "micro-batch 1 of 3: loss nan, samples 24, 25, 26, 27"
    assert re.fullmatch(r"micro-batch 3 of 3: loss 1\.\d+, samples 32, 33, 34, 35", lines[4])  # undivided


def test_numbers_are_those_of_the_step(tmp_path):
    """Of all processes and micro-batches, before clipping."""
    seen = {}

    class Look(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            seen["norm"] = torch.cat([one.grad.flatten() for one in pl_module.parameters()]).norm().item()
            if trainer.global_step == 3:
                pl_module.poison = {trained: plus(NAN) for trained in range(100)}

    message, _ = fails(tmp_path, Look(), FiniteGuard(), accumulate_grad_batches=2, gradient_clip_val=0.001)
    assert message.startswith("optimiser step 5: loss not finite")
    assert f"gradient norm {seen['norm']:.4g}," in message


def test_loaders_need_not_number_their_samples(tmp_path):
    class Broken(PretrainModule):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * NAN

    module = Broken({**NETWORK, "vocab_size": 8}, "gray:8")
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=[FiniteGuard()])  # with Lightning's own CheckpointIO
    with pytest.raises(NonFiniteError, match=r"samples without numbers\nThe checkpoints that this run wrote are good"):
        trainer.fit(module, loader())


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}], ids=["", "more"])
def test_a_good_run_is_what_it_would_be_without(tmp_path, options):
    want, plain = run(tmp_path, **options)
    for guard in (FiniteGuard(), FiniteGuard(check_every=5, rewind=True, spike=100, window=2)):
        found, guarded = run(tmp_path, guard, every(3), **options)
        assert found.of == want.of and same(guarded, plain)


class Reads(TorchDispatchMode):
    """Counts how often a number on the device is asked for."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.count += name in ("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal")
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_between_looks(tmp_path):
    def reads(*callbacks):
        _, start = make_run(tmp_path, *callbacks, max_steps=19)
        with Reads() as seen:
            start()
        return seen.count

    guard = FiniteGuard(check_every=20)
    assert reads(guard) == reads() + 1  # the weights, at the end; the losses come as one list
    assert guard._judged.number == 19


def cosine(steps, lr=0.01, total=12):
    """The learning rate after so many steps."""
    return lr * (1 + math.cos(math.pi * steps / total)) / 2


def test_rewind_goes_back_to_the_checkpoint_and_on_with_the_next_batches(tmp_path, caplog):
    batches = {}

    class Keep(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            batches[batch_idx] = batch

    found, trainer = run(
        tmp_path, FiniteGuard(rewind=True), every(5, dirpath=tmp_path), Keep(), poison={26: times(NAN)}
    )
    assert trainer.global_step == 12 and found.rates == pytest.approx([cosine(steps) for steps in range(1, 13)])
    warned = [
        record.getMessage() for record in caplog.records if record.name == "lightning_igpt.callbacks.finite_guard"
    ]
    assert len(warned) == 1 and warned[0].startswith("optimiser step 7: ") and "samples 24, 25, 26, 27" in warned[0]
    assert warned[0].endswith(f"Back to {tmp_path / 'step=5.ckpt'} and on with the next batches, 1 of at most 3.")
    # By hand: of steps 6 and 7 nothing is left but their place in the schedule.
    checkpoint = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    module = PretrainModule(NETWORK, "gray:4")
    module.load_state_dict(checkpoint["state_dict"])
    optimizer = make_adam(module.network.parameters(), lr=0.01, betas=module.betas, weight_decay=0.0)
    optimizer.load_state_dict(checkpoint["optimizer_states"][0])
    for number in range(7, 12):
        for group in optimizer.param_groups:
            group["lr"] = found.rates[number - 1]
        tokens = module.tokens_of(batches[number])
        loss = next_pixel_loss(module.network(tokens), tokens)
        assert found.of[number] == loss.item(), number
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mine = module.state_dict()
    assert all(torch.equal(value, mine[name]) for name, value in trainer.lightning_module.state_dict().items())


TWINS = {
    "nan": ({}, {}),
    "read late": ({"check_every": 4}, {}),
    "accumulating": ({"check_every": 2}, {"accumulate_grad_batches": 2, "max_steps": 9}),
    "spike": ({"spike": 4.0, "window": 5}, {}),
    "two": ({"patience": 2}, {}),
}
POISON = {"spike": {26: times(30)}, "two": {26: times(NAN), 38: times(NAN)}}


def guard_for(name):
    return FiniteGuard(rewind=True, **TWINS[name][0])


@pytest.mark.parametrize("name", TWINS)
def test_a_resumed_run_rewinds_as_its_uninterrupted_twin(tmp_path, name):
    options = {"poison": POISON.get(name, {26: times(NAN)}), **TWINS[name][1]}
    guard = guard_for(name)
    whole, _ = run(tmp_path, guard, every(3, dirpath=tmp_path / "a"), **options)
    assert guard._rewinds == (2 if name == "two" else 1)
    saved = [path for _, path in sorted((int(path.stem[5:]), path) for path in (tmp_path / "a").iterdir())]
    last = torch.load(saved[-1], weights_only=True)
    assert last["callbacks"]["FiniteGuard"]["rewinds"] == guard._rewinds
    for path in saved[1:-1]:  # before, at and after the first rewind
        part, _ = run(tmp_path, guard_for(name), every(3, dirpath=tmp_path / path.stem), ckpt=path, **options)
        assert part.of and repr(part.of) == repr({batch: whole.of[batch] for batch in part.of}), path.stem
        again = torch.load(tmp_path / path.stem / saved[-1].name, weights_only=True)
        assert again["callbacks"]["FiniteGuard"] == last["callbacks"]["FiniteGuard"]
        for parts in ((again["state_dict"], last["state_dict"]), moments(again, last)):
            assert all(torch.equal(value, parts[1][key]) for key, value in parts[0].items()), path.stem


def moments(*checkpoints):
    """Optimiser states with flat keys."""
    states = [checkpoint["optimizer_states"][0]["state"].items() for checkpoint in checkpoints]
    return [{(number, key): value for number, one in state for key, value in one.items()} for state in states]


def test_a_spike_is_passed_over_like_a_step_that_is_not_finite(tmp_path):
    options = {"max_steps": 12}
    plain, _ = run(tmp_path / "a", FiniteGuard(rewind=True), every(5), poison={26: times(NAN)}, **options)
    guard = FiniteGuard(rewind=True, spike=4, window=6)
    found, _ = run(tmp_path / "b", guard, every(5), poison={26: times(30)}, **options)
    assert {batch: found.of[batch] for batch in range(7, 12)} == {batch: plain.of[batch] for batch in range(7, 12)}
    assert list(guard._losses) == [found.of[batch] for batch in (3, 4, 7, 8, 9, 10, 11)][-6:]  # 5 and 6 never were
    guard = FiniteGuard(rewind=True, spike=4, window=7)
    run(tmp_path / "c", guard, every(5), poison={26: times(30)}, **options)
    assert guard._rewinds == 0  # too few losses yet
    message, _ = fails(tmp_path / "d", FiniteGuard(rewind=True, spike=4, window=6), poison={26: times(30)})
    assert re.match(
        r"optimiser step 7: a spike; the last 6 losses have mean 1\.\d+ and deviation 0\.\d+\nloss 3", message
    )


def test_where_there_is_no_way_back_the_run_stops(tmp_path):
    bad, guard = {"poison": {26: times(NAN)}}, FiniteGuard(rewind=True)
    assert (
        "No checkpoint was written so far; without one there is no way back. Lower" in fails(tmp_path, guard, **bad)[0]
    )
    message, _ = fails(tmp_path, guard, every(5, save_weights_only=True), **bad)
    assert "step=5.ckpt; it holds weights alone, without the optimiser. Lower" in message

    class Gone(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 6:
                (tmp_path / "a" / "step=5.ckpt").unlink()

    message, _ = fails(tmp_path, guard, every(5, dirpath=tmp_path / "a"), Gone(), **bad)
    assert "step=5.ckpt; it cannot be read: " in message
    trainer, start = make_run(tmp_path, guard, every(5, dirpath=tmp_path / "b"), max_steps=6)
    start()
    trainer.fit_loop.epoch_loop.max_steps, broken = 12, Poisoned(NETWORK, "gray:4")
    broken.poison = dict.fromkeys(range(100), times(NAN))
    with pytest.raises(NonFiniteError, match="No checkpoint was written so far"):  # files of another run do not count
        trainer.fit(broken, PretrainDataModule(SOURCE, image_size=4, batch_size=4))


def test_rewinds_are_counted_over_all_parts_of_a_run(tmp_path):
    options = {"poison": {26: times(NAN), 42: times(NAN)}, "max_steps": 12}
    message, _ = fails(tmp_path, FiniteGuard(rewind=True, max_rewinds=1), every(2, dirpath=tmp_path / "a"), **options)
    assert message.startswith("optimiser step 11: ") and "gone back 1 times, and max_rewinds is 1" in message
    path = tmp_path / "a" / "step=8.ckpt"
    assert fails(tmp_path, FiniteGuard(rewind=True, max_rewinds=1), ckpt=path, **options)[0] == message.replace(
        "10.", "8."
    )


def test_rewind_inside_validation_and_an_accumulation_window(tmp_path):
    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "one.ckpt")

    options = {"val_check_interval": 4, "check_val_every_n_epoch": None, "limit_val_batches": 1}
    options |= {"accumulate_grad_batches": 3, "max_steps": 5, "poison": {18: times(NAN)}}
    guard = FiniteGuard(check_every=100, rewind=True)
    found, trainer = run(tmp_path, guard, Save(), **options)
    bad = [batch for batch, loss in found.of.items() if not math.isfinite(loss)]
    assert guard._rewinds == 1 and bad == [4, 6, 7]  # the next is trained on with the weights of one.ckpt
    steps = {int(state["step"]) for state in trainer.optimizers[0].state.values()}
    assert steps == {4} and trainer.global_step == 5


def test_an_online_probe_goes_back_too(tmp_path):
    probe, guard = OnlineProbe(num_classes=2), FiniteGuard(check_every=4, rewind=True)
    run(tmp_path, probe, guard, every(4), poison={26: times(NAN)})
    assert guard._rewinds == 1 and all(bool(value.isfinite().all()) for value in probe._head.state_dict().values())


def test_a_scaler_may_skip_steps(tmp_path):
    """Its first scales overflow the gradients; that is how it finds the right one."""

    def scaled():
        return [
            AtomicCheckpointIO(),
            MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**19)),
        ]

    guard = FiniteGuard()
    want, _ = run(tmp_path, plugins=scaled())
    found, _ = run(tmp_path, guard, every(3), plugins=scaled())
    assert found.of == want.of and len(set(found.of.values())) > 6
    message, _ = fails(tmp_path, guard, poison={26: plus(INF)}, plugins=scaled())
    assert message.startswith(
        "optimiser step 7: loss not finite\nloss inf, gradient norm left out under a GradScaler, "
    )
    guard = FiniteGuard(patience=2)
    run(tmp_path, guard, every(1), poison={26: times(NAN)}, plugins=scaled())  # the scaler keeps the weights
    assert (7, "step=7") in files(tmp_path)
    message, _ = fails(tmp_path, guard, poison={26: times(NAN), 30: times(NAN)}, plugins=scaled())
    assert re.match(r"optimiser step 7: loss not finite, 2 steps in a row\nloss nan, .*\nsamples 24, 25", message)


def test_the_loss_is_told_without_its_scale(tmp_path):
    plugins = [AtomicCheckpointIO(), MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    options = {"poison": {26: times(NAN)}, "plugins": plugins, "accumulate_grad_batches": 3}
    message, _ = fails(tmp_path, FiniteGuard(), **options)
    assert re.search(r"micro-batch 3 of 3: loss 1\.\d+,", message)


def test_a_probe_by_hand_is_left_alone(tmp_path):
    def probed(*callbacks):
        torch.manual_seed(0)
        module = ProbeModule(network=NETWORK, palette="gray:4", layers=[1])
        trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=list(callbacks), logger=False)
        trainer.fit(module, ProbeDataModule(SOURCE, batch_size=4, image_size=4))
        return module

    guard = FiniteGuard(rewind=True)
    want, found = probed(), probed(guard)
    assert torch.equal(found.weight, want.weight) and found.weight.any()
    assert guard._judged is None and not guard.state_dict()["losses"]


def test_validation_alone_is_left_alone(tmp_path):
    trainer, _ = make_run(tmp_path, FiniteGuard(), limit_val_batches=1)
    module = PretrainModule(NETWORK, "gray:4")
    torch.nn.init.constant_(module.network.wpe.weight, NAN)
    data = PretrainDataModule(SOURCE, batch_size=4, image_size=4)
    assert math.isnan(trainer.validate(module, data, verbose=False)[0]["val/nats_per_pixel"])


def test_the_trainer_is_as_it_was_and_still_guarded_after_the_run(tmp_path):
    _, trainer = run(tmp_path, FiniteGuard())
    assert "save_checkpoint" not in vars(trainer)
    trainer.save_checkpoint(tmp_path / "good.ckpt")
    torch.nn.init.constant_(trainer.lightning_module.network.wpe.weight, INF)
    with pytest.raises(NonFiniteError, match="optimiser step 12: the weights are not finite after it"):
        trainer.save_checkpoint(tmp_path / "bad.ckpt")
    assert files(tmp_path) == [(12, "good")]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"patience": 0}, "patience is 0; it must be at least 1"),
        ({"check_every": 0}, "check_every is 0; it must be at least 1"),
        ({"window": 0}, "window is 0"),
        ({"max_rewinds": 0}, "max_rewinds is 0"),
        ({"rewind": True, "spike": 0}, "spike is 0; it must be above 0"),
        ({"spike": 3.0}, "spike is 3.0, but a spike is no reason to stop; set rewind=True"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FiniteGuard(**options)


def test_trainers_that_cannot_go_back_are_refused(tmp_path):
    for callbacks, options, message in (
        ([], {"plugins": []}, "TorchCheckpointIO does not tell"),
        ([EMAWeightAveraging()], {}, "does not reach the averages of EMAWeightAveraging"),
    ):
        _, start = make_run(tmp_path, FiniteGuard(rewind=True), *callbacks, **options)
        with pytest.raises(ValueError, match=message):
            start()


SCRIPT = """
import sys
import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from tests.callbacks import test_finite_guard as tests

class Here(pl.Callback):
    def on_train_start(self, trainer, module):
        if trainer.global_rank == 0:
            module.poison = {}  # the other process alone has the bad batch

def shard(module):
    for part in (*module.network.blocks(), module.network):
        fully_shard(part, mesh=module.device_mesh["data_parallel"])

if __name__ == "__main__":
    folder, rewind, strategy = sys.argv[1], sys.argv[2] == "rewind", sys.argv[3]
    if strategy == "sharded":
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
        tests.Poisoned.configure_model = shard
    guard = tests.FiniteGuard(rewind=rewind, check_every=3)
    saver = ModelCheckpoint(folder, "{step}", every_n_train_steps=5, save_top_k=-1, save_on_exception=True)
    poison = {draw: tests.plus(float("inf")) for draw in range(60, 68)}  # finite gradients: the other sees nothing
    options = {"devices": 2, "strategy": strategy, "poison": poison, "use_distributed_sampler": False}
    trainer, start = tests.make_run(folder, guard, saver, Here(), **options)
    start()
    weights = sum(one.double().sum().item() for one in trainer.lightning_module.parameters())
    print(f"FOUND {trainer.global_rank} {trainer.global_step} {guard._rewinds} {weights!r}", flush=True)
"""


def two_processes(folder, *arguments):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(folder), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=folder)


@pytest.mark.marathon
@pytest.mark.slow
def test_all_processes_stop_together(tmp_path):
    said = {}
    for strategy in ("ddp", "sharded"):
        folder = tmp_path / strategy
        folder.mkdir()
        done = two_processes(folder, "stop", strategy)
        assert done.returncode != 0 and "FOUND" not in done.stdout
        assert [saved for saved, _ in files(folder)] == [5], strategy
        lines = [line.partition("]: ")[2] for line in done.stderr.splitlines()]
        starts = [number for number, line in enumerate(lines) if "NonFiniteError: optimiser step 7 (process" in line]
        said[strategy] = {lines[number + 1] for number in starts}
        assert f"The last good checkpoint is {folder / 'step=5.ckpt'}" in done.stderr
    assert len(said["ddp"]) == 2 and any(line.startswith("loss inf, gradient norm 2.5") for line in said["ddp"])
    assert said["sharded"] == said["ddp"]  # of sharded gradients, too, the norm is that of the whole


@pytest.mark.marathon
@pytest.mark.slow
def test_all_processes_go_back_together(tmp_path):
    done = two_processes(tmp_path, "rewind", "ddp")
    found = sorted(line.split(maxsplit=2) for line in done.stdout.splitlines() if line.startswith("FOUND"))
    assert done.returncode == 0 and [rank for _, rank, _ in found] == ["0", "1"], done.stderr[-3000:]
    assert found[0][2] == found[1][2] and found[0][2].startswith("12 1 ")
    assert "optimiser step 7 (process 1 of 2): loss not finite\nloss inf, " in done.stderr
