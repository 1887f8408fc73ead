"""Several machines, played by processes on this one that find each other through torchrun's rendezvous."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import yaml

from tests.drills.run import RECIPE, ROOT, SLOW
from tests.leftovers import end_all_in, parent_of, working_in

pytestmark = pytest.mark.slow

STEPS, BATCH = 12, 16
# All of the validation images: with fewer, another number of devices sees others of them.
TRAINER = RECIPE["trainer"] | {"max_steps": STEPS, "val_check_interval": 6, "limit_val_batches": 1.0}
LIMIT = 240  # seconds that anything may take
RECORDER = (
    SLOW
    + """
import json

class Recorder(Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        place = [trainer.global_step, trainer.world_size, trainer.global_rank]
        seen = [*place, batch["sample"].tolist(), outputs["loss"].item()]
        with open("seen.jsonl", "a") as file:
            file.write(json.dumps(seen) + chr(10))
"""
)


class Cluster:
    """A folder that all machines see, with a recipe of 16 images a step in it, and the processes that were started."""

    def __init__(self, folder, dropout=0.0):
        network = RECIPE["model"]["init_args"]["network"] | {"dropout": dropout}
        model = RECIPE["model"] | {"init_args": RECIPE["model"]["init_args"] | {"network": network}}
        data = {"class_path": "PretrainDataModule", "init_args": {"source": "digits", "batch_size": BATCH}}
        trainer = TRAINER | {"callbacks": ["drill.Slow", "drill.Recorder"]}
        folder.mkdir(exist_ok=True)
        self.folder, self.port, self.agents = folder, free_port(), []
        (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": model, "data": data, "trainer": trainer}))
        (folder / "drill.py").write_text(RECORDER)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """torchrun gives each worker a session of its own, so that no group of processes holds them all."""
        end_all_in(self.folder)
        for agent in self.agents:
            agent.communicate()

    def start(self, command, pace=0.0, **variables):
        paths = os.pathsep.join([str(ROOT), str(self.folder)])
        environment = (
            os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "SECONDS_PER_STEP": str(pace)} | variables
        )
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        self.agents.append(subprocess.Popen(command, cwd=self.folder, env=environment, **options))
        return self.agents[-1]

    def alone(self, *words):
        """The same recipe in a single process."""
        fit = ["fit", "--config", "recipe.yaml", "--trust", "drill", *words]
        return finish(self.start([sys.executable, "-m", "lightning_igpt", *fit]))

    def torchrun(self, nodes, devices, pace=0.0, **variables):
        """The same recipe on one machine more: ``batch_size`` is that of an optimizer step, whatever the devices."""
        words = ["--nnodes", nodes, "--nproc-per-node", devices, "--max-restarts", 3, "--rdzv-backend", "c10d"]
        words += ["--rdzv-endpoint", f"localhost:{self.port}", "--rdzv-id", "test", "--local-addr", "127.0.0.1"]
        words += ["-m", "lightning_igpt", "fit", "--config", "recipe.yaml", "--trust", "drill", "--resume", "auto"]
        words += ["--trainer.num_nodes", nodes, "--trainer.devices", devices, "--trainer.strategy", "ddp"]
        command = [sys.executable, "-m", "torch.distributed.run", *map(str, words)]
        agent = self.start(command, pace, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", **variables)
        self.wait(lambda: listens(self.port), "the first machine holds the rendezvous")
        return agent

    def workers(self, agent):
        """The processes that train on the machine of an agent."""
        return [one for one in working_in(self.folder, "lightning_igpt\0fit") if parent_of(one) == agent.pid]

    def wait(self, is_so, what):
        end = time.monotonic() + LIMIT
        while not is_so():
            for agent in self.agents:
                assert agent.poll() is None, agent.communicate()[0][-4000:]
            assert time.monotonic() < end, f"waited in vain: {what}"
            time.sleep(0.02)

    def wait_for_step(self, step):
        self.wait(lambda: list((self.folder / "run").rglob(f"step={step}.ckpt")), f"step {step} is saved")

    def final(self):
        (path,) = (self.folder / "run").rglob("final.ckpt")
        return torch.load(path, weights_only=True)

    def lines(self):
        path = self.folder / "seen.jsonl"
        return path.read_text() if path.exists() else ""

    def seen(self):
        """By steps: numbers of the images in their order, and loss, over all devices; of a repeated step the last."""
        steps = {}
        for line in self.lines().splitlines():
            step, world, rank, samples, loss = json.loads(line)
            ranks = steps.get(step, {})
            steps[step] = {one: seen for one, seen in ranks.items() if len(seen[0]) * world == BATCH}
            steps[step][rank] = samples, loss
        merged = {}
        for step, ranks in steps.items():
            samples = [sample for rank in sorted(ranks) for sample in ranks[rank][0]]
            merged[step] = samples, sum(loss for _, loss in ranks.values()) / len(ranks)
        return merged


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def listens(port):
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def finish(*agents):
    outs = []
    for agent in agents:
        out, _ = agent.communicate(timeout=LIMIT)
        assert agent.returncode == 0, f"status {agent.returncode}: {out[-4000:]}"
        outs.append(out)
    return "\n".join(outs)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process, undisturbed."""
    with Cluster(tmp_path_factory.mktemp("alone")) as one:
        one.alone()
        return one


def assert_equal_sums(found, twin):
    """The same images in the same order; losses, validation and weights as far as sums round alike."""
    mine, theirs = found.seen(), twin.seen()
    assert sorted(mine) == sorted(theirs) == list(range(1, STEPS + 1))
    for step, (samples, loss) in theirs.items():
        assert mine[step][0] == samples and len(samples) == BATCH
        assert mine[step][1] == pytest.approx(loss, rel=1e-5)
    mine, theirs = found.final(), twin.final()
    for name, value in theirs["state_dict"].items():
        torch.testing.assert_close(mine["state_dict"][name], value, rtol=1e-5, atol=1e-6)
    expected = theirs["lightning_igpt"]["validation"]
    assert mine["lightning_igpt"]["validation"] == pytest.approx(expected, rel=1e-5)


def test_two_machines_equal_one_process(tmp_path, alone):
    with Cluster(tmp_path) as two:
        out = finish(*[two.torchrun(2, 1) for _ in range(2)])
        assert "Starting with 2 processes" in out
        assert_equal_sums(two, alone)
        (version,) = (tmp_path / "run" / "lightning_logs").iterdir()  # one machine writes, in one folder
        assert len(json.loads((version / "run.json").read_text())["runs"]) == 1
        assert sorted(path.name for path in version.rglob("*.ckpt")) == ["final.ckpt", "step=10.ckpt"]


@pytest.mark.marathon
def test_a_killed_process_costs_nothing(tmp_path):
    with Cluster(tmp_path / "twin", dropout=0.1) as twin, Cluster(tmp_path / "run", dropout=0.1) as run:
        finish(twin.torchrun(1, 2))
        agent = run.torchrun(1, 2, pace=0.2)
        run.wait_for_step(5)
        os.kill(run.workers(agent)[1], signal.SIGKILL)
        out = finish(agent)
        assert "Restoring states from the checkpoint path at" in out
        mine, theirs = run.final(), twin.final()
        assert all(torch.equal(value, mine["state_dict"][name]) for name, value in theirs["state_dict"].items())
        assert mine["lightning_igpt"]["validation"] == theirs["lightning_igpt"]["validation"]
        assert run.seen() == twin.seen()
