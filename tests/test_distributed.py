"""Two processes at the same global batch do what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys, torch
import lightning_igpt as igpt

if __name__ == "__main__":
    devices, objective, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.manual_seed(0)
    network = igpt.ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=16, image_size=8)
    options = {
        "accelerator": "cpu", "devices": devices, "strategy": "ddp" if devices > 1 else "auto", "logger": False,
        "enable_progress_bar": False, "enable_model_summary": False, "precision": "32-true",
    }
    module = igpt.PretrainModule(network, "gray:16", objective=objective)
    trainer = igpt.make_trainer(max_steps=5, default_root_dir=out, **options)
    trainer.fit(module, igpt.PretrainDataModule("digits", batch_size=32 // devices))
    found = {"nats": trainer.callback_metrics["val/nats_per_pixel"].item(), "wpe": module.network.wpe.weight.tolist()}
    probe = igpt.ProbeModule(out, layers=[0, 1])
    trainer = igpt.make_trainer(max_epochs=1, default_root_dir=out + "-probe", **options)
    trainer.fit(probe, igpt.ProbeDataModule("digits"))
    found["probe"] = list(probe.accuracy_by_layer.values())
    if trainer.is_global_zero:
        print("FOUND " + json.dumps(found))
"""


def run(tmp_path, devices, objective):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(script), str(devices), objective, str(tmp_path / f"run-{devices}")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert done.returncode == 0 and lines, done.stderr[-3000:]
    return json.loads(lines[0].removeprefix("FOUND "))


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["autoregressive", pytest.param("bert", marks=pytest.mark.marathon)])
def test_two_processes_equal_one(tmp_path, objective):
    one, two = run(tmp_path, 1, objective), run(tmp_path, 2, objective)
    assert two["nats"] == pytest.approx(one["nats"], rel=1e-5)
    for mine, other in zip(one["wpe"], two["wpe"], strict=True):
        assert other == pytest.approx(mine, rel=1e-4, abs=1e-5)
    assert two["probe"] == pytest.approx(one["probe"], abs=0.01)
