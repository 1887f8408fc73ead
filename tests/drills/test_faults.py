"""What goes wrong on a cluster, done to real processes; ``--resume auto`` then ends where an undisturbed run ends."""

import os
import random
import re
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
import torch

from lightning_igpt.checkpointing import AtomicCheckpointIO, find_checkpoint
from tests.drills.run import Run, assert_same_end

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def twin(tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("twin"))
    run.finish_as_users_do()
    return run


def test_killed_twice(tmp_path, twin):
    run = Run(tmp_path)
    for name in ("step=10.ckpt", "step=20.ckpt"):
        process = run.start("--resume", "auto", pace=0.05)
        run.wait_for(name, process)
        process.kill()
        process.communicate()
    assert "Restored all states" in run.finish("--resume", "auto")
    assert_same_end(run, twin)


def test_told_to_stop(tmp_path, twin):
    run = Run(tmp_path)
    process = run.start("--resume", "auto", "--data.init_args.num_workers", "2", pace=0.05)
    run.wait_for("step=5.ckpt", process)
    os.killpg(process.pid, signal.SIGTERM)  # the loader's workers too, as schedulers do
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 143, out[-3000:]
    (path,) = (path for path in run.checkpoints() if path.name == "preempted.ckpt")
    assert str(path.relative_to(tmp_path)) in out
    run.finish("--resume", "auto")
    assert_same_end(run, twin)


def test_the_disk_is_full(tmp_path, twin):
    run = Run(tmp_path)
    process = run.start(pace=0.05)
    run.wait_for("step=5.ckpt", process)
    process.kill()
    process.communicate()
    (saved,) = run.checkpoints()
    limits = {resource.RLIMIT_FSIZE: saved.stat().st_size - 1000}
    out = run.finish("--resume", "auto", "--trainer.logger", "false", status=1, limits=limits)
    assert re.search(r"step=\d+.ckpt could not be saved.*: [\d,]+ bytes of it were written, [\d,]+ are free", out)
    assert find_checkpoint(tmp_path / "run") == saved
    assert not list((tmp_path / "run").rglob(".*.tmp"))
    run.finish("--resume", "auto")
    assert_same_end(run, twin)


def test_a_worker_is_killed(tmp_path, twin):
    run = Run(tmp_path)
    process = run.start("--data.init_args.num_workers", "2", pace=0.05)
    run.wait_for("step=5.ckpt", process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    out, _ = process.communicate(timeout=120)
    # torch names the signal, unless the kill comes while it waits for the worker's answer
    assert process.returncode not in (0, None)
    assert any(words in out for words in ("killed by signal", "Connection reset by peer", "EOFError"))
    run.finish("--resume", "auto", "--data.init_args.num_workers", "1")
    assert_same_end(run, twin)


def test_the_newest_checkpoint_is_damaged(tmp_path, twin):
    run = Run(tmp_path)
    process = run.start(pace=0.05)
    run.wait_for("step=15.ckpt", process)
    process.send_signal(signal.SIGTERM)
    process.communicate()
    older, newest = run.checkpoints()
    content = bytearray(newest.read_bytes())
    place = content.index(b"PK", len(content) // 2) - 40  # in the last bytes of a tensor
    content[place] ^= 1
    newest.write_bytes(content)
    os.utime(newest)
    out = run.finish("--resume", "auto")
    assert "is damaged" in out and re.search(rf"Restored all states from .*{older.relative_to(tmp_path)}\n", out)
    assert_same_end(run, twin)


def test_killed_at_twenty_moments_of_a_save(tmp_path, monkeypatch):
    """Temporary files lie on another file system, where there is one: stock Lightning loses checkpoints so."""
    elsewhere = Path("/dev/shm")
    if elsewhere.is_dir() and os.stat(elsewhere).st_dev != os.stat(tmp_path).st_dev:
        monkeypatch.setenv("TMPDIR", str(elsewhere))
        monkeypatch.setattr(tempfile, "tempdir", None)
    path, draws = tmp_path / "run" / "last.ckpt", random.Random(0)
    state = {"weights": torch.zeros(500_000), "step": 0}
    AtomicCheckpointIO().save_checkpoint(resumable(state), path)
    begun = time.monotonic()
    AtomicCheckpointIO().save_checkpoint(resumable(state), path)
    duration = time.monotonic() - begun
    step, torn = 0, 0
    for _ in range(20):
        child = os.fork()
        if child == 0:  # saves for ever
            io = AtomicCheckpointIO()
            while True:
                step += 1
                io.save_checkpoint(resumable({"weights": torch.full((500_000,), float(step)), "step": step}), path)
        time.sleep(draws.uniform(0, 3 * duration))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        torn += bool(list(path.parent.glob(".*.tmp")))
        assert find_checkpoint(tmp_path / "run") == path
        saved = AtomicCheckpointIO().load_checkpoint(path)["state_dict"]
        assert (saved["weights"] == saved["step"]).all() and saved["step"] >= step
        step = saved["step"]
    assert torn > 3  # the kills did come within saves
    AtomicCheckpointIO().save_checkpoint(resumable(state), path)
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]
    shutil.rmtree(path.parent)


def resumable(state):
    """What find_checkpoint takes for a checkpoint."""
    lists = {"optimizer_states": [], "lr_schedulers": []}
    return {"state_dict": state, "loops": {}, "callbacks": {}, "global_step": state["step"], **lists}
