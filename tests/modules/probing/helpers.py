"""Small probes, and data on which layers and strengths differ."""

import torch
from torch.utils.data import DataLoader

from lightning_igpt.modules import ProbeModule
from tests.modules.helpers import TINY


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


def accuracy(classifier, features, labels):
    weight, bias = classifier
    return ((features @ weight.T + bias).argmax(1) == labels).float().mean().item()
