"""The filter that makes images small: its bytes, and that runs, token caches, checkpoints and cards record it."""

import json
from pathlib import Path
from typing import get_args

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import lightning_igpt as igpt
from lightning_igpt.__main__ import main
from lightning_igpt.data.transforms import RandomCrop
from lightning_igpt.images import Filter, resize_center_crop
from lightning_igpt.weights.card import ModelCard
from tests.networks import random_network

IMAGES = [Image.fromarray(x) for x in np.random.default_rng(0).integers(0, 256, (8, 20, 24, 3), dtype=np.uint8)]
NETWORK = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 256, "image_size": 4, "tokens_per_pixel": 3}
FEATURES = datasets.Features({"image": datasets.Image()})
EXACT = {"accelerator": "cpu", "devices": 1, "precision": "32-true", "enable_progress_bar": False}
TOP_LEFT = {  # of the first image at 4 x 4: the first two pixels
    "bilinear": [[139, 119, 124], [130, 125, 107]],
    "bicubic": [[138, 121, 125], [133, 126, 104]],
    "box": [[142, 123, 132], [128, 128, 97]],
    "lanczos": [[136, 123, 125], [137, 124, 103]],
}


def resized(name):
    """uint8 (N, 3, 4, 4)."""
    arrays = [np.asarray(resize_center_crop(image, 4, name)) for image in IMAGES]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def dataset():
    return datasets.Dataset.from_dict({"image": IMAGES}, features=FEATURES)


def fit(folder, *, pretrained=None, **options):
    start = {"network": NETWORK, "palette": "rgb"} if pretrained is None else {"pretrained": str(pretrained)}
    module = igpt.PretrainModule(**start)
    data = igpt.PretrainDataModule(dataset(), batch_size=2, val_fraction=0.25, random_crop=False, **options)
    trainer = igpt.make_trainer(max_steps=1, default_root_dir=folder, **EXACT)
    trainer.fit(module, data)
    return trainer, data


@pytest.mark.parametrize("name", get_args(Filter))
def test_bytes_of_each_filter(name):
    assert resized(name)[0, :, 0, :2].T.tolist() == TOP_LEFT[name]
    assert resize_center_crop(IMAGES[0], 4).tobytes() == resize_center_crop(IMAGES[0], 4, "bilinear").tobytes()
    means = np.stack(IMAGES)[0, :, 2:22].reshape(4, 5, 4, 5, 3).mean((1, 3))
    assert np.abs(resized("box")[0].permute(1, 2, 0).numpy() - means).max() < 1  # Pillow rounds rows and columns


@pytest.mark.parametrize("name", get_args(Filter))
@pytest.mark.parametrize("kind", ["images", "cache", "stream"])
def test_data_modules_use_the_filter(tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    options = {"cache": "disk" if kind == "cache" else "none", "streaming": kind == "stream", "palette": "rgb"}
    common = {"image_size": 4, "batch_size": 8, "val_fraction": 0, "resize": name, "random_crop": False}
    data = igpt.PretrainDataModule(dataset(), **common, **options)
    data.setup()
    module = igpt.PretrainModule(NETWORK, "rgb")
    batch = next(iter(data.train_dataloader()))
    read = module.palette.dequantize(module.tokens_of(batch))
    assert sorted(read.flatten(1).tolist()) == sorted(resized(name).flatten(1).tolist())
    if kind == "cache":  # made again with another filter, not read from the cache
        data.resize = next(other for other in get_args(Filter) if other != name)
        again = module.palette.dequantize(module.tokens_of(next(iter(data.train_dataloader()))))
        assert sorted(again.flatten(1).tolist()) == sorted(resized(data.resize).flatten(1).tolist())


def test_random_crops_use_the_filter():
    crops = [RandomCrop(4, seed=0, filter=name)(IMAGES[0], 5).tobytes() for name in get_args(Filter)]
    assert len(set(crops)) == 4 and RandomCrop(4)(IMAGES[0], 5).tobytes() == crops[0]


def test_tokenize_uses_and_names_the_filter():
    tokens = igpt.tokenize(dataset(), "rgb", size=4, resize="lanczos")
    wanted = igpt.Palette.load("rgb").quantize(resized("lanczos"))
    assert tokens.with_format("torch")["tokens"][:].tolist() == wanted.tolist()
    assert "Resize filter: lanczos" in tokens.info.description


@pytest.mark.parametrize(
    "call",
    [
        lambda: igpt.PretrainDataModule(dataset(), resize="nearest"),
        lambda: igpt.tokenize(dataset(), resize="nearest"),
        lambda: ModelCard(resize="nearest"),
    ],
)
def test_other_filters_are_refused(call):
    with pytest.raises(ValueError, match=r"'nearest'.*bilinear, bicubic, box, lanczos"):
        call()


def test_runs_checkpoints_and_cards_record_it_and_the_network_keeps_it(tmp_path):
    trainer, _ = fit(tmp_path / "run", resize="box")
    (record,) = json.loads(next((tmp_path / "run").rglob("run.json")).read_text())["runs"]
    assert record["resize"] == "box" and record["data"]["hparams"]["resize"] == "box"
    loaded = igpt.load_pretrained(tmp_path / "run")
    assert loaded.card.resize == loaded.resize_filter == "box"
    igpt.save_pretrained(tmp_path / "hf", loaded.network, loaded.palette, card=loaded.card)
    assert "| resize filter | box (Pillow) |" in (tmp_path / "hf" / "README.md").read_text()
    assert igpt.load_pretrained(tmp_path / "hf").resize_filter == "box"
    _, data = fit(tmp_path / "next", pretrained=tmp_path / "hf")  # no resize= here: the network's
    assert data.resize_filter == "box"
    assert igpt.load_pretrained(tmp_path / "next").card.resize == "box"
    _, data = fit(tmp_path / "other", pretrained=tmp_path / "hf", resize="bicubic")
    assert data.resize_filter == "bicubic" and igpt.load_pretrained(tmp_path / "other").card.resize == "bicubic"
    assert igpt.load_pretrained("photos").card.resize is None  # not recorded
    assert igpt.load_pretrained("photos").resize_filter == igpt.PretrainDataModule().resize_filter == "bilinear"
    fresh = igpt.PretrainModule(NETWORK, "rgb")
    again = igpt.PretrainDataModule(dataset(), batch_size=2, val_fraction=0.25, random_crop=False)
    trainer = igpt.make_trainer(max_steps=2, default_root_dir=tmp_path / "run", **EXACT)
    trainer.fit(fresh, again, ckpt_path=next((tmp_path / "run").rglob("*.ckpt")))
    assert again.resize_filter == "box"


def test_verbs_use_the_networks_filter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network, palette = random_network(igpt.ImageGPTConfig(**NETWORK)), igpt.Palette.load("rgb")
    igpt.save_pretrained("hf", network, palette, card={"resize": "lanczos"})
    IMAGES[0].save("one.png")
    tokens = palette.quantize(resized("lanczos")[:1])
    assert main(["score", "--images", "one.png", "--pretrained", "hf", "--pictures", "0"]) == 0
    (line,) = Path("scores.csv").read_text().splitlines()[1:]
    assert float(line.split(",")[1]) == pytest.approx(3 * igpt.score(network, tokens).mean().item(), abs=1e-5)
    assert main(["complete", "--images", "one.png", "--pretrained", "hf", "--n_samples", "1"]) == 0
    drawn = np.array(Image.open("completions/000-one-sample1.png"))
    assert np.array_equal(drawn[:3], resized("lanczos")[0].permute(1, 2, 0).numpy()[:3])


def write_npz(path, n, *, first=1, side=4, **changed):
    data = np.random.default_rng(first).integers(0, 256, (n, 3 * side * side), dtype=np.uint8)
    arrays = {"data": data, "labels": np.arange(first, first + n), "mean": data.mean(0)} | changed
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return data


def test_downsampled_imagenet_is_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "imagenet32"
    folder.mkdir()
    written = {number: write_npz(folder / f"train_data_batch_{number}.npz", 2, first=number) for number in (10, 2)}
    held_out = write_npz(folder / "val_data.npz", 3, first=998)
    data = igpt.ProbeDataModule(str(folder), image_size=4, batch_size=4)
    data.setup()
    (train,), (val,) = data.train_dataloader(), data.val_dataloader()
    planes = np.concatenate([written[2], written[10]]).reshape(-1, 3, 4, 4)  # red, then green, then blue
    assert np.array_equal(train["image"].numpy(), planes) and train["label"].tolist() == [1, 2, 9, 10]
    assert np.array_equal(val["image"].flatten(1).numpy(), held_out) and val["label"].tolist() == [997, 998, 999]
    assert data.class_names[0] == "1" and data.num_classes == 1000
    again = write_npz(folder / "val_data.npz", 3, first=7)  # a changed file is read again
    data = igpt.ProbeDataModule(str(folder), image_size=4, batch_size=4)
    data.setup()
    assert np.array_equal(next(iter(data.val_dataloader()))["image"].flatten(1).numpy(), again)


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("train_data_batch_1", {"data": None}, "no array 'data'; it has labels, mean"),
        ("train_data_batch_1", {"data": np.zeros((2, 50), np.uint8)}, r"data uint8 \(2, 50\) and labels \(2,\)"),
        ("val_data", {"labels": np.array([0, 5])}, "labels from 0 to 5; they are 1 to 1000"),
        ("other", {}, "other.npz: the files are called train_data_batch_1.npz and val_data.npz"),
    ],
)
def test_other_archives_are_refused(tmp_path, monkeypatch, name, changed, message):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_npz(tmp_path / f"{name}.npz", 2, **changed)
    with pytest.raises(ValueError, match=message):
        igpt.PretrainDataModule(str(tmp_path / f"{name}.npz")).prepare_data()
