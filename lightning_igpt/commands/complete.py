"""``lightning-igpt complete``: what a trained network makes of the upper part of your images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_igpt.callbacks import captions, completion_rows
from lightning_igpt.commands.arguments import run_function
from lightning_igpt.commands.images import read_images
from lightning_igpt.pictures import image_grid, save_png
from lightning_igpt.weights import load_pretrained


def complete(
    pretrained: str,
    images: str,
    out: str = "completions",
    n_images: int = 8,
    n_samples: int = 4,
    keep_rows: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    split: str | None = None,
    device: str = "auto",
) -> None:
    """Complete the lower part of images and write a grid: what was given, samples, the truth.

    Args:
        pretrained: The network: a .ckpt file or run folder, a Hugging Face folder or hub id, or an OpenAI checkpoint.
        images: An image file, a folder of images, Parquet, a hub id, or digits.
        out: Folder for completions.png and one PNG per sample.
        n_images: How many images, from the first on.
        n_samples: Completions of each.
        keep_rows: Rows of pixels that the network is given; default half of them.
        temperature: Divides the logits: 1 is the network's own distribution, 0 always takes the likeliest colour.
        top_k: Draw among the k likeliest colours only.
        top_p: Draw among the fewest colours that together have this probability.
        seed: Of the draws.
        split: Split of a data set; default test, else validation, else train.
        device: cpu, cuda, mps, or auto.
    """
    loaded = load_pretrained(pretrained)
    size = loaded.config.image_size
    pixels, names = read_images(images, size, split=split, limit=n_images)
    place = pick_device(device)
    print(f"{loaded.origin}: {len(pixels)} images at {size} x {size}, {n_samples} samples each, on {place}")
    rows = completion_rows(
        loaded.network.to(place),
        loaded.palette,
        loaded.palette.quantize(pixels).to(place),
        n_samples=n_samples,
        keep_rows=keep_rows,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    ).cpu()
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        for sample in range(n_samples):
            save_png(row[1 + sample], folder / f"{number:03d}-{Path(name).stem}-sample{sample + 1}.png")
    save_png(image_grid(rows, captions=captions(n_samples)), folder / "completions.png")
    print(f"wrote {folder / 'completions.png'} and {len(names) * n_samples} single samples beside it")


def pick_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is the accelerator if there is one, else the CPU.

    Raises:
        ValueError: There is no such device here.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {name!r} is not to be had here: {error}") from error
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    return run_function(complete, words, "complete")
