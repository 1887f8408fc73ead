import json

import pytest

from lightning_igpt.benchmarks import probe

WORDS = ["--rows", "500", "--width", "8", "--layers", "2", "--classes", "3"]
KEYS = {"benchmark", "ratio_vs_peer", "fraction_of_limit", "device", "threads", "cores", "versions", "sides"}


def test_the_last_line_is_json_with_every_side(capsys):
    probe.main([*WORDS, "--repeats", "2"])
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert set(result) == KEYS | {"accuracy", "size"}
    assert set(result["sides"]) == {probe.OURS, probe.PEER, probe.EVALUATION}
    assert result["size"] == {"rows": 500, "width": 8, "layers": 2, "classes": 3}
    assert all(0.34 < value <= 1 for value in result["accuracy"].values())
    assert "layer 1:" in printed


def test_another_accuracy_is_refused(monkeypatch):
    fit = probe.fit_ours
    monkeypatch.setattr(probe, "fit_ours", lambda *given: tuple(-part for part in fit(*given)))
    with pytest.raises(RuntimeError, match=r"disagree.*accuracy on held-out rows, layer 0"):
        probe.main(WORDS)
