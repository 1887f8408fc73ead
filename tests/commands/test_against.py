import csv
import io
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from lightning_igpt.commands.against import anomaly_scores, codec_nats, detection
from lightning_igpt.commands.images import read_images
from lightning_igpt.sampling import score
from tests.commands.test_score_command import CONFIG, PALETTE, network_folder, run  # noqa: F401
from tests.image_files import noise
from tests.networks import random_network


def brute_force(normal, anomalous):
    """AUROC by all pairs, and the least FPR over all thresholds that detect at least 95 % of the anomalies."""
    pairs = [(a > n) + (a == n) / 2 for a in anomalous for n in normal]
    thresholds = [t for t in {*normal, *anomalous} if np.mean(np.array(anomalous) >= t) >= 0.95]
    return np.mean(pairs), min(np.mean(np.array(normal) >= t) for t in thresholds)


@pytest.mark.parametrize(
    ("normal", "anomalous", "expected"),
    [
        ([1, 2, 3, 4], [3.5, 5, 6, 7], (15 / 16, 1 / 4)),
        ([2, 2], [2, 2], (1 / 2, 1)),
        ([0, 1, 1, 2, 2, 2], [1, 2, 2, 3], (17 / 24, 5 / 6)),
        ([-500, 800, 801], [800.5, 900], (5 / 6, 1 / 3)),  # a sigmoid in float32 would make most of them equal
        ([*range(20)], [0.5, *[50] * 19], ((19 * 20 + 1) / 400, 0)),  # 19 of 20 are 95 %
    ],
)
def test_auroc_and_fpr_by_hand_by_brute_force_and_by_scikit_learn(normal, anomalous, expected):
    found = detection(*(torch.tensor(values, dtype=torch.float64) for values in (normal, anomalous)))
    theirs = roc_auc_score([0] * len(normal) + [1] * len(anomalous), normal + anomalous)
    assert found == pytest.approx(expected, abs=1e-6) and theirs == pytest.approx(expected[0])
    assert brute_force(normal, anomalous) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("codec", "options"), [("PNG", {"optimize": True}), ("WEBP", {"lossless": True, "quality": 100, "method": 6})]
)
def test_scores_are_nats_and_files_in_nats_of_the_same_pixels(codec, options):
    image = noise((8, 8))
    image.save(file := io.BytesIO(), codec, **options)
    assert np.array_equal(Image.open(file).convert("RGB"), image)  # nothing is lost
    nats = 8 * len(file.getvalue()) * math.log(2) / 64
    images = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    scores = anomaly_scores(torch.tensor([0.5]).double(), images, torch.tensor(2.0).double())
    assert scores["nats"].item() == 0.5 and scores["distance_from_mean"].item() == 1.5
    assert scores[f"nats_minus_{codec.lower()}"].item() == pytest.approx(0.5 - nats)


def test_the_table_is_that_of_the_images_and_the_mean_of_others(network_folder, tmp_path, capsys):  # noqa: F811
    (tmp_path / "odd").mkdir()
    for number in range(5):
        noise((8, 8), number).save(tmp_path / "odd" / f"{number}.png")
    words = ("--limit", "12", "--pictures", "0", "--against", str(tmp_path / "odd"))
    assert run(network_folder, tmp_path / "x.csv", *words) == 0
    said, network = capsys.readouterr().out, random_network(CONFIG)
    normal, odd = (PALETTE.quantize(read_images(s, 8, limit=12)[0]) for s in ("digits", str(tmp_path / "odd")))
    nats, others = (score(network, tokens).double().mean(1) for tokens in (normal, odd))
    pair, mean = (nats[1::2], others), nats[::2].mean()  # of images that are not compared
    files = [codec_nats(PALETTE.dequantize(part), "png") for part in (normal[1::2], odd)]
    expected = {"nats": pair, "distance_from_mean": [(part - mean).abs() for part in pair]}
    expected["nats_minus_png"] = [part - file for part, file in zip(pair, files, strict=True)]
    table = {name: row for name, *row in csv.reader((tmp_path / "x_auroc.csv").open())}
    by_image = list(csv.DictReader((tmp_path / "x_against.csv").open()))
    assert [row["set"] for row in by_image] == ["normal"] * 6 + ["anomaly"] * 5
    for name, pair in expected.items():
        auroc, fpr = brute_force(*(values.tolist() for values in pair))
        assert [float(word) for word in table[name]] == pytest.approx([auroc, fpr, 6, 6, 5], abs=1e-5)
        assert re.search(rf"^{name} +{auroc:.4f} +{fpr:.4f}$", said, re.M)
        assert [float(row[name]) for row in by_image] == pytest.approx(torch.cat(pair).tolist(), abs=2e-6)
    assert "5 images against 6; mean of 6 others: " in said
    with pytest.raises(SystemExit, match="needs at least 2 images"):
        run(network_folder, tmp_path / "y.csv", "--limit", "1", "--against", str(tmp_path / "odd"))
