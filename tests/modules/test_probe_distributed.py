"""Probes on two processes find what one finds, also where the sampler has to pad."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys, torch
from lightning_igpt.modules import ProbeModule
from tests.modules.helpers import TINY, quiet_trainer
from tests.modules.helpers import noisy_loader
from torch.utils.data import DataLoader, DistributedSampler

if __name__ == "__main__":
    devices, solver, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.manual_seed(0)
    options = {"concat": 3, "c": [0.01, 1.0]} if solver == "lbfgs" else {"solver": "sgd", "standardize": False}
    module = ProbeModule(network={**TINY.to_dict(), "n_layer": 4}, palette="gray:8", num_classes=3, **options)
    n_train = 231 if solver == "lbfgs" else 240  # 231 rows are odd; without numbers they are told by their places
    train = [{"image": row["image"], "label": row["label"]} for row in noisy_loader(n_train).dataset]
    val = noisy_loader(90, seed=1).dataset
    trainer = quiet_trainer(out, devices=devices, max_epochs=2, strategy="ddp" if devices > 1 else "auto")
    sampler = DistributedSampler(train, devices, int(os.environ.get("LOCAL_RANK", 0)), shuffle=False)
    trainer.fit(module, DataLoader(train, 40 // devices, sampler=sampler), DataLoader(val, 30 // devices))
    found = {"results": module.results, "weight": module.weight.flatten().tolist()}
    if trainer.is_global_zero:
        print("FOUND " + json.dumps(found))
"""


def run(tmp_path, devices, solver):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), str(devices), solver, str(tmp_path / f"run-{devices}")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert done.returncode == 0 and lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("FOUND "))


@pytest.mark.marathon
@pytest.mark.slow
@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_two_processes_equal_one(tmp_path, solver):
    one, two = run(tmp_path, 1, solver), run(tmp_path, 2, solver)
    assert two["weight"] == pytest.approx(one["weight"], rel=1e-3, abs=1e-4)
    for mine, other in zip(one["results"], two["results"], strict=True):
        assert mine["layer"] == other["layer"] and mine["c"] == other["c"]
        assert other["val_accuracy"] == pytest.approx(mine["val_accuracy"], abs=0.02)
