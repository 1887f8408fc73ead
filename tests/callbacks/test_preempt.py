"""Signals of schedulers: the run saves after the optimizer step, exits, and resumes as if it had not been stopped."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback

import lightning_igpt as igpt
from lightning_igpt.callbacks import Preempt
from tests.modules.helpers import quiet_trainer
from tests.processes import in_processes
from tests.test_resume import CASES, ENDLESS, EPOCHS, assert_resumes, fit, pretraining


class Scheduler(Callback):
    """Sends this process a signal at a hook's n-th call."""

    def __init__(self, hook, at=0, name="SIGTERM"):
        self.calls = 0
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C

        def send(*args):
            if self.calls == at:
                os.kill(os.getpid(), getattr(signal, name))
            self.calls += 1

        setattr(self, hook, send)


def stopped(make, options, folder, *where, status=143, **preempt):
    with pytest.raises(SystemExit) as stop:
        fit(make, options | {"default_root_dir": folder}, callbacks=[Scheduler(*where), Preempt(**preempt)])
    assert stop.value.code == status
    return folder / "preempted.ckpt"


def resumes(make, options, path):
    """Whether a run resumed from the file equals its twin, and owes no validation."""
    whole, saved = fit(make, options), torch.load(path, weights_only=True)
    done = saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    event = "validation" if saved["global_step"] in whole[0].validations else "step"
    assert_resumes(make, options, whole, path.rename(path.parent / f"{event}-{done}.ckpt"))
    return done


@pytest.mark.parametrize(
    ("name", "at", "workers"),
    [(name, at, 0) for name in ("SIGTERM", "SIGUSR1", "SIGINT") for at in (0, 2, 4)] + [("SIGTERM", 3, 2)],
)
def test_the_step_and_its_validation_are_finished_saved_and_continued(name, at, workers, tmp_path):
    where, status = ("on_train_batch_start", at, name), 1 if name == "SIGINT" else 143  # 1 is Lightning's
    path = stopped(lambda: pretraining(workers=workers), ENDLESS, tmp_path, *where, status=status)
    assert resumes(pretraining, ENDLESS, path) == at + 1


def test_the_second_ctrl_c_stops_at_once(tmp_path):
    callbacks = [
        Scheduler("on_train_batch_start", 1, "SIGINT"),
        Scheduler("on_before_backward", 1, "SIGINT"),
        Preempt(),
    ]
    with pytest.raises(SystemExit):
        fit(pretraining, ENDLESS | {"default_root_dir": tmp_path}, callbacks=callbacks)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", ["ar, dropout, accumulating", "fine-tuning, accumulating, dropout"])
@pytest.mark.parametrize("at", [3, 4, 5])
def test_a_window_of_accumulation_is_finished(case, at, tmp_path):
    make, options = CASES[case]
    path = stopped(make, options, tmp_path, "on_train_batch_start", at)
    assert resumes(make, options, path) == 6


@pytest.mark.parametrize("make, options", [(pretraining, ENDLESS), (CASES["fine-tuning, dropout"][0], EPOCHS)])
def test_a_validation_is_finished_first(make, options, tmp_path):
    path = stopped(make, options, tmp_path, "on_validation_batch_start", 1)  # the sanity check has one batch
    assert resumes(make, options, path) == 3


def test_features_that_lbfgs_collects_are_not_saved_for_training(tmp_path):
    network = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 4, "image_size": 8}
    module = igpt.ProbeModule(network=network, palette="gray:4", c=1.0)
    callbacks = [Scheduler("on_train_batch_start", 2), Preempt()]
    trainer = quiet_trainer(tmp_path, max_epochs=1, callbacks=callbacks)
    with pytest.raises(SystemExit):
        trainer.fit(module, igpt.ProbeDataModule("digits", batch_size=128))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_last_step_ends_the_run_as_planned(tmp_path):
    plain = fit(pretraining, ENDLESS)
    options = ENDLESS | {"default_root_dir": tmp_path}
    found = fit(pretraining, options, callbacks=[Scheduler("on_train_batch_start", 5), Preempt()])
    assert found[0].validations == plain[0].validations
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_an_evaluation_ends_at_once(verb, tmp_path):
    module, _ = pretraining()
    hook = {"validate": "validation"}.get(verb, verb)
    callbacks = [Scheduler(f"on_{hook}_batch_start"), Preempt()]
    data = igpt.PretrainDataModule("digits", batch_size=4, image_size=4)
    with pytest.raises(SystemExit) as stop:
        getattr(quiet_trainer(tmp_path, callbacks=callbacks), verb)(module, data)
    assert stop.value.code == 143


def test_handlers_are_put_back(tmp_path):
    term = signal.getsignal(signal.SIGTERM)
    mine = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        handler = signal.getsignal(signal.SIGUSR1)
        stopped(pretraining, ENDLESS, tmp_path, "on_train_batch_start", 1, "SIGUSR1", status=7, exit_status=7)
        assert signal.getsignal(signal.SIGUSR1) is handler
        assert signal.getsignal(signal.SIGTERM) is term
    finally:
        signal.signal(signal.SIGUSR1, mine)


def test_slurm_requeues_the_job(tmp_path, monkeypatch):
    whole = fit(pretraining, ENDLESS)
    names = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "4711", "SLURM_PROCID": "0"}
    names |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
    for name, value in (names | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}).items():
        monkeypatch.setenv(name, value)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    root = tmp_path / "run"
    root.mkdir()
    options = ENDLESS | {"default_root_dir": root}
    with pytest.raises(SystemExit) as stop:
        fit(pretraining, options, callbacks=[Scheduler("on_train_batch_start", 1, "SIGUSR1"), Preempt()])
    assert stop.value.code == 143
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    again = fit(pretraining, options, callbacks=[Preempt()])  # Lightning finds hpc_ckpt_1.ckpt by itself
    assert again[0].losses == {batch: loss for batch, loss in whole[0].losses.items() if batch >= 2}


def test_a_signal_to_one_process_stops_both_after_the_same_step(tmp_path):
    options = ENDLESS | {"devices": 2, "strategy": "ddp", "default_root_dir": tmp_path}

    def work(rank):
        whole, *_ = fit(pretraining, options)
        callbacks = [Scheduler("on_train_batch_start", 1)] if rank else []
        with pytest.raises(SystemExit) as stop:
            fit(pretraining, options, callbacks=[*callbacks, Preempt()])
        assert stop.value.code == 143
        again, *_ = fit(pretraining, options, ckpt=tmp_path / "preempted.ckpt")
        assert again.losses == {step: losses for step, losses in whole.losses.items() if step >= 2}
        assert again.validations == whole.validations

    assert in_processes(work) == [0, 0]
