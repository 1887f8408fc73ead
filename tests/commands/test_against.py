import csv
import io
import math
import re
import subprocess
import sys

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
        ([1, 2], [3, 4], (1, 0)),
        ([3, 4], [1, 2], (0, 1)),
        ([2, 2], [2, 2], (1 / 2, 1)),
        ([-500, 800, 801], [800.5, 900], (5 / 6, 1 / 3)),  # a sigmoid in float32 would make most of them equal
        ([*range(20)], [0.5, *[50] * 19], ((19 * 20 + 1) / 400, 0)),  # 19 of 20 are 95 %
    ],
)
def test_auroc_and_fpr_by_hand(normal, anomalous, expected):
    found = detection(*(torch.tensor(values, dtype=torch.float64) for values in (normal, anomalous)))
    assert found == pytest.approx(expected, abs=1e-6) and found == pytest.approx(
        brute_force(normal, anomalous), abs=1e-6
    )


def test_auroc_and_fpr_with_ties_equal_brute_force_and_scikit_learn():
    generator = torch.manual_seed(0)
    normal = torch.randint(0, 40, (90,), generator=generator).double() / 7 - 2
    anomalous = torch.randint(10, 60, (61,), generator=generator).double() / 7 - 2
    found = detection(normal, anomalous)
    assert found == pytest.approx(brute_force(normal.tolist(), anomalous.tolist()), abs=1e-6)
    theirs = roc_auc_score([0] * 90 + [1] * 61, torch.cat([normal, anomalous]))
    assert found[0] == pytest.approx(theirs, abs=1e-6)


def test_scores_are_nats_and_files_in_nats_of_the_same_pixels():
    images = torch.from_numpy(np.stack([noise((8, 8)), np.zeros((8, 8, 3), np.uint8)])).permute(0, 3, 1, 2)
    nats = torch.tensor([2.5, 0.5], dtype=torch.float64)
    scores = anomaly_scores(nats, images, torch.tensor(1.0, dtype=torch.float64))
    assert scores["nats"].tolist() == [2.5, 0.5] and scores["distance_from_mean"].tolist() == [1.5, 0.5]
    for codec in ("png", "webp"):
        files = [scores["nats"][i] - scores[f"nats_minus_{codec}"][i] for i in range(2)]
        assert torch.equal(torch.stack(files), codec_nats(images, codec)) and files[0] > files[1] + 5
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(file := io.BytesIO(), "PNG", optimize=True)
    bits = 8 * len(file.getvalue())
    assert codec_nats(images, "png")[0].item() == pytest.approx(bits * math.log(2) / 64)
    file = io.BytesIO()
    Image.fromarray(images[0].permute(1, 2, 0).numpy()).save(file, "WEBP", lossless=True, quality=100, method=6)
    assert np.array_equal(np.array(Image.open(file).convert("RGB")), images[0].permute(1, 2, 0))  # nothing is lost
    assert codec_nats(images, "webp")[0].item() == pytest.approx(8 * len(file.getvalue()) * math.log(2) / 64)


def test_the_table_is_that_of_the_images_and_the_mean_of_others(network_folder, tmp_path, capsys):  # noqa: F811
    (tmp_path / "odd").mkdir()
    for number in range(5):
        noise((8, 8), number).save(tmp_path / "odd" / f"{number}.png")
    words = ("--limit", "12", "--pictures", "0", "--against", str(tmp_path / "odd"))
    assert run(network_folder, tmp_path / "x.csv", *words) == 0
    said, network = capsys.readouterr().out, random_network(CONFIG)
    normal, odd = (PALETTE.quantize(read_images(s, 8, limit=12)[0]) for s in ("digits", str(tmp_path / "odd")))
    nats, others = (score(network, tokens).double().mean(1) for tokens in (normal, odd))
    mean = nats[::2].mean()  # of images that are not compared
    files = [codec_nats(PALETTE.dequantize(tokens), "png") for tokens in (normal[1::2], odd)]
    expected = {
        "nats": (nats[1::2], others),
        "distance_from_mean": ((nats[1::2] - mean).abs(), (others - mean).abs()),
        "nats_minus_png": (nats[1::2] - files[0], others - files[1]),
    }
    table = {row["score"]: row for row in csv.DictReader((tmp_path / "x_auroc.csv").open())}
    by_image = list(csv.DictReader((tmp_path / "x_against.csv").open()))
    assert [row["set"] for row in by_image] == ["normal"] * 6 + ["anomaly"] * 5
    for name, pair in expected.items():
        auroc, fpr = brute_force(*(values.tolist() for values in pair))
        row = table[name]
        assert (float(row["auroc"]), float(row["fpr_at_95_tpr"])) == pytest.approx((auroc, fpr), abs=1e-5)
        assert (row["n_mean"], row["n_normal"], row["n_anomaly"]) == ("6", "6", "5")
        assert re.search(rf"^{name} +{auroc:.4f} +{fpr:.4f}$", said, re.M)
        assert [float(row[name]) for row in by_image] == pytest.approx(torch.cat(pair).tolist(), abs=2e-6)
    assert "5 images against 6; 6 others gave the mean" in said
    assert len(list(csv.reader((tmp_path / "x.csv").open()))) == 13  # as without --against
    with pytest.raises(SystemExit, match="needs at least 2 images"):
        run(network_folder, tmp_path / "y.csv", "--limit", "1", "--against", str(tmp_path / "odd"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--against", "nowhere"], "against nowhere does not exist"),
        (["--n_draws", "5"], "n_draws is 5; it must be even and at least 4"),
        (["--agains", "x"], "unrecognized arguments: --agains"),
    ],
)
def test_wrong_usage_is_answered_before_torch_is_imported(words, message):
    code = "import sys\nfrom lightning_igpt.__main__ import main\ntry:\n    main(sys.argv[1:])\n"
    code += "finally:\n    assert 'torch' not in sys.modules"
    words = [sys.executable, "-c", code, "score", "--images", "digits", *words]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode in (1, 2) and message in done.stderr and "Traceback" not in done.stderr
