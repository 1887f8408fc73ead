"""What ``lightning-igpt predict`` leaves behind."""

import csv

import numpy as np
import torch
from PIL import Image

from lightning_igpt.__main__ import main
from lightning_igpt.cli import write_predictions
from lightning_igpt.modules import FineTuneModule
from tests.modules.helpers import TINY, quiet_trainer


def test_probabilities_become_a_table_with_class_names(tmp_path):
    path = write_predictions(torch.tensor([[0.25, 0.75], [0.5, 0.5]]), tmp_path, ["cat", "dog"])
    assert path.read_text().splitlines() == ["row,class,cat,dog", "0,dog,0.250000,0.750000", "1,cat,0.500000,0.500000"]


def test_rows_without_a_prediction_keep_their_numbers(tmp_path):
    path = write_predictions(torch.tensor([[0.25, 0.75], [0.5, 0.5]]), tmp_path, ["cat", "dog"], left_out={0, 2})
    assert [row[:2] for row in csv.reader(path.open())] == [["row", "class"], ["1", "dog"], ["3", "cat"]]
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.manual_seed(0))
    assert write_predictions(images, tmp_path / "images", None, left_out={1}) == tmp_path / "images"
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == ["000000.png", "000002.png"]
    for image, name in zip(images, ("000000.png", "000002.png"), strict=True):
        assert np.array_equal(np.array(Image.open(tmp_path / "images" / name)), image.permute(1, 2, 0).numpy())


def test_predict_through_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = FineTuneModule(num_classes=10, network={**TINY.to_dict(), "image_size": 8}, palette="gray:8")
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.strategy.connect(module)
    trainer.save_checkpoint("some.ckpt")
    network = ["--model.network.n_layer", "2", "--model.network.n_head", "2", "--model.network.n_embd", "16"]
    network += ["--model.network.vocab_size", "8", "--model.network.image_size", "8", "--model.palette", "gray:8"]
    data = ["--data", "FineTuneDataModule", "--data.source", "digits"]
    options = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.default_root_dir", "out"]
    assert main(["predict", "--model", "FineTuneModule", *network, *data, *options, "--ckpt_path", "some.ckpt"]) == 0
    (path,) = tmp_path.rglob("classes.csv")
    assert len(path.read_text().splitlines()) == 361
