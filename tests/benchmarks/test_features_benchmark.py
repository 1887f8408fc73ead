import json

import pytest

from lightning_igpt.benchmarks import features
from lightning_igpt.config import ImageGPTConfig

WORDS = ["--preset", "igpt_tiny", "--batch-size", "2", "--repeats", "2"]
KEYS = {"benchmark", "ratio_vs_peer", "fraction_of_limit", "device", "threads", "cores", "versions", "sides"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    config = ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, image_size=4)
    monkeypatch.setattr(features, "PRESETS", {"igpt_tiny": config})


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_the_last_line_is_json_with_every_side(precision, capsys):
    features.main([*WORDS, "--precision", precision])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(result) == KEYS | {"times_forward", "largest_difference", "preset", "batch_size", "precision"}
    assert set(result["sides"]) == {features.FORWARD, features.ALL, features.MIDDLE, features.PEER}
    assert set(result["times_forward"]) == set(result["sides"]) - {features.FORWARD}
    assert result["precision"] == precision and result["largest_difference"] < 1e-5


def test_other_features_are_refused(monkeypatch):
    found = features.their_features
    monkeypatch.setattr(features, "their_features", lambda theirs, tokens: 1.01 * found(theirs, tokens))
    with pytest.raises(RuntimeError, match=r"disagree.*features differ by 9\.9e-03"):
        features.main(WORDS)
