"""``lightning-igpt score``: how surprising images are to a network."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from lightning_igpt import sampling
from lightning_igpt.commands.arguments import run_function
from lightning_igpt.commands.complete import pick_device
from lightning_igpt.commands.images import read_images
from lightning_igpt.objectives import nats_to_bits
from lightning_igpt.weights import load_pretrained


def score(
    pretrained: str,
    images: str,
    out: str = "scores.csv",
    limit: int | None = None,
    split: str | None = None,
    batch_size: int = 32,
    device: str = "auto",
) -> None:
    """Write the surprise of each image in nats per pixel, the most surprising first, and print the mean.

    Args:
        pretrained: An autoregressive network: a .ckpt file or run folder, a Hugging Face folder or hub id, or an OpenAI
            checkpoint.
        images: An image file, a folder of images, Parquet, a hub id, or digits.
        out: The CSV file.
        limit: How many images, from the first on; default all.
        split: Split of a data set; default test, else validation, else train.
        batch_size: Images per forward pass.
        device: cpu, cuda, mps, or auto.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    loaded = load_pretrained(pretrained)
    print(loaded.origin)
    pixels, names = read_images(images, loaded.config.image_size, split=split, limit=limit)
    place = pick_device(device)
    tokens = loaded.palette.quantize(pixels)
    nats = sampling.score(loaded.network.to(place), tokens, batch_size=batch_size).mean(1).double().cpu()
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "nats_per_pixel", "bits_per_pixel"])
        for index in nats.argsort(descending=True).tolist():
            writer.writerow([names[index], f"{nats[index]:.6f}", f"{nats_to_bits(nats[index].item()):.6f}"])
    mean, error = nats.mean().item(), nats.std(correction=0).item() / math.sqrt(len(nats))
    uniform = math.log(loaded.config.vocab_size)
    print(f"{len(names)} images: {mean:.4f} +- {error:.4f} nats per pixel (uniform: {uniform:.4f}); wrote {path}")


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    return run_function(score, words, "score")
