import io

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from lightning_igpt.callbacks import CompletionGrid, LayerCurve, OnlineProbe, TensorBoardOverview
from lightning_igpt.callbacks.tensorboard_overview import beside_the_palette, images_of, settings
from lightning_igpt.data import PretrainDataModule
from lightning_igpt.modules import FineTuneModule, PretrainModule, ProbeModule
from lightning_igpt.palette import Palette
from lightning_igpt.trainer import make_trainer
from tests.modules.helpers import TINY, labelled_images, loader, quiet_trainer

COLORS = [[red, green, blue] for red in (-1, 1) for green in (-1, 1) for blue in (-1, 1)]
METRICS = ["val/nats_per_pixel", "test/nats_per_pixel", "val/accuracy", "test/accuracy"]


def image(events, tag):
    """The only picture under a tag."""
    (found,) = events.Images(tag)
    return np.array(Image.open(io.BytesIO(found.encoded_image_string)))


def hparams(events):
    """(what belongs to all runs, the settings of this one)."""
    parts = events.PluginTagToContent("hparams")
    experiment = metadata.parse_experiment_plugin_data(parts[metadata.EXPERIMENT_TAG])
    start = metadata.parse_session_start_info_plugin_data(parts[metadata.SESSION_START_INFO_TAG])
    values = {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
    return experiment, values


def layout(events):
    """Charts and their tags by unit."""
    (event,) = events.Tensors("custom_scalars__config__")
    found = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {part.title: {chart.title: list(chart.multiline.tag) for chart in part.chart} for part in found.category}


def fit(folder, module, *callbacks, data=None, **options):
    trainer = quiet_trainer(folder, logger=True, callbacks=[TensorBoardOverview(4), *callbacks], **options)
    trainer.fit(module, *([loader(), loader()] if data is None else []), datamodule=data)
    return trainer


def test_pretraining(tmp_path):
    options = {"lr": 0.01, "optimizer": "muon", "seed": 3}
    network = TINY.to_dict() | {"image_size": 8}
    data = PretrainDataModule("digits", batch_size=8, seed=3)
    trainer = fit(tmp_path, PretrainModule(network, "gray:8", **options), max_steps=2, data=data, log_every_n_steps=1)
    trainer.test(datamodule=data, verbose=False)
    events = EventAccumulator(trainer.log_dir).Reload()
    palette = image(events, "palette")
    colors = {tuple(color) for color in palette.reshape(-1, 3).tolist()}
    assert {tuple(color) for color in Palette.load("gray:8").rgb.tolist()} <= colors
    assert image(events, "training_images").shape == (18 + 2 * 130 + 2, 4 * 130 + 2, 3)  # a heading, two rows of four
    experiment, values = hparams(events)
    assert [metric.name.tag for metric in experiment.metric_infos] == METRICS
    columns = {one.name for one in experiment.hparam_infos}
    assert {"lr", "batch_size", "network/n_layer", "source", "schedule", "mask_ratio"} <= columns
    assert (values["lr"], values["optimizer"], values["network/n_embd"], values["source"]) == (
        0.01,
        "muon",
        16,
        "digits",
    )
    assert values["seed"] == 3 and values["palette"] == "gray:8" and values["network/bias"] == "false"
    first = {one.name for one in experiment.hparam_infos if one.differs}
    assert first == {"lr", "batch_size", "network/n_layer", "network/n_embd", "network/image_size"}
    assert {"val/nats_per_pixel", "test/nats_per_pixel"} <= set(events.Tags()["scalars"])
    charts = layout(events)
    assert list(charts) == ["nats per pixel", "bits per pixel", "images per second", "learning rate"]
    assert charts["nats per pixel"] == {"training, validation, test": ["(train|val|test)/nats_per_pixel"]}


def test_a_probe_and_a_classifier(tmp_path):
    torch.manual_seed(0)
    probe = ProbeModule(network=TINY, palette="gray:8", num_classes=3)
    events = EventAccumulator(fit(tmp_path, probe, LayerCurve(), max_epochs=1).log_dir).Reload()
    assert list(layout(events)["accuracy"]) == ["validation, test"] and hparams(events)[1]["num_classes"] == 3
    assert {"palette", "training_images", "probe_by_layer"} == set(events.Tags()["images"])
    tuned = FineTuneModule(num_classes=3, network=TINY, palette=COLORS)
    events = EventAccumulator(fit(tmp_path, tuned, max_steps=1).log_dir).Reload()
    assert list(layout(events))[:3] == ["accuracy", "cross-entropy in nats", "nats per pixel"]
    experiment, values = hparams(events)
    assert [metric.name.tag for metric in experiment.metric_infos] == METRICS  # the same for all kinds
    assert "palette" not in values and "class_names" not in values  # lists of colours and of names


def test_a_probe_beside_training_has_a_chart(tmp_path):
    module = PretrainModule(TINY, "gray:8")
    trainer = fit(tmp_path, module, OnlineProbe(num_classes=3), max_steps=2)
    assert "probe beside training" in layout(EventAccumulator(trainer.log_dir).Reload())["accuracy"]


def test_a_test_alone_has_its_settings(tmp_path):
    trainer = quiet_trainer(tmp_path, logger=True, callbacks=[TensorBoardOverview()])
    trainer.test(PretrainModule(TINY, "gray:8", lr=0.5), loader(), verbose=False)
    events = EventAccumulator(trainer.log_dir).Reload()
    experiment, values = hparams(events)
    assert values["lr"] == 0.5 and [metric.name.tag for metric in experiment.metric_infos] == METRICS
    assert not events.Tags()["images"]


def test_charts_name_what_is_logged(tmp_path):
    """Every chart of a run holds at least one of its curves."""
    import re

    module = PretrainModule(TINY, "gray:8")
    trainer = make_trainer(
        max_steps=4, accelerator="cpu", devices=1, default_root_dir=tmp_path, log_every_n_steps=1, compile=False,
        enable_progress_bar=False, enable_model_summary=False, logger=TensorBoardLogger(tmp_path),
    )  # fmt: skip
    trainer.fit(module, loader(), loader())
    events = EventAccumulator(trainer.log_dir).Reload()
    tags = events.Tags()["scalars"]
    for unit, charts in layout(events).items():
        for name, patterns in charts.items():
            assert any(re.fullmatch(pattern, tag) for pattern in patterns for tag in tags), (unit, name, tags)


def test_training_is_the_same_with_it(tmp_path):
    weights = []
    for callbacks in ([], [TensorBoardOverview()]):
        torch.manual_seed(0)
        module = PretrainModule({**TINY.to_dict(), "dropout": 0.1}, "gray:8")
        trainer = quiet_trainer(tmp_path, max_steps=4, val_check_interval=2, logger=True, callbacks=callbacks)
        trainer.fit(module, loader(), loader())
        weights.append(torch.cat([parameter.flatten() for parameter in module.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("logger", [False, "csv"])
def test_other_loggers_get_nothing(tmp_path, logger):
    logger = CSVLogger(tmp_path) if logger else False
    trainer = quiet_trainer(tmp_path, max_steps=1, logger=logger, callbacks=[TensorBoardOverview()])
    trainer.fit(PretrainModule(TINY, "gray:8"), loader(), loader())
    assert not list(tmp_path.rglob("events*"))


def test_other_modules_get_nothing(tmp_path):
    import lightning

    class Other(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"lr": 1.0})
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def training_step(self, batch, batch_idx):
            return self.weight.square()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = quiet_trainer(tmp_path, max_steps=1, logger=True, callbacks=[TensorBoardOverview()])
    trainer.fit(Other(), loader())
    events = EventAccumulator(trainer.log_dir).Reload()
    assert not events.Tags()["images"] and not events.Tags()["tensors"]
    assert hparams(events)[1] == {"lr": 1.0}  # Lightning's own


def test_no_images_on_request(tmp_path):
    callbacks = [TensorBoardOverview(0), CompletionGrid(1, 1)]
    trainer = quiet_trainer(tmp_path, max_steps=1, val_check_interval=1, logger=True, callbacks=callbacks)
    trainer.fit(PretrainModule(TINY, "gray:8"), loader(), loader())
    assert set(EventAccumulator(trainer.log_dir).Reload().Tags()["images"]) == {"palette", "completions"}
    with pytest.raises(ValueError, match="n_images is -1"):
        TensorBoardOverview(-1)


def test_images_stand_above_what_the_network_sees():
    images, labels = labelled_images(3)
    palette = Palette.load("gray:2")
    tokens = palette.quantize(images)
    grid = beside_the_palette(images, palette, tokens)
    cells = grid[:, -2 * 130 - 2 :].unfold(1, 130, 130).unfold(2, 130, 130)[..., 2::32, 2::32]  # (3, 2, 3, 4, 4)
    assert torch.equal(cells[:, 0].movedim(1, 0), images)
    assert torch.equal(cells[:, 1].movedim(1, 0), palette.dequantize(tokens))
    floats = beside_the_palette(images[:, :1] / 255, palette, tokens)
    assert torch.equal(floats, beside_the_palette(images[:, :1], palette, tokens))
    assert beside_the_palette(None, palette, tokens).shape[1] == grid.shape[1] - 130
    for batch in ({"image": images}, (images, labels), [images], images):
        assert images_of(batch) is images
    assert images_of({"tokens": tokens, "image": images}) is None


def test_settings_are_plain_and_hold_no_secret():
    module = PretrainModule(TINY, "gray:8")
    module.save_hyperparameters({"api_token": "secret", "note": "n" * 99, "betas": (0.9, 0.95), "warmup_steps": None})
    values = settings(module)
    assert values["api_token"] == "***" and len(values["note"]) == 60 and values["betas"] == "[0.9, 0.95]"
    data = PretrainDataModule("digits", batch_size=8)
    assert settings(module, data)["batch_size"] == 8 and "num_workers" not in settings(module, data)
    assert "warmup_steps" not in values and values["network/n_layer"] == 2
