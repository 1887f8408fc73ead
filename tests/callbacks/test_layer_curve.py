import csv

import lightning
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_igpt.callbacks import LayerCurve
from lightning_igpt.callbacks.layer_curve import layer_figure
from lightning_igpt.modules import ProbeModule
from tests.modules.helpers import TINY, loader, quiet_trainer

ROWS = [
    {"layer": 0, "c": 0.01, "val_accuracy": 0.25, "test_accuracy": None},
    {"layer": 1, "c": 10.0, "val_accuracy": 0.75, "test_accuracy": 0.5},
    {"layer": 2, "c": 1.0, "val_accuracy": 0.5, "test_accuracy": 0.625},
    {"layer": "1-2", "c": 1.0, "val_accuracy": None, "test_accuracy": 0.875},
]


class Results(lightning.LightningModule):
    """A module with nothing but results."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step


def probe(**options):
    torch.manual_seed(0)
    return ProbeModule(network=TINY, palette="gray:8", num_classes=3, **options)


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def lines_of(figure):
    (axes,) = figure.axes
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()}


def drawn(folder):
    return sorted(path.name for path in folder.rglob("probe_by_layer.*"))


def test_the_picture_shows_both_curves_and_the_best_on_validation():
    assert lines_of(layer_figure(ROWS)) == {
        "validation": ([0, 1, 2], [0.25, 0.75, 0.5]),
        "test": ([1, 2], [0.5, 0.625]),
        "best on validation: layer 1 (0.750)": ([1], [0.75]),
        "layers 1-2 together on test (0.875)": ([0, 1], [0.875, 0.875]),  # a level over the whole width
    }
    tested = [{"layer": layer, "c": None, "val_accuracy": None, "test_accuracy": layer / 60} for layer in range(49)]
    figure = layer_figure(tested)
    assert "best on test: layer 48 (0.800)" in lines_of(figure)
    assert len(figure.axes[0].get_xticks()) <= 14


def test_a_probes_layers_reach_log_files_and_tensorboard(tmp_path, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    module, seen = probe(), []
    trainer = quiet_trainer(tmp_path, max_epochs=1, logger=True, callbacks=[LayerCurve()])
    with caplog.at_level("INFO"):
        trainer.fit(module, loader(), loader(21))
        seen = drawn(tmp_path)
        trainer.test(module, loader(12), verbose=False)
    metrics = {layer: trainer.callback_metrics[f"test/layer_{layer}/accuracy"].item() for layer in (0, 1, 2)}
    assert seen == drawn(tmp_path) == ["probe_by_layer.csv", "probe_by_layer.png"]
    layers = read_csv(next(tmp_path.rglob("probe_by_layer.csv")))
    assert {int(row["layer"]): float(row["test_accuracy"]) for row in layers} == pytest.approx(metrics)
    pixels = np.array(Image.open(next(tmp_path.rglob("probe_by_layer.png"))))
    assert pixels.shape[:2] == (640, 960) and pixels[..., :3].std() > 0
    tables = [record.message for record in caplog.records if record.message.startswith("accuracy by layer\n")]
    assert len(tables) == 2 and "test" not in tables[0] and "test" in tables[1]
    events = EventAccumulator(trainer.log_dir).Reload()
    assert len(events.Images("probe_by_layer")) == 2
