"""A small run of the command line in a process of its own, to be stopped in every way there is."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from tests import fresh

ROOT = Path(__file__).parents[2]
NETWORK = {"n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": 16, "image_size": 8, "dropout": 0.1}
LENGTHS = {"max_steps": 30, "checkpoint_every": 5, "val_check_interval": 10, "limit_val_batches": 4}
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "callbacks": ["drill.Slow"]}
PLACE = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "default_root_dir": "run"}
RECIPE = {
    "model": {"class_path": "PretrainModule", "init_args": {"network": NETWORK, "palette": "gray:16"}},
    "data": {"class_path": "PretrainDataModule", "init_args": {"source": "digits", "batch_size": 8}},
    "trainer": LENGTHS | QUIET | PLACE,
}
SLOW = """
import os, time
from lightning.pytorch import Callback

class Slow(Callback):
    def on_train_batch_end(self, *args):
        time.sleep(float(os.environ.get("SECONDS_PER_STEP", "0")))
"""


class Run:
    """A folder with a recipe in it, and what is done there."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        (folder / "drill.py").write_text(SLOW)

    def start(self, *words, pace=0.0, **options):
        """``lightning-igpt fit``; ``pace`` is the seconds that a step is drawn out by."""
        words = ["fit", "--config", "recipe.yaml", "--trust", "drill", *words]
        return fresh.Fresh(fresh.main, *words, folder=self.folder, SECONDS_PER_STEP=str(pace), **options)

    def finish(self, *words, status=0, **options):
        """Run to the end; what it printed."""
        process = self.start(*words, **options)
        out, _ = process.communicate(timeout=240)
        assert process.returncode == status, f"status {process.returncode}: {out[-3000:]}"
        return out

    def finish_as_users_do(self):
        """Run to the end, in a process that nothing has prepared."""
        command = [sys.executable, "-m", "lightning_igpt", "fit", "--config", "recipe.yaml", "--trust", "drill"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{self.folder}"}
        subprocess.run(command, cwd=self.folder, env=environment, timeout=240, check=True)

    def checkpoints(self):
        return sorted((self.folder / "run").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)

    def wait_for(self, name, process):
        """Wait until a checkpoint of this name is there."""
        end = time.monotonic() + 200
        while not any(path.name == name for path in self.checkpoints()):
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < end, f"{name} never came"
            time.sleep(0.01)

    def final(self):
        """Weights, optimiser and validation at the end of the run."""
        (path,) = (path for path in self.checkpoints() if path.name == "final.ckpt")
        return torch.load(path, weights_only=True)


def assert_same_end(run, twin):
    mine, other = run.final(), twin.final()
    assert mine["global_step"] == other["global_step"] == RECIPE["trainer"]["max_steps"]
    assert all(torch.equal(value, mine["state_dict"][name]) for name, value in other["state_dict"].items())
    theirs = other["optimizer_states"][0]["state"]
    for key, state in mine["optimizer_states"][0]["state"].items():
        assert all(torch.equal(value, theirs[key][name]) for name, value in state.items())
    assert mine["lightning_igpt"]["validation"] == other["lightning_igpt"]["validation"]
