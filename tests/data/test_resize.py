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
from tests.image_files import rows
from tests.networks import random_network

IMAGES = [Image.fromarray(x) for x in np.random.default_rng(0).integers(0, 256, (8, 20, 24, 3), dtype=np.uint8)]
DATASET = rows(IMAGES, [0] * 8)
NETWORK = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 256, "image_size": 4, "tokens_per_pixel": 3}
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


def make_data(**options):
    data = igpt.PretrainDataModule(DATASET, image_size=4, random_crop=False, **options)
    data.setup()
    return data


def fit(folder, ckpt_path=None, *, pretrained=None, max_steps=1, **options):
    """The filter that the data module used."""
    start = {"network": NETWORK, "palette": "rgb"} if pretrained is None else {"pretrained": str(pretrained)}
    data = make_data(batch_size=2, val_fraction=0.25, **options)
    trainer = igpt.make_trainer(max_steps=max_steps, default_root_dir=folder, **EXACT)
    trainer.fit(igpt.PretrainModule(**start), data, ckpt_path=ckpt_path)
    return data.resize_filter


@pytest.mark.parametrize("name", get_args(Filter))
def test_bytes_of_each_filter(name):
    assert resized(name)[0, :, 0, :2].T.tolist() == TOP_LEFT[name]
    assert resize_center_crop(IMAGES[0], 4).tobytes() == resize_center_crop(IMAGES[0], 4, "bilinear").tobytes()
    crops = [RandomCrop(4, filter=other)(IMAGES[0], 5).tobytes() for other in get_args(Filter)]
    assert len(set(crops)) == 4 and RandomCrop(4)(IMAGES[0], 5).tobytes() == crops[0]
    means = np.stack(IMAGES)[0, :, 2:22].reshape(4, 5, 4, 5, 3).mean((1, 3))
    assert np.abs(resized("box")[0].permute(1, 2, 0).numpy() - means).max() < 1  # Pillow rounds rows and columns


@pytest.mark.parametrize("name", get_args(Filter))
@pytest.mark.parametrize("kind", ["images", "cache", "stream"])
def test_data_modules_use_the_filter(tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    where = {"cache": "disk" if kind == "cache" else "none", "streaming": kind == "stream", "palette": "rgb"}
    data = make_data(batch_size=8, val_fraction=0, resize=name, **where)
    module = igpt.PretrainModule(NETWORK, "rgb")
    tokens = igpt.tokenize(DATASET, "rgb", size=4, resize=name)
    assert tokens["tokens"][:] == module.palette.quantize(resized(name)).tolist()
    assert f"Resize filter: {name}" in tokens.info.description
    for used in (name, "box"):  # a token cache is made again for another filter
        data.resize = used
        read = module.palette.dequantize(module.tokens_of(next(iter(data.train_dataloader()))))
        assert sorted(read.flatten(1).tolist()) == sorted(resized(used).flatten(1).tolist())


@pytest.mark.parametrize("call", [make_data, ModelCard, lambda resize: igpt.tokenize(DATASET, resize=resize)])
def test_other_filters_are_refused(call):
    with pytest.raises(ValueError, match=r"'nearest'.*bilinear, bicubic, box, lanczos"):
        call(resize="nearest")


def test_runs_checkpoints_and_cards_record_it_and_the_network_keeps_it(tmp_path):
    run, folder = tmp_path / "run", tmp_path / "hf"
    assert fit(run, resize="box") == "box"
    (record,) = json.loads(next(run.rglob("run.json")).read_text())["runs"]
    assert record["resize"] == "box" and record["data"]["hparams"]["resize"] == "box"
    loaded = igpt.load_pretrained(run)
    igpt.save_pretrained(folder, loaded.network, loaded.palette, card=loaded.card)
    assert "| resize filter | box (Pillow) |" in (folder / "README.md").read_text()
    for name, options in {"box": {}, "bicubic": {"resize": "bicubic"}}.items():  # the network's, unless one is given
        assert fit(tmp_path / name, pretrained=folder, **options) == name
        assert igpt.load_pretrained(tmp_path / name).card.resize == name
    assert fit(run, next(run.rglob("*.ckpt")), max_steps=2) == "box"  # resumed
    igpt.save_pretrained(tmp_path / "none", loaded.network, loaded.palette)
    unknown = igpt.load_pretrained(tmp_path / "none")
    assert unknown.card.resize is None and unknown.resize_filter == make_data().resize_filter == "bilinear"


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
    drawn = Image.open("completions/000-one-sample1.png")
    assert drawn.crop((0, 0, 4, 3)) == palette.to_images(tokens)[0].crop((0, 0, 4, 3))


def write_npz(path, numbers, **changed):
    data = np.random.default_rng(numbers[0]).integers(0, 256, (len(numbers), 48), dtype=np.uint8)
    arrays = {"data": data, "labels": np.array(numbers), "mean": data.mean(0)} | changed
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return torch.from_numpy(data).view(-1, 3, 4, 4)  # red, then green, then blue


def test_downsampled_imagenet_is_a_source(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (folder := tmp_path / "imagenet").mkdir()
    last, first = (write_npz(folder / f"train_data_batch_{n}.npz", [n, n + 1]) for n in (10, 2))
    for held_out in ([998, 999, 1000], [7, 8, 9]):  # the second time the file has changed
        images = write_npz(folder / "val_data.npz", held_out)
        data = igpt.ProbeDataModule(str(folder), image_size=4, batch_size=4)
        data.setup()
        (train,), (val,) = data.train_dataloader(), data.val_dataloader()
        assert torch.equal(train["image"], torch.cat([first, last])) and train["label"].tolist() == [1, 2, 9, 10]
        assert torch.equal(val["image"], images) and (val["label"] + 1).tolist() == held_out
        assert data.num_classes == 1000 and data.class_names[0] == "1"


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
    write_npz(tmp_path / f"{name}.npz", [1, 2], **changed)
    with pytest.raises(ValueError, match=message):
        igpt.PretrainDataModule(str(tmp_path / f"{name}.npz")).prepare_data()
