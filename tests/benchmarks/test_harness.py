import json
from argparse import Namespace

import pytest

from lightning_igpt.benchmarks import harness
from lightning_igpt.benchmarks.harness import Turns


def test_a_ratio_is_the_median_over_the_turns():
    ours, theirs = Turns((1.0, 4.0, 2.0)), Turns((2.0, 4.0, 10.0))
    assert ours.median == 2.0
    assert ours.ratio_to(theirs) == 2.0  # of 2, 1 and 5; that of the medians happens to be the same
    assert Turns((1.0, 1.0, 4.0)).ratio_to(Turns((3.0, 2.0, 20.0))) == 3.0
    with pytest.raises(ValueError, match="shorter"):
        ours.ratio_to(Turns((1.0,)))


def test_the_last_line_is_one_json_object(capsys):
    print("a table")
    options = Namespace(benchmark="x", device="cpu", repeats=3, preset="igpt_s")
    rows = {"ours": Turns((1.0, 2.0, 4.0)).times(0.5)}
    harness.print_result(options, rows, ratio_vs_peer=1.23456, fraction_of_limit=None)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == "x" and result["ratio_vs_peer"] == 1.235 and result["fraction_of_limit"] is None
    assert result["sides"] == {"ours": {"median_s": 1.0, "min_s": 0.5, "max_s": 2.0}}
    assert {"device", "threads", "cores", "versions", "preset"} < set(result)
