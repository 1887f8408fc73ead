import json
from dataclasses import replace

import pytest

from lightning_igpt.benchmarks import sample
from lightning_igpt.config import ImageGPTConfig

WORDS = ["--preset", "igpt_tiny", "--batch-size", "2", "--repeats", "2", "--steps", "3", "--device", "cpu"]
KEYS = {"benchmark", "ratio_vs_peer", "fraction_of_limit", "device", "threads", "cores", "versions", "sides"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    config = ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, image_size=4)
    monkeypatch.setattr(sample, "PRESETS", {"igpt_tiny": config})


def test_the_last_line_is_json_with_every_side(capsys):
    sample.main([*WORDS, "--precision", "int8"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert set(result) >= KEYS and set(result["sides"]) == {"full", "half", "int8", sample.PEER}
    assert result["precision"] == "int8"
    assert result["logits_off"]["full"] < 1e-5 < result["logits_off"]["half"] < result["logits_off"]["int8"]
    assert "without a cache" in printed


@pytest.mark.parametrize(("name", "factor"), [("theirs", 1.01), ("ours", 1.0001)])
def test_other_logits_are_refused(monkeypatch, name, factor):
    make = getattr(sample, name)

    def wrong(*given):
        side = make(*given)
        return replace(side, logits=lambda pixel: factor * side.logits(pixel))

    monkeypatch.setattr(sample, name, wrong)
    with pytest.raises(RuntimeError, match=r"disagree.*logits of"):
        sample.main(WORDS)
