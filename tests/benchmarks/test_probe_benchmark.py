import json
from argparse import Namespace

import pytest
import torch

from lightning_igpt.benchmarks import harness, probe

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


def test_layers_are_seeded_and_standardised():
    options = Namespace(rows=400, width=6, layers=3, classes=4)
    x, y, x_held, y_held = probe.make_layer(1, options)
    assert x.shape == (400, 6) and x_held.shape == (80, 6) and len(y) == 400 and len(y_held) == 80
    torch.testing.assert_close(x.mean(0), torch.zeros(6), rtol=0, atol=1e-5)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(6), rtol=0, atol=1e-5)
    assert torch.equal(x, probe.make_layer(1, options)[0]) and not torch.equal(x, probe.make_layer(2, options)[0])


def test_the_time_of_all_layers_is_added_turn_by_turn():
    layers = [{"a": harness.Turns((1.0, 2.0))}, {"a": harness.Turns((3.0, 5.0))}]
    assert probe.together(layers, "a").seconds == (4.0, 7.0)
