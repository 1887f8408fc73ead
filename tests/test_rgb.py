"""Raw channels: the palette ``rgb``, three tokens per pixel, bits per dimension; everything else counts in pixels."""

import csv
import math
import threading

import datasets
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

import lightning_igpt as igpt
from lightning_igpt.__main__ import main
from lightning_igpt.commands.demo_studio import Ask, Studio
from lightning_igpt.objectives import draw_mask, per_pixel
from lightning_igpt.palette import Palette
from lightning_igpt.sampling import completion_rows
from lightning_igpt.weights import native
from lightning_igpt.weights.huggingface import compare_with_transformers
from lightning_igpt.weights.native import Pretrained, interpolate_positions
from tests.image_files import rows
from tests.networks import random_network, random_tokens

RGB = Palette.load("rgb")
FIELDS = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 256, "image_size": 4, "tokens_per_pixel": 3}
CONFIG = igpt.ImageGPTConfig(**FIELDS)
BERT = igpt.ImageGPTConfig(**FIELDS, objective="bert")
EXACT = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "enable_progress_bar": False, "logger": False}


def pictures(n=6, size=4, seed=0):
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def dataset_of(images):
    return rows(map(picture, images), [i % 2 for i in range(len(images))], ["a", "b"])


def picture(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def test_tokens_are_the_bytes_in_raster_order_and_come_back_exactly(tmp_path):
    images = pictures()
    images[0] = torch.arange(48).view(4, 4, 3).permute(2, 0, 1)  # red, green and blue of a pixel in succession
    tokens = RGB.quantize(images)
    assert tokens.shape == (6, 48) and tokens.dtype == torch.int64 and tokens[0].tolist() == list(range(48))
    assert torch.equal(RGB.dequantize(tokens), images) and RGB.rmse(images) == 0
    assert RGB.to_images(tokens)[1] == picture(images[1])
    old = {name: value for name, value in igpt.ImageGPTConfig().to_dict().items() if name != "tokens_per_pixel"}
    assert igpt.ImageGPTConfig.resolve(old).n_positions == 1024 and CONFIG.n_positions == 48
    RGB.save(tmp_path / "rgb.npy")
    for same in (Palette.load(tmp_path / "rgb.npy"), Palette(RGB.to_list()), Palette(RGB.colors)):
        assert same == RGB and same.spec == "rgb" and len(same) == 256 and same.tokens_per_pixel == 3
    assert Palette.load("gray:256") != RGB and Palette.load("gray:256").tokens_per_pixel == 1
    assert not (Palette.load("gray:255").is_exact or Palette.load("openai").is_exact)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Palette(-RGB.colors), "values of the bytes 0 to 255"),
        (lambda: RGB.dequantize(torch.zeros(1, 47, dtype=torch.long)), r"T = 3 \* 3\^2"),
        (lambda: igpt.ImageGPTConfig(vocab_size=256, tokens_per_pixel=2), "tokens_per_pixel is 2 and vocab_size 256"),
        (lambda: igpt.ImageGPTConfig(vocab_size=512, tokens_per_pixel=3), "3 with 256 values for the palette rgb"),
        (lambda: igpt.PretrainModule(FIELDS, "gray:256"), "1 token of the palette but 3 of the network"),
        (lambda: igpt.PretrainModule(FIELDS | {"tokens_per_pixel": 1}, "rgb"), "3 tokens of the palette but 1"),
        (lambda: igpt.save_pretrained("no", random_network(CONFIG), "gray:256"), "but 3 of the network"),
        (lambda: random_network(CONFIG)(torch.zeros(1, 16, dtype=torch.long)), "4 x 4 = 48 tokens, 3 of each pixel"),
        (lambda: igpt.complete(random_network(CONFIG), random_tokens(CONFIG)), "16 pixels and the image only 16"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def fit(palette, images, folder, objective="autoregressive", max_steps=1, **fields):
    size = {"image_size": images.shape[-1], "vocab_size": len(Palette.load(palette))}
    size["tokens_per_pixel"] = Palette.load(palette).tokens_per_pixel
    torch.manual_seed(0)
    module = igpt.PretrainModule(FIELDS | size | fields, palette, lr=0.02, objective=objective)
    data = igpt.PretrainDataModule(dataset_of(images), batch_size=len(images) // 12, val_fraction=0.3)
    trainer = igpt.make_trainer(max_steps=max_steps, default_root_dir=folder, **EXACT)
    (before,) = trainer.validate(module, data, verbose=False)
    trainer.fit(module, data)
    return before, {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize(
    ("palette", "objective", "bits", "uniform"),
    [
        ("rgb", "autoregressive", 8.0, 3 * math.log(256)),
        ("gray:256", "autoregressive", 8.0, math.log(256)),
        ("gray:16", "autoregressive", None, math.log(16)),
        ("rgb", "bert", None, 3 * math.log(256)),  # the mean over masked pixels is no likelihood
    ],
)
def test_the_zero_head_starts_at_8_bits_per_dimension(tmp_path, palette, objective, bits, uniform):
    before, after = fit(palette, pictures(24), tmp_path, objective)
    assert before.get("val/bits_per_dim") == (bits if bits is None else pytest.approx(bits, abs=1e-6))
    assert ("val/bits_per_dim" in after) == (bits is not None)
    assert before["val/nats_per_pixel"] == pytest.approx(uniform, abs=1e-5)
    assert after["train/nats_per_pixel"] == pytest.approx(uniform, abs=1e-5)  # of the first step


def test_training_reaches_the_entropy_of_independent_channels(tmp_path):
    generator = np.random.default_rng(0)
    values = [generator.choice([0, 85, 170, 255], (600, 3, 3)), generator.choice([10, 200], (600, 3, 3))]
    images = torch.from_numpy(np.stack([*values, np.full((600, 3, 3), 7)], 1).astype(np.uint8))
    _, metrics = fit("rgb", images, tmp_path, max_steps=250, n_layer=1, n_head=1)
    assert metrics["val/bits_per_dim"] == pytest.approx((2 + 1 + 0) / 3, abs=0.02)
    assert metrics["val/bits_per_pixel"] == pytest.approx(3 * metrics["val/bits_per_dim"], rel=1e-5)


def test_masks_hide_whole_pixels():
    masks = draw_mask(torch.arange(50), 48, seed=1, ratio=0.4, tokens_per_pixel=3)
    assert torch.equal(masks[:, ::3], draw_mask(torch.arange(50), 16, seed=1, ratio=0.4)) and masks.sum() / 2400 > 0.3
    of_module = igpt.PretrainModule(FIELDS, "rgb", objective="bert")._inputs({"image": pictures()}, 0)[1]
    for each in (masks, of_module):
        assert torch.equal(each.unflatten(1, (16, 3)).all(2), each.unflatten(1, (16, 3)).any(2)) and each.any()


@pytest.mark.parametrize("config", [CONFIG, BERT], ids=["autoregressive", "bert"])
def test_rows_and_holes_count_in_pixels(config):
    network, images = random_network(config), pictures(2)
    hole = torch.zeros(16, dtype=torch.bool).index_fill_(0, torch.tensor([5, 6, 9]), True)
    for options, hidden in (({"hole": hole}, hole), ({"keep_rows": 3}, torch.arange(16) >= 12)):
        rows = completion_rows(network, RGB, RGB.quantize(images), n_samples=2, **options).flatten(-2)
        assert torch.equal(rows[:, -1], images.flatten(-2))
        kept = (rows[:, 1:3] == rows[:, -1:]).all(2)  # (2, 2, pixels)
        assert kept[..., ~hidden].all() and not kept[..., hidden].all()
    seen, report = [], lambda _, known: seen.append(known.view(2, 16, 3))
    igpt.inpaint(network, RGB.quantize(images), (~hole).expand(2, -1), steps=3, on_progress=report)
    assert all(torch.equal(known.all(2), known.any(2)) for known in seen) and seen[-1].all() and len(seen) > 1


@pytest.mark.parametrize("kind", ["images", "cache", "tokens", "stream"])
def test_data_modules_give_the_bytes_by_every_way(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    images = pictures(12)
    source = datasets.DatasetDict({"train": dataset_of(images), "test": dataset_of(images)})
    source = source if kind in ("images", "cache") else igpt.tokenize(source, "rgb", size=4)
    options = {"cache": "disk" if kind == "cache" else "none", "streaming": kind == "stream", "palette": "rgb"}
    data = igpt.FineTuneDataModule(source, pad=1, image_size=4, batch_size=4, val_fraction=0, **options)
    data.setup()
    module = igpt.PretrainModule(FIELDS, "rgb")
    read = torch.cat([module.tokens_of(batch) for batch in data.test_dataloader()])
    assert torch.equal(RGB.dequantize(read), images)
    augmented = RGB.dequantize(module.tokens_of(next(iter(data.train_dataloader()))))  # moved as whole pixels
    moved, colors = ({tuple(c) for c in x.movedim(1, 3).reshape(-1, 3).tolist()} for x in (augmented, images))
    assert moved <= colors


def test_every_format_keeps_the_channels_and_transformers_agrees(tmp_path):
    network, head = random_network(CONFIG), torch.randn(3, 16)
    native.save_file(tmp_path / "x.safetensors", network, RGB)
    igpt.save_pretrained(tmp_path / "hf", network, RGB, card={"nats_per_pixel": 3 * math.log(2) * 4.5})
    text = (tmp_path / "hf" / "README.md").read_text()
    assert "| validation, bits per dimension | 4.5000 |" in text and "256 values of each channel" in text
    igpt.save_pretrained(tmp_path / "classifier", network, RGB, head=head)
    module = igpt.PretrainModule(FIELDS, "rgb")
    module.network.load_state_dict(network.state_dict())
    trainer = Trainer(**EXACT)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    for name in ("x.safetensors", "hf", "classifier", "x.ckpt"):
        loaded = igpt.load_pretrained(tmp_path / name)
        assert loaded.config == CONFIG and loaded.palette == RGB
        assert all(torch.equal(a, b) for a, b in zip(loaded.network.parameters(), network.parameters(), strict=True))
        larger = igpt.load_pretrained(tmp_path / name, image_size=6)
        for channel in range(3):  # positions are interpolated channel by channel
            wanted = interpolate_positions(network.wpe.weight.detach()[channel::3], 6)
            assert torch.allclose(larger.network.wpe.weight[channel::3], wanted, atol=1e-6)
    pytest.importorskip("transformers")
    for weight in (None, head):
        peer = compare_with_transformers(network, RGB, weight)
        assert peer.difference < 1e-4 * max(1, peer.largest)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rgb")
    igpt.save_pretrained(folder / "hf", random_network(CONFIG), RGB)
    (folder / "images").mkdir()
    for number, image in enumerate(pictures(5)):
        picture(image).save(folder / "images" / f"{number}.png")
    return folder


def test_verbs_count_in_pixels_and_score_adds_bits_per_dimension(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert main(["score", "--images", "images", "--pretrained", "hf", "--out", "scores.csv"]) == 0
    printed = capsys.readouterr().out
    nats = igpt.score(random_network(CONFIG), RGB.quantize(pictures(5)))
    assert torch.allclose(per_pixel(nats, 3), nats[:, 0::3] + nats[:, 1::3] + nats[:, 2::3])
    table = list(csv.DictReader((folder / "scores.csv").open()))
    for name, scale in {"nats_per_pixel": 3, "bits_per_dim": 1 / math.log(2)}.items():
        wanted = sorted((scale * nats.double().mean(1)).tolist(), reverse=True)
        assert [float(row[name]) for row in table] == pytest.approx(wanted, abs=1e-5)
    assert f"{nats.mean() / math.log(2):.4f} bits per dimension" in printed
    assert f"uniform: {3 * math.log(256):.4f}" in printed and (folder / "scores_surprise.png").exists()
    assert main(["complete", "--images", "images", "--pretrained", "hf", "--n_samples", "1", "--keep_rows", "2"]) == 0
    sample = Image.open(folder / "completions" / "000-0-sample1.png")
    assert sample.crop((0, 0, 4, 2)) == picture(pictures(5)[0][:, :2])
    assert main(["data", "show", "images", "--palette", "rgb", "--image_size", "4"]) == 0
    assert "the 256 values of each channel: RMSE 0.00" in capsys.readouterr().out


@pytest.mark.parametrize("config", [CONFIG, BERT], ids=["autoregressive", "bert"])
def test_the_demo_shows_a_number_per_pixel(config):
    studio = Studio(Pretrained(random_network(config), RGB, "test"), torch.device("cpu"))
    image = pictures(1)[0]
    seen = studio.seen(picture(image))["tokens"]
    assert seen == [red << 16 | green << 8 | blue for red, green, blue in image.flatten(1).T.tolist()]
    assert studio.start()["colors"] is None  # the page takes them from the numbers
    if config is CONFIG:
        score = studio.score(seen)
        assert len(score["nats"]) == len(score["heat"]) == 16
        assert score["uniform"] == pytest.approx(3 * math.log(256))
    for ask in (Ask(seen, keep_rows=2, n_samples=2), Ask(seen, hole=[5, 6], n_samples=2)):
        drawn, events = {}, []
        studio.draw(ask, events.append, threading.Event())
        assert "seconds" in events[-1], events[-1]
        for event in events[1:-1]:
            drawn |= dict(zip(event["positions"][0], event["tokens"][0], strict=True))
        assert sorted(drawn) == (ask.hole or list(range(8, 16))) and all(0 <= code < 1 << 24 for code in drawn.values())
