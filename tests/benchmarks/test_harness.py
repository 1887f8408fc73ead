import json
from argparse import Namespace

import pytest
import torch

from lightning_igpt.benchmarks import harness
from lightning_igpt.benchmarks.harness import Turns


def test_a_ratio_is_the_median_over_the_turns():
    ours, theirs = Turns((1.0, 4.0, 2.0)), Turns((2.0, 4.0, 10.0))
    assert ours.median == 2.0
    assert ours.ratio_to(theirs) == 2.0  # of 2, 1 and 5; that of the medians happens to be the same
    assert Turns((1.0, 1.0, 4.0)).ratio_to(Turns((3.0, 2.0, 20.0))) == 3.0
    with pytest.raises(ValueError, match="shorter"):
        ours.ratio_to(Turns((1.0,)))


def test_sides_take_turns():
    calls = []
    found = harness.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warm_up=2)
    assert calls == ["a", "b"] * 5
    assert list(found) == ["a", "b"] and all(len(turns.seconds) == 3 for turns in found.values())
    assert all(seconds >= 0 for turns in found.values() for seconds in turns.seconds)


def test_the_largest_difference_is_a_share():
    assert harness.largest_difference(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 4.0])) == 0.25
    assert harness.largest_difference(torch.zeros(2), torch.zeros(2)) == 0


def test_the_last_line_is_one_json_object(capsys):
    print("a table")
    options = Namespace(benchmark="x", device="cpu", repeats=3, preset="igpt_s")
    rows = {"ours": Turns((1.0, 2.0, 4.0)).times(0.5)}
    harness.print_result(options, rows, ratio_vs_peer=1.23456, fraction_of_limit=None)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == "x" and result["ratio_vs_peer"] == 1.235 and result["fraction_of_limit"] is None
    assert result["sides"] == {"ours": {"median_s": 1.0, "min_s": 0.5, "max_s": 2.0}}
    assert {"device", "threads", "cores", "versions", "preset"} < set(result)
