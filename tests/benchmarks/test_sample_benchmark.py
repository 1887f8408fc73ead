import json

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
    sample.main([*WORDS, "--precision", "int8", "--compile"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert set(result) >= KEYS and set(result["sides"]) == {"full", "half", "int8", sample.PEER}
    assert result["precision"] == "int8" and result["steps_per_turn"] == 3
    assert result["logits_off"]["full"] < 1e-5 < result["logits_off"]["half"] < result["logits_off"]["int8"]
    assert "--compile" in printed and "without a cache" in printed


def test_other_logits_are_refused(monkeypatch):
    right = sample.Theirs.logits
    monkeypatch.setattr(sample.Theirs, "logits", lambda self, pixel: 1.01 * right(self, pixel))
    with pytest.raises(RuntimeError, match=r"disagree.*logits of transformers, cached differ"):
        sample.main(WORDS)


def test_wrong_steps_of_ours_are_refused(monkeypatch):
    right = sample.Ours.logits
    monkeypatch.setattr(sample.Ours, "logits", lambda self, pixel: 1.0001 * right(self, pixel))
    with pytest.raises(RuntimeError, match=r"disagree.*logits of full differ"):
        sample.main(WORDS)


def test_every_turn_begins_at_the_same_position(monkeypatch):
    lengths = []
    right = sample.Ours.logits
    monkeypatch.setattr(
        sample.Ours, "logits", lambda self, pixel: lengths.append(self.decoder.cache.length) or right(self, pixel)
    )
    sample.main(WORDS)
    assert set(lengths) == {7, 8, 9}  # sos and 6 pixels given, of 16


def test_bytes_of_a_step():
    config = ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=32, image_size=4)
    weights = 2 * 12 * 16**2 + 32 * 16
    assert sample.step_bytes(config, 3, 5, 0.5, 2) == weights / 2 + 2 * 2 * 3 * 16 * 5 * 2
