"""The benchmarks at toy size: each runs whole, and refuses to time sides that do not compute the same."""

import importlib
import json
from dataclasses import replace

import datasets
import pytest
import torch

from lightning_igpt.benchmarks import data, harness, probe, quantize, sample, train_step
from lightning_igpt.benchmarks.harness import Turns
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.palette import Palette

NETWORK = ["--preset", "igpt_tiny", "--batch-size", "2"]
WORDS = {
    "data": ["--images", "32", "--batch-size", "8"],
    "probe": ["--rows", "500", "--width", "8", "--layers", "2", "--classes", "3"],
    "quantize": ["--batch-size", "3", "--size", "8", "--peer-images", "2"],
    "sample": [*NETWORK, "--steps", "3", "--precision", "int8"],
    "train_step": [*NETWORK, "--layers", "2", "--width", "8", "--size", "6", "--precision", "32-true"],
}
TINY = ImageGPTConfig(n_layer=3, n_head=2, n_embd=16, image_size=4)


@pytest.fixture(autouse=True)
def toy(monkeypatch, tmp_path):
    """A small network, and a small product and copy for the machine's limits."""
    threads = torch.get_num_threads()
    monkeypatch.setitem(harness.MATRIX, "cpu", 64)
    monkeypatch.setitem(harness.COPIED_BYTES, "cpu", 2**16)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    for module in (sample, train_step):
        monkeypatch.setattr(module, "PRESETS", {"igpt_tiny": TINY})
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", WORDS)
def test_the_last_line_is_json_with_every_side(name, capsys):
    module = importlib.import_module(f"lightning_igpt.benchmarks.{name}")
    module.main([*WORDS[name], "--repeats", "2", "--device", "cpu"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["benchmark"] == name and result["fraction_of_limit"] > 0
    assert {"device", "threads", "cores", "versions", "repeats"} < set(result)
    for side in result["sides"].values():
        assert 0 < side["min_s"] <= side["median_s"] <= side["max_s"] and side["per_s"] > 0
        assert name != "train_step" or round(side["per_s"] * side["median_s"]) == 2 * 6 * 6
    ours = result["precision"] if name == "sample" else module.OURS
    turns = {side: result["sides"][side]["min_s"] for side in (ours, module.PEER)}
    assert 0 < result["ratio_vs_peer"] < 100 * turns[module.PEER] / turns[ours]


def test_a_ratio_is_the_median_over_the_turns():
    assert Turns((1.0, 1.0, 4.0)).ratio_to(Turns((3.0, 2.0, 20.0))) == 3.0


def wrong_sides(make):
    def wrong(*given):
        side = make(*given)
        return replace(side, logits=lambda pixel: 1.01 * side.logits(pixel))

    return wrong


def negative(right):
    return lambda *given, **options: tuple(-part for part in right(*given, **options))


WRONG = [
    (probe, "fit_logistic", negative, "accuracy on held-out"),
    (Palette, "quantize", lambda right: lambda *given: (right(*given) + 1) % 512, "of the ids"),
    (sample, "theirs", wrong_sides, "logits of transformers"),
    (sample, "ours", wrong_sides, "logits of full"),
    (train_step, "next_pixel_loss", lambda right: lambda *given: 1.01 * right(*given), "losses"),
]


@pytest.mark.parametrize(("home", "name", "spoil", "message"), WRONG)
def test_sides_that_disagree_are_refused(home, name, spoil, message, monkeypatch):
    module = quantize if home is Palette else home
    monkeypatch.setattr(home, name, spoil(getattr(home, name)))
    with pytest.raises(RuntimeError, match=f"differ.*{message}"):
        module.main([*WORDS[module.__name__.split(".")[-1]], "--repeats", "1", "--device", "cpu"])


def test_both_sides_train_alike():
    """Ten steps on the same pictures: the peer is trained with our optimizer's settings, and without dropout."""
    tokens = torch.randint(512, (2, 16), generator=torch.manual_seed(0))
    steps = train_step.make_steps(TINY, tokens, "32-true", compiled=False)
    losses = {name: torch.stack([step() for _ in range(10)]) for name, step in steps.items()}
    assert losses[train_step.OURS][-1] < losses[train_step.OURS][0] - 0.005
    torch.testing.assert_close(losses[train_step.OURS], losses[train_step.PEER], rtol=5e-4, atol=0)


@pytest.mark.parametrize("kind", data.SHARE)
def test_the_data_module_reads_what_bare_decoding_reads(kind, tmp_path):
    files = data.make_files(kind, 8)
    path = data.write_parquet(files, tmp_path / "a.parquet")
    images = next(data.batches(path, batch_size=8))["image"].permute(0, 2, 3, 1).numpy()
    bare = sorted(data.square(file).tobytes() for file in files)
    assert len(set(bare)) == 8 and sorted(pixels.tobytes() for pixels in images) == bare
