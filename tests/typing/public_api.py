"""A user's program with every public name, as README writes them. It is never run: type checkers read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import datasets
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

import lightning_igpt as igpt
from lightning_igpt import ImageGPT, Palette  # names imported by themselves are seen, too


def network_and_palette() -> tuple[ImageGPT, Palette]:
    config = igpt.ImageGPTConfig(
        n_layer=2, n_head=2, n_embd=64, vocab_size=16, image_size=8, objective="autoregressive"
    )
    assert_type(config.n_positions, int)
    assert_type(igpt.PRESETS["igpt_s"], igpt.ImageGPTConfig)
    presets: Mapping[str, igpt.ImageGPTConfig] = igpt.PRESETS
    network = igpt.ImageGPT(presets["igpt_tiny"])
    module: torch.nn.Module = network
    assert_type(module.training, bool)
    cache = igpt.KVCache(config, 2, device="cpu")
    assert_type(cache.length, int)
    fitted = igpt.fit_palette(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), 16, seed=0)
    assert_type(fitted, igpt.Palette)
    return network, igpt.Palette.load("gray:16")


def tokens_and_back(network: ImageGPT, palette: Palette, images: Tensor) -> Tensor:
    tokens = palette.quantize(images)
    assert_type(tokens, Tensor)
    samples = igpt.complete(network, tokens[:, :32], n_samples=3, temperature=0.9, top_p=0.95)
    filled = igpt.inpaint(network, tokens, tokens > 3, steps=4)
    assert_type(igpt.score(network, filled), Tensor)
    assert_type(palette.sha256, str)
    return palette.dequantize(samples.flatten(0, 1))


def train(images: Tensor) -> Path | None:
    network = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 16, "image_size": 8}
    module = igpt.PretrainModule(network, palette="gray:16")
    Trainer(max_steps=8).fit(module, DataLoader(TensorDataset(images), batch_size=32, shuffle=True))

    data = igpt.PretrainDataModule("digits", batch_size=32)
    trainer = igpt.make_trainer(max_steps=40, default_root_dir="runs/pretrain")
    assert_type(trainer, Trainer)
    trainer.fit(module, data, ckpt_path=igpt.find_checkpoint("runs/pretrain"))

    probe = igpt.ProbeModule(pretrained="runs/pretrain", layers="all", c=1.0)
    trainer.test(probe, igpt.ProbeDataModule("digits"))
    assert_type(probe.accuracy_by_layer, dict[int, float])
    classifier = igpt.FineTuneModule(pretrained="runs/pretrain", num_classes=10)
    trainer.fit(classifier, igpt.FineTuneDataModule("digits", batch_size=32, pad=0, flip=False))

    modules: list[LightningModule] = [module, probe, classifier]
    parts: list[LightningDataModule] = [data]
    print(modules, parts)
    return igpt.find_checkpoint("runs/pretrain", module)


def weights(rows: datasets.Dataset) -> str:
    loaded = igpt.load_pretrained("runs/pretrain", image_size=16)
    assert_type(loaded.network, igpt.ImageGPT)
    assert_type(loaded.palette, igpt.Palette)
    card = igpt.ModelCard(title="Cats", data="me/cats", license="mit")
    igpt.save_pretrained("exported", loaded.network, loaded.palette, card=card)
    igpt.save_pretrained(Path("exported"), loaded.network, loaded.palette, card={"license": "mit"})
    igpt.tokenize(rows, "gray:16", size=8).save_to_disk("tokens")
    assert_type(igpt.__version__, str)
    return igpt.push_to_hub("me/cats", loaded.network, loaded.palette, card=loaded.card, private=True)
