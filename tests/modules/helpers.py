"""A tiny network, tiny data and a quiet trainer for the tests of modules and callbacks."""

import lightning
import torch
from torch.utils.data import DataLoader

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.modules import ProbeModule

TINY = ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=8, image_size=4)
BERT = ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=8, image_size=4, objective="bert")


def labelled_images(n=32, classes=3, seed=0):
    """Images whose class is a brightness, with noise: learnable in a few steps."""
    generator = torch.manual_seed(seed)
    labels = torch.arange(n) % classes
    levels = labels.float() * 200 / max(1, classes - 1) + 20
    noise = torch.randint(-20, 21, (n, 3, 4, 4), generator=generator)
    return (levels[:, None, None, None] + noise).clamp(0, 255).to(torch.uint8), labels


def loader(n=32, batch_size=8, classes=3, shuffle=False):
    images, labels = labelled_images(n, classes)
    rows = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    return DataLoader(rows, batch_size=batch_size, shuffle=shuffle)


def quiet_trainer(folder, **options):
    options = {"logger": False, "accelerator": "cpu", "devices": 1} | options
    return lightning.Trainer(default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False, **options)


def probe(**options):
    torch.manual_seed(0)
    return ProbeModule(network=TINY, palette="gray:8", num_classes=3, **options)


def deep_probe(**options):
    torch.manual_seed(0)
    return ProbeModule(network={**TINY.to_dict(), "n_layer": 5}, palette="gray:8", num_classes=3, **options)


def noisy_loader(n, seed=0, batch_size=50, start=0):
    """Classes that overlap, so that layers and strengths differ; with sample numbers."""
    generator = torch.manual_seed(seed)
    labels = torch.arange(n) % 3
    images = labels[:, None, None, None] * 25 + torch.randint(0, 190, (n, 3, 4, 4), generator=generator)
    rows = [
        {"image": image, "label": label, "sample": start + number}
        for number, (image, label) in enumerate(zip(images.to(torch.uint8), labels, strict=True))
    ]
    return DataLoader(rows, batch_size=batch_size)


def features_of(module, data, layers, masks=None):
    """Features (N, layers, D) and labels (N,), by the network itself."""
    parts = []
    for batch in data:
        masked = None if masks is None else masks(batch["sample"])
        tokens = module.palette.quantize(batch["image"])
        parts.append((module.network.features(tokens, layers, masked=masked).detach(), batch["label"]))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))
