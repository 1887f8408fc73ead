import csv
import json
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lightning_igpt.__main__ import main
from lightning_igpt.commands.lowdata import draw_subsets, features, lowdata
from lightning_igpt.data import ProbeDataModule
from lightning_igpt.model import ImageGPT
from lightning_igpt.objectives import draw_mask
from lightning_igpt.palette import Palette
from lightning_igpt.weights import Pretrained, load_pretrained, save_pretrained
from tests.networks import SMALL, SMALL_BERT, random_network

PALETTE, NAMES = Palette.load("gray:20"), [str(number) for number in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("network")
    save_pretrained(path, random_network(replace(SMALL, image_size=8)), PALETTE)
    return str(path)


def whole(images):
    return images[[(row, row) for row in range(len(images))]]


@pytest.fixture(scope="module")
def parts():
    """Training and test images."""
    data = ProbeDataModule("digits", image_size=8, val_fraction=0.0)
    data.setup()
    return data.train_dataloader().dataset, data.test_dataloader().dataset


def expected_features(folder, images, layer):
    with torch.no_grad():
        tokens = PALETTE.quantize(whole(images)["image"])
        return load_pretrained(folder).network.eval().features(tokens, [layer])[:, 0].numpy()


def test_every_subset_is_what_scikit_learn_makes_of_it(folder, parts, tmp_path):
    lowdata(folder, "digits", str(tmp_path), (25, 4), n_subsets=2, seed=5, layers=[3])
    with (tmp_path / "lowdata.csv").open() as file:
        rows = [(int(r["layer"]), int(r["labels_per_class"]), int(r["subset"]), r["test_accuracy"])
                for r in csv.DictReader(file)]  # fmt: skip
    assert [row[:3] for row in rows] == [(layer, n, subset) for layer in (1, 3) for n in (4, 25) for subset in range(2)]
    train_images, test_images = parts
    drawn = draw_subsets(train_images.labels, NAMES, 25, 2, seed=5)
    for layer in (1, 3):
        train, test = (expected_features(folder, images, layer) for images in parts)
        for _, n, subset, accuracy in [row for row in rows if row[0] == layer]:
            places = drawn[subset, :, :n].flatten().numpy()
            peer = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, tol=1e-6, max_iter=5000))
            peer.fit(train[places], train_images.labels[places])
            expected = peer.score(test, test_images.labels.numpy())
            assert float(accuracy) == pytest.approx(expected, abs=3.5 / 360)  # images on the border

    found = json.loads((tmp_path / "lowdata.json").read_text())
    assert (found["layer"], found["n_train_images"], found["n_test_images"], found["seed"]) == (1, 1437, 360, 5)
    for result in found["results"]:
        column = [float(row[3]) for row in rows if row[:2] == (result["layer"], result["labels_per_class"])]
        assert result["mean"] == pytest.approx(statistics.mean(column), abs=1e-6)
        assert result["sd"] == pytest.approx(statistics.stdev(column), abs=1e-6)


def test_features_are_computed_once(folder, tmp_path, monkeypatch, parts):
    asked = []
    compute = ImageGPT.features

    def counted(self, tokens, layers, **options):
        asked.append((len(tokens), list(layers)))
        return compute(self, tokens, layers, **options)

    monkeypatch.setattr(ImageGPT, "features", counted)
    words = ["--pretrained", folder, "--source", "digits", "--out", str(tmp_path), "--labels_per_class", "2", "5"]
    assert main(["lowdata", *words, "--layer", "2", "--layers", "all", "--n_subsets", "2"]) == 0
    drawn = len(set(draw_subsets(parts[0].labels, NAMES, 5, 2, seed=0).flatten().tolist()))
    assert sum(count for count, _ in asked) == drawn + 360
    assert all(layers == [0, 1, 2, 3] for _, layers in asked)
    assert json.loads((tmp_path / "lowdata.json").read_text())["layer_choice"] == "as asked for"
    lowdata(folder, "digits", str(tmp_path), (4,), n_subsets=1)
    result = json.loads((tmp_path / "lowdata.json").read_text())["results"][0]
    assert result["sd"] is None and result["mean"] == result["accuracies"][0]


def test_subsets_are_balanced_random_and_nested():
    labels = torch.from_numpy(np.random.default_rng(0).integers(3, size=90))
    drawn = draw_subsets(labels, NAMES[:3], 8, 5, seed=1)
    assert drawn.shape == (5, 3, 8)
    assert (labels[drawn] == torch.arange(3)[:, None]).all()
    assert all(len(subset.unique()) == 24 for subset in drawn)  # without replacement
    assert len({tuple(subset.flatten().tolist()) for subset in drawn}) == 5
    assert torch.equal(draw_subsets(labels, NAMES[:3], 4, 2, seed=1), drawn[:2, :, :4])
    assert not torch.equal(draw_subsets(labels, NAMES[:3], 8, 5, seed=2), drawn)


def test_bert_sees_each_image_under_the_mask_of_its_row(parts):
    network = random_network(replace(SMALL_BERT, image_size=8))
    rows = [3, 40, 41, 900, 1436]
    tokens = PALETTE.quantize(whole(parts[0])["image"][rows])
    with torch.no_grad():
        expected = network.features(tokens, [0, 3], masked=draw_mask(torch.tensor(rows), 64, seed=7))
        unmasked = network.features(tokens, [0, 3], masked=torch.zeros(5, 64, dtype=torch.bool))
    found = features(
        Pretrained(network, PALETTE, "random"), [0, 3], parts[0], rows, seed=7, batch_size=2, num_workers=0
    )
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, unmasked)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "class '8' has 139 training images, fewer than labels_per_class 400; .* at most 139"),
        ({"labels_per_class": (139,), "val_fraction": 0.1}, r"has 1\d\d training images, fewer than .* 139"),
        ({"labels_per_class": (4,), "layer": 4}, r"layers are \[4\]; this network has 0 to 3"),
        ({"labels_per_class": (4,), "layers": [9]}, r"layers are \[1, 9\]; this network has 0 to 3"),
        ({"labels_per_class": (0, 4)}, "labels_per_class is 0; it must be above 0"),
        ({"labels_per_class": (4,), "n_subsets": 0}, "n_subsets is 0"),
        ({"labels_per_class": (4,), "c": 0.0}, "c is 0.0; it must be above 0"),
    ],
)
def test_mistakes_cost_no_features(folder, tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(ImageGPT, "features", lambda *args, **options: pytest.fail("features were computed"))
    with pytest.raises(ValueError, match=message):
        lowdata(folder, "digits", str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()
