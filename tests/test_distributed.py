"""Two processes at the same global batch do what one does."""

import json
import re

import pytest

from tests import fresh

SCRIPT = """
import json, sys, torch
from lightning.pytorch import Callback
import lightning_igpt as igpt

class Losses(Callback):
    def __init__(self):
        self.losses = []  # of each batch, over all processes

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach().clone() * trainer.accumulate_grad_batches
        self.losses.append(trainer.strategy.reduce(loss, reduce_op="mean").item())

if __name__ == "__main__":
    devices, objective, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    network = igpt.ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=16, image_size=8)
    options = {
        "accelerator": "cpu", "devices": devices, "logger": False, "enable_progress_bar": False,
        "enable_model_summary": False, "precision": "32-true",
    }
    found = {}
    for accumulate in (1, 2):
        torch.manual_seed(0)
        module, losses = igpt.PretrainModule(network, "gray:16", objective=objective), Losses()
        trainer = igpt.make_trainer(
            max_steps=6, default_root_dir=out, callbacks=losses, accumulate_grad_batches=accumulate, **options
        )
        data = igpt.PretrainDataModule("digits", batch_size=32, val_fraction=143 / 1437)
        trainer.fit(module, data)  # an odd number of images to validate: a process must not count one twice
        windows = zip(*[iter(losses.losses)] * accumulate)
        found[f"accumulate {accumulate}"] = {
            "strategy": type(trainer.strategy).__name__,
            "losses": [sum(window) / accumulate for window in windows],
            "nats": trainer.callback_metrics["val/nats_per_pixel"].item(),
            "wpe": module.network.wpe.weight.tolist(),
        }
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
    out = fresh.finished(fresh.script, script, str(devices), objective, f"run-{devices}", folder=tmp_path)
    return json.loads(re.search(r"^FOUND (.*)$", out, re.MULTILINE)[1])


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["autoregressive", pytest.param("bert", marks=pytest.mark.marathon)])
def test_two_processes_equal_one(tmp_path, objective):
    """At equal global batch, with accumulation or without: float32, sums in another order."""
    one, two = run(tmp_path, 1, objective), run(tmp_path, 2, objective)
    expected = one["accumulate 1"]
    assert len(expected["losses"]) == 6
    for found, strategy in (
        (one["accumulate 2"], "SingleDeviceStrategy"),
        (two["accumulate 1"], "DDPStrategy"),
        (two["accumulate 2"], "DDPStrategy"),
    ):
        assert found["strategy"] == strategy
        assert found["nats"] == pytest.approx(expected["nats"], rel=1e-5)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for mine, other in zip(expected["wpe"], found["wpe"], strict=True):
            assert other == pytest.approx(mine, rel=1e-4, abs=1e-5)
    assert two["probe"] == pytest.approx(one["probe"], abs=0.01)
