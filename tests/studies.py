"""Run folders as ``fit`` leaves them, without training: the values follow a law."""

import csv
import json
import math

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.planning import train_flops_per_token
from lightning_igpt.scaling import Run

METRIC = "val/nats_per_pixel"


def write_run(folder, run, values, *, batch_size=32, max_steps=None, train_images=1000):
    """A run's ``run.json`` and ``metrics.csv`` with ``values`` by metric at its last step."""
    folder.mkdir(parents=True)
    steps = run.images // batch_size
    record = {
        "trainer": {"max_steps": max_steps or steps},
        "module": {"class": "PretrainModule", "hparams": {"network": run.config.to_dict()}},
        "data": {"class": "PretrainDataModule", "hparams": {"batch_size": batch_size}},
        "images": {"train_images": train_images},
    }
    (folder / "run.json").write_text(json.dumps({"runs": [record]}))
    with (folder / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["epoch", "step", *values], [0, steps // 2, *(9 for _ in values)], [0, steps - 1, *values.values()]]
        )


def law(n, d):
    """Nats of a network of N parameters, embeddings left out, after D tokens."""
    return 1.5 + 8 / n**0.35 + 300 / d**0.4


def study(target, budgets=(2e12, 8e12, 3.2e13), widths=(16, 24, 32, 48, 64, 96), value=None):
    """A study of networks with two layers at 8 x 8 pixels with 16 colors."""
    for budget in budgets:
        for width in widths:
            config = ImageGPTConfig(n_layer=2, n_head=1, n_embd=width, vocab_size=16, image_size=8)
            images = round(budget / train_flops_per_token(config) / 64 / 32) * 32
            run = Run(f"{width}x2_{budget:g}", config, images)
            n, d, *_ = run.point()
            values = value(n, d) if value else {METRIC: law(n, d), "val/bits_per_pixel": law(n, d) / math.log(2)}
            write_run(target / run.name / "version_0", run, values)
