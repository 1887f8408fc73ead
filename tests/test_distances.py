"""Distances against closed forms, scipy and one process; features of every kind; the verb. Nothing is downloaded."""

import importlib.util
import json
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from lightning_igpt import distances
from lightning_igpt.__main__ import main
from lightning_igpt.commands.distance import samples
from lightning_igpt.commands.images import read_images
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.distances import fingerprint, frechet_distance, image_features, kernel_distance, load_extractor
from lightning_igpt.palette import Palette
from lightning_igpt.weights import load_pretrained, save_pretrained
from tests.networks import random_network
from tests.processes import in_processes

CONFIG = ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=16, image_size=8)
BERT = ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=16, image_size=8, objective="bert")
PALETTE = Palette.load("gray:16")


def correlated(n, width=6, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(n, width, generator=generator, dtype=torch.float64) @ mixed + shift


def standard(n, width):
    """Rows whose mean is 0 and whose covariance is the unit matrix, exactly."""
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = rows - rows.mean(0)
    return torch.linalg.qr(rows)[0] * (n - 1) ** 0.5


@pytest.mark.parametrize(
    ("mean", "scale", "expected"),
    [
        ([0, 0, 0], [1, 1, 1], 0),
        ([3, 4, 0], [1, 1, 1], 25),  # |m|^2
        ([0, 0, 0], [2, 3, 0.5], 1 + 4 + 0.25),  # sum of (s - 1)^2
        ([1, 0, 2], [0, 1, 5], 5 + 1 + 0 + 16),  # a covariance without an inverse
    ],
)
def test_frechet_distance_of_normal_distributions(mean, scale, expected):
    x = standard(50, 3)
    y = standard(40, 3) * torch.tensor(scale) + torch.tensor(mean)
    assert frechet_distance(x, y) == pytest.approx(expected, abs=1e-6)
    assert frechet_distance(y, x) == pytest.approx(expected, abs=1e-6)


def test_frechet_distance_against_scipy():
    x, y = correlated(80), correlated(60, seed=1, shift=0.5)
    (m, c), (n, d) = ((part.mean(0).numpy(), np.cov(part.numpy().T)) for part in (x, y))
    expected = ((m - n) ** 2).sum() + np.trace(c + d - 2 * scipy.linalg.sqrtm(c @ d).real)
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_against_its_definition():
    x, y = correlated(7), correlated(7, seed=1)
    kernel = lambda a, b: (float(a @ b) / 6 + 1) ** 3  # noqa: E731
    inside = sum(kernel(a[i], a[j]) for a in (x, y) for i in range(7) for j in range(7) if i != j) / (7 * 6)
    across = sum(kernel(a, b) for a in x for b in y) / 49
    assert kernel_distance(x, y) == (pytest.approx(inside - 2 * across, rel=1e-9), 0)


def test_subsets_of_the_kernel_distance_are_drawn_by_the_seed_alone(monkeypatch):
    monkeypatch.setattr(distances, "SUBSET_SIZE", 20)
    x, y, state = correlated(60), correlated(50, seed=1), torch.get_rng_state()
    _, deviation = first = kernel_distance(x, y, seed=3)
    assert torch.equal(torch.get_rng_state(), state) and deviation > 0
    torch.rand(5)
    assert kernel_distance(x, y, seed=3) == first != kernel_distance(x, y, seed=4)


def test_processes_give_what_one_process_gives(monkeypatch, tmp_path):
    monkeypatch.setattr(distances, "SUBSET_SIZE", 30)
    x, y = correlated(60), correlated(45, seed=1, shift=0.3)
    expected = frechet_distance(x, y), *kernel_distance(x, y, seed=2)

    def work(rank):
        torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=rank, world_size=2)
        mine = (x[:35], x[35:])[rank], (y[:15], y[15:])[rank]  # of unequal length
        got = frechet_distance(*mine), *kernel_distance(*mine, seed=2)
        (tmp_path / f"{rank}.json").write_text(json.dumps(got))
        torch.distributed.destroy_process_group()

    assert in_processes(work) == [0, 0]
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(1, 6), (5, 4), (5, 6, 1)])
def test_features_that_have_no_distance(shape):
    with pytest.raises(ValueError, match=re.escape(f"features are [5, 6] and {list(shape)}")):
        frechet_distance(torch.zeros(5, 6), torch.zeros(shape))


class Colors(nn.Module):
    """A tiny fixed extractor: mean and brightest value of each channel."""

    def forward(self, images):
        flat = images.float().flatten(2)
        return torch.cat([flat.mean(2), flat.amax(2)], 1)


def test_features_of_a_module():
    images = torch.randint(0, 256, (10, 3, 8, 8), dtype=torch.uint8)
    expected = torch.cat([images.double().mean((2, 3)), images.amax((2, 3)).double()], 1)
    extractor = load_extractor(Colors())
    for batch_size in (3, 64):
        torch.testing.assert_close(
            image_features(extractor, images, batch_size=batch_size), expected, rtol=1e-6, atol=0
        )
    for wrong in (images.float(), images.float().flatten(1) / 0):
        with pytest.raises(ValueError, match="must be \\(B, D\\), all of them finite"):
            image_features(nn.Identity(), wrong)


@pytest.mark.parametrize("config", [CONFIG, BERT])
def test_features_of_the_middle_layer(config, tmp_path):
    network = random_network(config)
    save_pretrained(tmp_path, network, PALETTE)
    extractor = load_extractor(str(tmp_path))
    images = read_images("digits", 8, limit=5)[0]
    tokens = PALETTE.quantize(images)
    masked = torch.zeros_like(tokens, dtype=torch.bool) if config is BERT else None
    expected = network.features(tokens, [1], masked=masked)[:, 0].double()
    torch.testing.assert_close(image_features(extractor, images, batch_size=2), expected)
    plain = torch.tensor([0, 80, 160, 255], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    torch.testing.assert_close(image_features(extractor, plain), image_features(extractor, plain[..., :8, :8]))
    before = fingerprint(extractor)
    extractor.network.wte.weight.data[0, 0] += 1e-3
    assert before == fingerprint(load_extractor(str(tmp_path))) != fingerprint(extractor)


def test_features_of_a_model_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=8)
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    images = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    pixels = processor(images=list(images.permute(0, 2, 3, 1).numpy()), return_tensors="pt")["pixel_values"]
    for kind, pooled in ((transformers.ViTModel, True), (transformers.ViTForImageClassification, False)):
        model = kind(config).eval()
        model.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        extractor = load_extractor(str(tmp_path))
        outputs = getattr(model, "vit", model)(pixels)
        expected = outputs.pooler_output if pooled else outputs.last_hidden_state.mean(1)
        torch.testing.assert_close(image_features(extractor, images), expected.detach().double(), rtol=1e-4, atol=1e-5)
        assert ("pooled output" in extractor.title) == pooled
    model.save_pretrained(tmp_path, state_dict={"vit.layernorm.weight": torch.ones(8)})
    with pytest.raises(ValueError, match=r"its weights lack .*; such features would be random"):
        load_extractor(str(tmp_path))


@pytest.mark.parametrize("config", [CONFIG, BERT])
def test_draws_of_an_image_do_not_depend_on_the_batch(config, tmp_path):
    save_pretrained(tmp_path, random_network(config), PALETTE)
    loaded, images = load_pretrained(tmp_path), read_images("digits", 8, limit=7)[0]
    options = {"seed": 5, "keep_rows": 4, "temperature": 1.0}
    drawn, recolored = samples(loaded, images, 3, **options)
    assert torch.equal(recolored, PALETTE.dequantize(PALETTE.quantize(images)))
    assert torch.equal(drawn[:, :, :4], recolored[:, :, :4]) and not torch.equal(drawn, recolored)
    assert torch.equal(drawn, samples(loaded, images, 64, **options)[0])
    assert torch.equal(drawn[:2], samples(loaded, images[:2], 1, **options)[0])
    twins = samples(loaded, images[:1].expand(2, -1, -1, -1), 2, **options)[0]
    assert not torch.equal(*twins) and not torch.equal(drawn, samples(loaded, images, 3, **options | {"seed": 6})[0])


@pytest.fixture
def network_folder(tmp_path):
    save_pretrained(tmp_path / "network", random_network(CONFIG), PALETTE)
    return str(tmp_path / "network")


def run(folder, out, *words):
    options = {"--pretrained": folder, "--source": "digits", "--limit": "20", "--out": str(out)}
    return main(["distance", *(word for pair in options.items() for word in pair), *words])


def test_the_verb_reports_distances_floors_and_what_decides_them(network_folder, tmp_path, capsys):
    assert run(network_folder, tmp_path / "a.json", "--seed", "1", "--features", network_folder) == 0
    said, made = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    for name in ("temperature", "seed", "source", "split", "n_images", "features", "features_weights", "resize"):
        assert f"\n{name:<18}{made[name]}\n" in said
    assert made["features"].startswith("layer 1 of ") and made["resize"].startswith("bilinear (Pillow) to 8 x 8")
    assert "never with a published FID" in said and made["samples"] == "completions of the lower 4 of 8 rows"
    measured = {name: value for name, value in made.items() if isinstance(value, dict)}
    for name, value in measured.items():
        assert f"{name:<36}{value['frechet']:>12.4f}{value['kernel']:>12.6f}" in said
    loaded = load_pretrained(network_folder)
    images = read_images("digits", 8)[0][[i * 360 // 20 for i in range(20)]]  # evenly spread
    drawn, recolored = samples(loaded, images, 64, seed=1, keep_rows=4, temperature=1.0)
    x, y, z = (image_features(load_extractor(network_folder), part) for part in (images, drawn, recolored))
    first, second = np.split(np.random.default_rng(1).permutation(20), 2)
    pairs = ((x, y), (x[first], y[second]), (x[first], x[second]), (x, z))
    for value, pair in zip(measured.values(), pairs, strict=True):
        assert value["frechet"] == pytest.approx(frechet_distance(*pair), rel=1e-6, abs=1e-5)
        assert value["kernel"] == pytest.approx(kernel_distance(*pair)[0], rel=1e-5, abs=1e-7)
        assert value["n_images"] == [*map(len, pair)]
    assert run(network_folder, tmp_path / "c.json", "--keep_rows", "0") == 0
    assert json.loads((tmp_path / "c.json").read_text())["samples"] == "whole images of 8 x 8"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--limit", "3"], "distances need 4 images; digits, split test, limit 3 has 3"),
        (["--features", "inception", "--pretrained", "no/where"], r"\.\[inception\]"),
        (["--features", "nowhere"], "nowhere does not exist"),
        (["--split", "dev"], "has no split 'dev'"),
        (["--keep_rows", "8"], "keep_rows is 8"),
        (["--temperature", "-1"], "temperature is -1"),
    ],
)
def test_mistakes(network_folder, tmp_path, monkeypatch, words, told):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch_fidelity" else find(name))
    with pytest.raises(SystemExit, match=told) as stop:
        run(network_folder, tmp_path / "x.json", *words)
    assert "\n" not in str(stop.value.code) and not (tmp_path / "x.json").exists()
