"""Signals of schedulers: the run saves after the optimizer step, exits, and resumes as if it had not been stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer

import lightning_igpt as igpt
from lightning_igpt.callbacks import Preempt
from tests.test_resume import CASES, ENDLESS, EPOCHS, assert_resumes, fit, pretraining


class Scheduler(Callback):
    """Sends this process a signal at a hook's n-th call."""

    def __init__(self, hook, at=0, name="SIGTERM"):
        self.calls = 0

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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_the_step_and_its_validation_are_finished_saved_and_continued(name, at, tmp_path):
    path = stopped(pretraining, ENDLESS, tmp_path, "on_train_batch_start", at, name)
    assert resumes(pretraining, ENDLESS, path) == at + 1


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
    module = igpt.ProbeModule(
        network={"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 4, "image_size": 8}, palette="gray:4", c=1.0
    )
    callbacks = [Scheduler("on_train_batch_start", 2), Preempt()]
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,
        default_root_dir=tmp_path,
        enable_progress_bar=False,
    )
    with pytest.raises(SystemExit):
        trainer.fit(module, igpt.ProbeDataModule("digits", batch_size=128))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_last_step_ends_the_run_as_planned(tmp_path):
    plain = fit(pretraining, ENDLESS)
    options = ENDLESS | {"default_root_dir": tmp_path}
    found = fit(pretraining, options, callbacks=[Scheduler("on_train_batch_start", 5), Preempt()])
    assert found[0].validations == plain[0].validations
    assert not list(tmp_path.iterdir())


def test_with_workers(tmp_path):
    path = stopped(lambda: pretraining(workers=2), ENDLESS, tmp_path, "on_train_batch_start", 3)
    assert resumes(pretraining, ENDLESS, path) == 4


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_an_evaluation_ends_at_once(verb):
    module, data = pretraining()
    hook = {"validate": "validation"}.get(verb, verb)
    callbacks = [Scheduler(f"on_{hook}_batch_start"), Preempt()]
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=callbacks, enable_progress_bar=False)
    data = igpt.PretrainDataModule("digits", batch_size=4, image_size=4)
    with pytest.raises(SystemExit) as stop:
        getattr(trainer, verb)(module, data)
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


class FakeSlurm:
    """What Lightning looks at to see that it runs under SLURM, and a scontrol that notes what it was called with."""

    def __init__(self, folder, monkeypatch):
        names = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "4711", "SLURM_PROCID": "0"}
        names |= {"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1"}
        for name, value in names.items():
            monkeypatch.setenv(name, value)
        (folder / "bin").mkdir()
        scontrol = folder / "bin" / "scontrol"
        scontrol.write_text(f'#!/bin/sh\necho "$@" >> {folder}/requeued\n')
        scontrol.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")


def test_slurm_requeues_the_job(tmp_path, monkeypatch):
    whole = fit(pretraining, ENDLESS)
    FakeSlurm(tmp_path, monkeypatch)
    root = tmp_path / "run"
    root.mkdir()
    options = ENDLESS | {"default_root_dir": root}
    with pytest.raises(SystemExit) as stop:
        fit(pretraining, options, callbacks=[Scheduler("on_train_batch_start", 1, "SIGUSR1"), Preempt()])
    assert stop.value.code == 143
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    again = fit(pretraining, options, callbacks=[Preempt()])  # Lightning finds hpc_ckpt_1.ckpt by itself
    assert again[0].losses == {batch: loss for batch, loss in whole[0].losses.items() if batch >= 2}


SCRIPT = """
import json, os, signal, sys, threading, time, torch
from lightning.pytorch import Callback
import lightning_igpt as igpt
from lightning_igpt.callbacks import Preempt
from tests.test_resume import Recorder, pretraining

class Slow(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.is_global_zero and batch_idx == 1:
            open("begun", "w").close()
        time.sleep(0.15)

    def on_validation_batch_start(self, trainer, module, *rest):
        if not trainer.sanity_checking:
            if trainer.is_global_zero:
                open("validating", "w").close()
            time.sleep(float(os.environ.get("SLOW_VALIDATION", "0")))

if __name__ == "__main__":
    ckpt = sys.argv[1] if len(sys.argv) > 1 else None
    open(f"pid-{os.environ.get('LOCAL_RANK', '0')}", "w").write(str(os.getpid()))
    torch.manual_seed(0)
    module, data = pretraining()
    recorder = Recorder()
    trainer = igpt.make_trainer(
        max_steps=8, val_check_interval=4, accelerator="cpu", devices=2, strategy="ddp", precision="32-true",
        logger=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=".",
        callbacks=[recorder, Slow(), Preempt()],
    )
    trainer.fit(module, data, ckpt_path=ckpt)
    with open(f"found-{trainer.global_rank}.json", "w") as file:
        json.dump([recorder.losses, recorder.validations], file)
"""


def launch(folder, *args, **environment):
    folder.mkdir(exist_ok=True)
    (folder / "script.py").write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root} | environment
    command = [sys.executable, "script.py", *args]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen(command, env=environment, cwd=folder, **options)


def results(process, folder):
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    return [json.loads((folder / f"found-{rank}.json").read_text()) for rank in (0, 1)]


def wait_for(path, process):
    end = time.monotonic() + 200
    while not path.exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end, f"{path.name} never came"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin")
    return results(launch(folder), folder)


@pytest.mark.marathon
@pytest.mark.slow
@pytest.mark.parametrize(
    "to, name, when",
    [("1", "SIGUSR1", "begun"), ("1", "SIGTERM", "validating")],
)
def test_two_processes(to, name, when, tmp_path, uninterrupted):
    process = launch(tmp_path / "run", SLOW_VALIDATION="1.5" if when == "validating" else "0")
    wait_for(tmp_path / "run" / when, process)
    pids = [int((tmp_path / "run" / f"pid-{rank}").read_text()) for rank in (0, 1)]
    os.kill(pids[int(to)], getattr(signal, name))
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 143, errors[-3000:]
    (path,) = (tmp_path / "run").rglob("preempted.ckpt")
    step = torch.load(path, weights_only=True)["global_step"]
    assert step == 4 if when == "validating" else 2 <= step <= 5
    again = results(launch(tmp_path / "run", str(path)), tmp_path / "run")
    for rank, (losses, validations) in enumerate(uninterrupted):
        assert again[rank][0] == {batch: loss for batch, loss in losses.items() if int(batch) >= step}
        assert again[rank][1] == {at: metrics for at, metrics in validations.items() if int(at) > step}
