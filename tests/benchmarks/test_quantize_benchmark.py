import json

import pytest

from lightning_igpt.benchmarks import quantize
from lightning_igpt.palette import Palette

WORDS = ["--batch-size", "3", "--size", "8", "--peer-images", "2", "--repeats", "2"]
KEYS = {"benchmark", "ratio_vs_peer", "fraction_of_limit", "device", "threads", "cores", "versions", "sides"}


def test_the_last_line_is_json_with_every_side(capsys):
    quantize.main(WORDS)
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert set(result) == KEYS | {
        *("ratio_vs_peer_random_bytes", "mpx_per_s", "batch_size", "size"),
    }
    sides = {quantize.OURS, quantize.NOISE, quantize.PEER}
    assert set(result["mpx_per_s"]) == sides and set(result["sides"]) == sides | {"table from nothing"}
    assert result["ratio_vs_peer"] > 0 and result["fraction_of_limit"] > 0


def test_a_wrong_id_is_refused(monkeypatch):
    found = Palette.quantize

    def wrong(self, images):
        tokens = found(self, images)
        tokens[-1, -1] = (tokens[-1, -1] + 1) % 512
        return tokens

    monkeypatch.setattr(Palette, "quantize", wrong)
    with pytest.raises(RuntimeError, match=r"disagree.*transformers"):
        quantize.main(WORDS)
