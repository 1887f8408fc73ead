"""Two machines, played by processes on this one that find each other through torchrun's rendezvous."""

import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml

from tests.drills.run import RECIPE, ROOT

LIMIT = 240  # seconds
NETWORK = RECIPE["model"]["init_args"]["network"] | {"dropout": 0.0}
MODEL = RECIPE["model"] | {"init_args": RECIPE["model"]["init_args"] | {"network": NETWORK}}
DATA = {"class_path": "PretrainDataModule", "init_args": {"source": "digits", "batch_size": 16}}
# All of the validation images: with fewer, another number of devices sees others of them.
TRAINER = RECIPE["trainer"] | {"max_steps": 12, "val_check_interval": 6, "limit_val_batches": 1.0, "callbacks": []}


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(port):
    end = time.monotonic() + LIMIT
    while True:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < end
        time.sleep(0.1)


def finish(folder, *commands, port=None, **options):
    """Run commands at once in a folder with the recipe; what they printed, and the last checkpoint."""
    folder.mkdir()
    model = MODEL | {"init_args": MODEL["init_args"] | options}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": model, "data": DATA, "trainer": TRAINER}))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": folder}
    processes = []
    try:
        for number, command in enumerate(commands):
            if number:
                wait_for(port)  # the first machine holds the rendezvous
            processes.append(subprocess.Popen([sys.executable, *command], env=environment, **pipes))
        outs = [process.communicate(timeout=LIMIT)[0] for process in processes]
    finally:
        for process in processes:
            process.terminate()  # torchrun ends its workers
    assert not any(process.returncode for process in processes), "\n".join(outs)[-4000:]
    (path,) = (folder / "run").rglob("final.ckpt")
    return "\n".join(outs), torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["autoregressive", pytest.param("bert", marks=pytest.mark.marathon)])
def test_two_machines_equal_one_process(tmp_path, objective):
    """``batch_size`` is that of an optimizer step, whatever the devices and the accumulated batches; float32."""
    fit = ["-m", "lightning_igpt", "fit", "--config", "recipe.yaml"]
    _, expected = finish(tmp_path / "one", fit, objective=objective)
    port = free_port()
    torchrun = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    torchrun += ["--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "test", "--local-addr", "127.0.0.1"]
    machine = [*torchrun, *fit, "--trainer.num_nodes", "2", "--trainer.strategy", "ddp"]
    machine += ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "12"]
    out, found = finish(tmp_path / "two", machine, machine, port=port, objective=objective)
    assert "Starting with 2 processes" in out
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    assert found["lightning_igpt"]["validation"] == pytest.approx(expected["lightning_igpt"]["validation"], rel=1e-5)
    (version,) = (tmp_path / "two" / "run").iterdir()  # one machine writes, in one folder
    assert len(json.loads((version / "run.json").read_text())["runs"]) == 1
    assert sorted(path.name for path in version.rglob("*.ckpt")) == ["final.ckpt", "step=10.ckpt"]
