import html
import json
import math
import re
from dataclasses import replace

import pytest
import torch
from PIL import Image

from lightning_igpt.__main__ import main
from lightning_igpt.commands import quickstart
from lightning_igpt.commands.quickstart import unigram_nats


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of everything, with a network small enough for seconds."""
    out = tmp_path_factory.mktemp("quickstart")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "NETWORK", replace(quickstart.NETWORK, n_layer=2, n_head=2, n_embd=16))
        patch.setattr(quickstart, "FINETUNE_STEPS", 2)
        assert main(["quickstart", "--out", str(out), "--steps", "4"]) == 0
    return out


@pytest.mark.slow
def test_report_json_holds_every_result_and_its_baseline(folder):
    report = json.loads((folder / "report.json").read_text())
    density, probe, few, tuned = (report[name] for name in ("pretrain", "probe", "few_labels", "finetune"))
    assert density["uniform_nats_per_pixel"] == pytest.approx(math.log(64))
    assert density["val_nats_per_pixel"] < density["uniform_nats_per_pixel"]  # four steps do that much
    assert 2.9 < density["unigram_nats_per_pixel"] < 3.1
    assert list(probe["accuracy_by_layer"]) == list(probe["untrained_accuracy_by_layer"]) == ["0", "1", "2"]
    assert probe["best_accuracy"] == probe["accuracy_by_layer"][str(probe["best_layer"])]
    assert probe["raw_pixels_accuracy"] == pytest.approx(0.525, abs=0.03)
    assert few["raw_pixels_accuracy"] == pytest.approx(0.41, abs=0.05) and 0 < few["accuracy"] < 1
    assert {"accuracy", "scratch_accuracy"} <= set(tuned) and report["seconds"] > 0
    assert report["settings"]["network"]["n_embd"] == 16


@pytest.mark.slow
def test_report_html_is_one_file(folder):
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("<img") == page.count("alt=") == 3 and page.count("<picture>") == 2
    assert not re.search(r'(src|href)="(?!data:)', page) and "<script" not in page and "http" not in page
    assert "$" not in re.sub(r"base64,[^\"]*", "", page)  # every placeholder was filled
    for name in ("completions.png", "probe_by_layer.png", "loss.png", "pretrain.ckpt"):
        assert (folder / name).stat().st_size > 1000


@pytest.mark.slow
def test_what_the_report_suggests_works(folder, monkeypatch):
    monkeypatch.chdir(folder)
    page = html.unescape((folder / "report.html").read_text(encoding="utf-8"))
    commands = re.findall(r"lightning-igpt (complete .*)$", page, re.MULTILINE)
    Image.new("RGB", (40, 30)).save(folder / "YOUR_PHOTO.jpg")
    assert [main(command.split()) for command in commands] == [0, 0]
    assert (folder / "completions" / "completions.png").is_file()


def test_unigram_is_the_smoothed_frequency_at_each_position():
    train, val = torch.tensor([[0, 1], [0, 2], [0, 2]]), torch.tensor([[0, 2], [1, 1]])
    expected = [math.log(6 / 4), math.log(6 / 3), math.log(6 / 1), math.log(6 / 2)]
    assert unigram_nats(train, val, 3) == pytest.approx(sum(expected) / 4)
