import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images

from lightning_igpt import lookup
from lightning_igpt import palette as palette_module
from lightning_igpt.palette import Palette

OPENAI_FILE = Path(palette_module.__file__).parent / "assets" / "openai_512.npy"
COLORS = [[-1.0, 0.0, 0.25], [0.5, -0.125, 1.0], [0.1, 0.2, 0.3]]


@pytest.fixture(scope="module")
def openai():
    return Palette.load("openai")


@pytest.fixture(scope="module")
def tiles():
    """Real images: uint8 (N, 3, 32, 32)."""
    images = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)[:, :, :416, :640]
    small = torch.nn.functional.interpolate(images.float(), scale_factor=0.5, mode="area").round().to(torch.uint8)
    return small[:, :, :192].unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)


def test_openai_palette_is_the_published_one(openai):
    assert hashlib.sha256(OPENAI_FILE.read_bytes()).hexdigest() == (
        "c614a3d27f02fd6cf02fbbaf9f02e2431fa202726f3e44750658a85eb226bebd"
    )
    array = np.load(OPENAI_FILE)
    assert openai.sha256 == hashlib.sha256(array.tobytes()).hexdigest()
    assert len(openai) == 512
    assert np.array_equal(openai.colors.numpy(), array)
    expected = [[0.88664436, 0.66188294, 0.38917464], [-0.6042559, -0.02295009, 0.54237974]]
    assert np.allclose(openai.colors[:2].numpy(), expected, rtol=0, atol=3e-8)


def test_openai_decodes_as_published(openai):
    published = np.rint(127.5 * (np.load(OPENAI_FILE) + 1.0))  # in float32, as in src/run.py
    assert np.array_equal(openai.rgb.numpy(), published)
    assert len(np.unique(openai.rgb.numpy(), axis=0)) == 512


def test_tokens_equal_those_of_transformers(openai, tiles):
    transformers = pytest.importorskip("transformers")
    processor = transformers.ImageGPTImageProcessorPil(clusters=openai.to_list(), do_resize=False)
    some = tiles[::3]  # it compares every pixel with every color
    expected = processor(list(some.permute(0, 2, 3, 1).numpy()), input_data_format="channels_last")["input_ids"]
    assert np.array_equal(openai.quantize(some).numpy(), np.stack(expected))


def test_a_palette_is_a_value(openai):
    same = Palette(torch.tensor(COLORS, dtype=torch.float64))
    assert Palette(COLORS) == same and hash(Palette(COLORS)) == hash(same)
    assert Palette(COLORS) != Palette(COLORS[::-1]) and Palette(COLORS) != "openai"
    with pytest.raises(AttributeError):
        same.colors = torch.zeros(3, 3)
    same.colors.fill_(0)
    same.rgb.fill_(0)
    assert same.to_list() == np.array(COLORS, dtype=np.float32).tolist()


@pytest.mark.parametrize(
    ("colors", "message"),
    [
        (np.zeros((4, 4)), r"shape is \(4, 4\)"),
        ([[0, 0, 0]], r"shape is \(1, 3\)"),
        (np.random.default_rng(0).uniform(-1, 1, (32769, 3)), r"shape is \(32769, 3\)"),
        ([[0, 0, 0], [0, float("nan"), 0]], r"in \[-1, 1\], not \[nan, nan\]"),
        ([[0, 0, 0], [0, 255, 128]], r"not \[0, 255\]; convert bytes by array / 127.5 - 1"),
        ([[0, 0, 0], [1, 1, 1], [-0.0, 0, 0]], r"color 2, \[0.0, 0.0, 0.0\], repeats an earlier color"),
        ([[0, 0, 0], [1, 1]], "real numbers"),
        (np.array([[{}, 1, 2], [1, 2, 3]], dtype=object), "real numbers"),
        (torch.zeros(2, 3, dtype=torch.complex64), "real numbers"),
        (torch.zeros(1).expand(10**12, 3), "shape is"),
        ("openai", "real numbers"),
    ],
)
def test_wrong_colors_are_refused(colors, message):
    with pytest.raises(ValueError, match=message):
        Palette(colors)


def _inference(quantize, x):
    with torch.device("meta"), torch.inference_mode():
        quantize(x)
        quantize(x.to("meta"))


class _Quantizer(torch.nn.Module):
    def __init__(self, quantize):
        super().__init__()
        self.forward = lambda x: quantize(x)


@pytest.mark.parametrize(
    "first_use",
    [
        lambda quantize, x: torch.export.export(_Quantizer(quantize), (x,)).module()(x),
        lambda quantize, x: torch.compile(quantize, backend="aot_eager")(x),
        _inference,
    ],
)
def test_nothing_is_kept_from_tracing(first_use):
    lookup._array.cache_clear()
    lookup._on_device.cache_clear()
    palette, x = Palette.load("gray:16"), torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4) * 2
    traced = first_use(palette.quantize, x)
    grays = (x.double().mean(1) / 17).flatten(1)  # the three bytes of a pixel span less than a step
    tokens = palette.quantize(x)
    assert type(tokens) is torch.Tensor and not tokens.is_inference() and (tokens - grays).abs().max() < 0.51
    assert traced is None or torch.equal(traced, tokens)
    kept = palette.quantize(x.to("meta"))
    assert type(kept) is torch.Tensor and not kept.is_inference()
    torch.nn.Embedding(16, 2)(tokens).sum().backward()


def test_tokens_follow_the_raster(openai):
    tokens = torch.randperm(512)[:15].view(1, 15)
    images = openai.rgb[tokens].view(1, 3, 5, 3).permute(0, 3, 1, 2)  # 3 high, 5 wide
    result = openai.quantize(images)
    assert result.dtype == torch.int64
    assert torch.equal(result, tokens)


@pytest.mark.parametrize("spec", ["gray:16", "openai"])
def test_images_of_tokens_give_the_tokens_back(spec):
    palette = Palette.load(spec)
    tokens = torch.arange(2 * 8 * 8).view(2, 64) % len(palette)
    images = palette.to_images(tokens)
    assert [(image.mode, image.size) for image in images] == [("RGB", (8, 8))] * 2
    assert np.array_equal(palette.transform(size=8)({"image": images})["tokens"], tokens.numpy())
    for form in (tokens.numpy().astype(np.uint16), tokens.tolist(), list(tokens)):
        assert palette.to_images(form) == images
    assert palette.to_images(tokens[1]) == palette.to_images(tokens[1].tolist(), size=8) == images[1:]
    assert palette.to_images([]) == palette.to_images(tokens[:0]) == []


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 3, 2, 2), TypeError, r"torch.float32 \(1, 3, 2, 2\); .*\* 255\).round\(\)"),
        (np.zeros((1, 3, 2, 2), dtype=np.uint8), TypeError, "uint8 tensor"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), ValueError, r"\(3, 2, 2\); use images\[None\]"),
        (torch.zeros(1, 4, 2, 2, dtype=torch.uint8), ValueError, r"\(1, 4, 2, 2\)"),
    ],
)
def test_wrong_images_are_refused(openai, images, error, message):
    with pytest.raises(error, match=message):
        openai.quantize(images)


def test_rmse_is_the_error_of_the_round_trip(openai, tiles):
    difference = openai.dequantize(openai.quantize(tiles)).double() - tiles.double()
    assert openai.rmse(tiles) == pytest.approx(float((difference**2).mean().sqrt()), rel=1e-6)
    assert Palette.load("gray:2").rmse(torch.tensor([0, 3, 255], dtype=torch.uint8).expand(1, 3, 1, 3)) == (
        pytest.approx(3**0.5)
    )


@pytest.mark.gpu
def test_a_cuda_device_gives_the_same(openai, tiles):
    tokens = openai.quantize(tiles.cuda())
    assert tokens.device.type == "cuda"
    assert torch.equal(tokens.cpu(), openai.quantize(tiles))
    assert torch.equal(openai.dequantize(tokens).cpu(), openai.dequantize(tokens.cpu()))
    assert openai.rmse(tiles.cuda()) == pytest.approx(openai.rmse(tiles), rel=1e-6)


def test_files_give_the_palette_back(tmp_path, openai, monkeypatch):
    openai.save(tmp_path / "new" / "p.npy")
    assert Palette.load(tmp_path / "new" / "p.npy") == openai
    monkeypatch.chdir(tmp_path)
    assert Palette.load("new/p.npy") == openai
    with pytest.raises(ValueError, match=r"\.npy"):
        openai.save(tmp_path / "p.bin")


def test_hugging_face_folders_give_the_palette(tmp_path, openai, monkeypatch):
    transformers = pytest.importorskip("transformers")
    transformers.ImageGPTImageProcessorPil(clusters=openai.colors.numpy()).save_pretrained(tmp_path / "owner" / "name")
    assert Palette.load(tmp_path / "owner" / "name") == openai
    assert Palette.load(str(tmp_path / "owner" / "name" / "preprocessor_config.json")) == openai
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)  # a path that exists wins over a hub id
    assert Palette.load("owner/name") == openai


def test_hub_ids_give_the_palette(tmp_path, monkeypatch):
    def download(repository, name):
        assert (repository, name) == ("owner/name", "preprocessor_config.json")
        (tmp_path / name).write_text(json.dumps({"clusters": COLORS}))
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert Palette.load("owner/name") == Palette(COLORS)


PATHS = ("https://example.com/p.npy", "./nowhere")


@pytest.mark.parametrize("spec", ["opnai", "gray:1", "gray:99999", "a/b/c", "owner/missing", None, *PATHS])
def test_other_names_are_refused(spec, monkeypatch):
    def offline(repository, name):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(FileNotFoundError if spec in PATHS else ValueError):
        Palette.load(spec)
