"""``lightning-igpt score``: how surprising images are to a network, as numbers and as pictures."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from lightning_igpt import sampling
from lightning_igpt.commands.arguments import run_function
from lightning_igpt.commands.complete import pick_device
from lightning_igpt.commands.images import read_images
from lightning_igpt.commands.places import check_file
from lightning_igpt.data.readers import OnBadImage
from lightning_igpt.objectives import nats_to_bits
from lightning_igpt.palette import Palette
from lightning_igpt.pictures import color_bar, contact_sheet, heading, heat_map, image_grid, save_png, stack
from lightning_igpt.weights import load_pretrained

PRINTED = 5  # rows of the list
LEAST = 4  # least surprising images on the sheet, for contrast


def score(
    pretrained: str,
    images: str,
    out: str = "scores.csv",
    pictures: int = 16,
    limit: int | None = None,
    split: str | None = None,
    batch_size: int = 32,
    device: str = "auto",
    on_bad_image: OnBadImage = "error",
    palette: str | None = None,
) -> None:
    """Write the surprise of each image in nats per pixel and draw that of each pixel; print the mean.

    Args:
        pretrained: An autoregressive network: a .ckpt file or run folder, a Hugging Face folder or hub id, or an OpenAI
            checkpoint. On ILSVRC validation images at 32 x 32 the released S, M and L have 2.0895, 2.0614 and 2.0466
            nats per pixel, says OpenAI's README.
        images: An image file, a folder of images, Parquet, a hub id, or digits.
        out: The CSV file, most surprising image first. Missing folders are made.
        pictures: How many of the most surprising images to draw beside their heat maps, in a PNG file next to the CSV
            file, scores_surprise.png for scores.csv; 0 draws none.
        limit: How many images, from the first on; default all.
        split: Split of a data set; default test, else validation, else train.
        batch_size: Images per forward pass.
        device: cpu, cuda, mps, or auto.
        on_bad_image: What to do with an image that cannot be read: error stops; skip names it and goes on.
        palette: The palette that the network was trained with, where the source holds none: openai, gray:16, a .npy
            file, a Hugging Face folder or hub id.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    if pictures < 0:
        raise ValueError(f"pictures is {pictures}; it must be at least 0, which draws none")
    path = Path(out)
    drawn = path.with_name(f"{path.stem}_surprise.png")
    check_file(path, "--out", "scores.csv")
    if pictures:
        check_file(drawn, "--out", "scores.csv")
    loaded = load_pretrained(pretrained, palette=palette)
    print(loaded.origin)
    sampling.check_has_likelihood(loaded.network)
    pixels, names = read_images(images, loaded.config.image_size, split=split, limit=limit, on_bad_image=on_bad_image)
    network = loaded.network.to(pick_device(device))
    tokens = loaded.palette.quantize(pixels)  # (N, T)
    nats = sampling.score(network, tokens, batch_size=batch_size).cpu()  # (N, T)
    per_image = nats.mean(1, dtype=torch.float64)
    check_finite(per_image, names)
    ranked = [(names[index], per_image[index].item()) for index in ranking(per_image)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(ranked, path)
    print(summary(per_image, math.log(loaded.config.vocab_size)))
    print("\n".join(ranked_list(ranked)))
    print(f"wrote {path}")
    if pictures:
        save_png(surprise_sheet(tokens, nats, names, loaded.palette, pictures=pictures), drawn)
        print(f"wrote {drawn}")


def ranking(per_image: Tensor) -> list[int]:
    """Indices of images, the most surprising first; of equals the earlier one."""
    return per_image.argsort(descending=True, stable=True).tolist()


def check_finite(per_image: Tensor, names: Sequence[str]) -> None:
    """Insist that a network gave numbers.

    Args:
        per_image: Float (N,), nats per pixel of each image.
        names: Of the images.

    Raises:
        ValueError: A number is not finite; the message names the image.
    """
    for name, nats in zip(names, per_image.tolist(), strict=True):
        if not math.isfinite(nats):
            raise ValueError(f"{name}: its surprise is {nats}; the network's weights are damaged, or training diverged")


def write_csv(ranked: Sequence[tuple[str, float]], path: Path) -> None:
    """Write (name, nats per pixel) of each image, with bits."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "nats_per_pixel", "bits_per_pixel"])
        writer.writerows([name, f"{nats:.6f}", f"{nats_to_bits(nats):.6f}"] for name, nats in ranked)


def summary(per_image: Tensor, uniform: float) -> str:
    """Mean and standard error of the mean (the sample standard deviation over the root of n), in words.

    Args:
        per_image: Float64 (N,), nats per pixel of each image.
        uniform: ln K.
    """
    n, mean = len(per_image), f"{per_image.mean():.4f}"
    if n == 1:
        return f"1 image: {mean} nats per pixel (no standard error from one image; uniform: {uniform:.4f})"
    error = per_image.std().item() / math.sqrt(n)
    return f"{n} images: {mean} +- {error:.4f} nats per pixel (mean, standard error, n = {n}; uniform: {uniform:.4f})"


def ranked_list(ranked: Sequence[tuple[str, float]]) -> list[str]:
    """The first rows of the list as lines of a table."""
    lines = [f"{'rank':>6}  {'nats per pixel':>14}  image"]
    return lines + [f"{rank:>6}  {nats:>14.4f}  {name}" for rank, (name, nats) in enumerate(ranked[:PRINTED], 1)]


def surprise_sheet(tokens: Tensor, nats: Tensor, names: Sequence[str], palette: Palette, *, pictures: int) -> Tensor:
    """The most surprising images and a few of the least, each beside its heat map, with a legend.

    One scale serves the whole sheet. It passes ln K, where a colour is no likelier than by a uniform guess, and ends
    where one in a hundred of the pixels shown lies above.

    Args:
        tokens: int64 (N, T).
        nats: Float (N, T), the surprise of each pixel.
        names: Of the N images.
        palette: Of the tokens.
        pictures: How many of the most surprising.

    Returns:
        uint8 (3, h, w).
    """
    per_image = nats.mean(1, dtype=torch.float64)
    n, side, uniform = len(names), math.isqrt(nats.shape[1]), math.log(len(palette))
    ranked = list(enumerate(ranking(per_image), 1))
    shown, split = ranked[:pictures] + ranked[max(pictures, n - LEAST) :], min(pictures, n)
    indices = [index for _, index in shown]
    high = max(1.25 * uniform, float(np.quantile(nats[indices].numpy(), 0.99)))
    colors = torch.from_numpy(matplotlib.colormaps["magma"](np.arange(256), bytes=True)[:, :3])  # (256, 3)
    heat = heat_map(nats[indices].view(-1, side, side), colors, high=high)
    pairs = torch.stack([palette.dequantize(tokens[indices]).cpu(), heat], 1)  # (n, 2, 3, S, S)
    cells = torch.stack([image_grid(pair[None], gap=4) for pair in pairs])
    lines = [(f"{rank}: {per_image[index]:.3f} nats per pixel", names[index]) for rank, index in shown]
    ticks = {"0": 0.0, f"{uniform:.2f} (uniform)": uniform / high, f"{high:.2f} or more": 1.0}
    parts = [heading("surprise of each pixel in nats"), color_bar(colors, ticks)]
    parts += [heading(f"the most surprising of {n} images"), contact_sheet(cells[:split], lines[:split])]
    if split < len(shown):
        parts += [heading("the least surprising"), contact_sheet(cells[split:], lines[split:])]
    return stack(parts)


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    return run_function(score, words, "score")
