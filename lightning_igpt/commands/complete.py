"""``lightning-igpt complete``: completions of the lower part of images, or of a hole in them."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_igpt.commands.arguments import check_folder
from lightning_igpt.commands.images import decoded, fitted
from lightning_igpt.decoding import Precision
from lightning_igpt.files import counted, shown
from lightning_igpt.images import BadImageError, decode, resize_center_crop
from lightning_igpt.pictures import CELL, image_grid, save_png, to_tensor
from lightning_igpt.sampling import captions, completion_rows
from lightning_igpt.weights import load_pretrained

DEFAULT, TEMPERATURE = "photos", 0.8  # the network that needs no training; small ones draw noise at 1
STEM = 100  # bytes of an image's name in those of its samples; file systems take 143 to 255 for the whole name


def complete(
    images: str,
    pretrained: str = DEFAULT,
    out: str = "completions",
    n_images: int = 8,
    n_samples: int = 4,
    keep_rows: int | None = None,
    mask: str | None = None,
    temperature: float = TEMPERATURE,
    top_k: int | None = None,
    top_p: float | None = None,
    steps: int | None = None,
    order: Literal["surest", "random"] | None = None,
    precision: Precision | None = None,
    seed: int = 0,
    split: str | None = None,
    device: str = "auto",
    palette: str | None = None,
) -> None:
    """Complete the lower part of images, or a hole, and write a grid of image, given part, samples and ground truth.

    Args:
        out: Folder for completions.png and one PNG per sample. Missing folders are made.
        n_images: Number of images, from the first.
        n_samples: Completions of each.
        keep_rows: Given rows of pixels; default three quarters.
        mask: Instead of keep_rows, an image file, cropped and resized like the images, to the nearest pixel: white
            pixels are redrawn, black or transparent ones kept. An autoregressive network ignores kept pixels after a
            hole; a BERT network sees them.
        temperature: Divides the logits: 1 is the network's own distribution, 0 always takes the likeliest color. Small
            networks look better slightly below 1.
        top_k: Draw among the k likeliest colors only.
        top_p: Draw among the fewest colors that together have this probability.
        steps: BERT networks only: passes over each image; default 8.
        order: BERT networks only: order in which pixels are drawn. Random order with a step per pixel and keep_rows 0
            samples whole pictures from the distribution that score bounds. Default: surest.
        precision: Number format of the weights: full; half, 16 bits; int8, on CPUs only. Default: half on CUDA, else
            full.
        seed: Seed of the draws.
    """
    check_folder(out, "--out")
    if mask is not None and (keep_rows, top_k, top_p) != (None, None, None):
        raise ValueError("mask replaces keep_rows, and inpainting has no top_k and top_p; drop keep_rows, top_k, top_p")
    loaded = load_pretrained(pretrained, palette=palette)
    size, resize = loaded.config.image_size, loaded.resize_filter
    passes = {name: value for name, value in (("steps", steps), ("order", order)) if value is not None}
    if passes and loaded.config.objective == "autoregressive":
        text = "steps and order are for BERT networks, and this one is autoregressive: it draws in raster order"
        raise ValueError(f"{text}; drop {' and '.join(passes)}")
    hole = None if mask is None else read_mask(mask, size)
    side = size * max(1, CELL // size)  # of an image in the grid
    opened = decoded(images, split=split, limit=n_images)
    parts = [(name, to_tensor(resize_center_crop(image, size, resize)), fitted(image, side)) for name, image in opened]
    names, pixels, photos = zip(*parts, strict=True)
    place = pick_device(device)
    precision = precision or ("half" if place.type == "cuda" else "full")
    what = f"{counted(len(pixels), 'image')} at {size} x {size}, {counted(n_samples, 'sample')} each"
    print(shown(f"{loaded.origin}: {what}, on {place} in {precision} precision"))
    loaded.network.to(place)
    tokens = loaded.palette.quantize(torch.stack(pixels)).to(place)
    options: dict[str, Any] = {"n_samples": n_samples, "seed": seed, "temperature": temperature, "precision": precision}
    line = 3 * size // 4 if keep_rows is None else keep_rows  # small networks continue a half badly
    options |= passes
    options |= {"keep_rows": line, "top_k": top_k, "top_p": top_p} if hole is None else {"hole": hole.to(place)}
    rows = completion_rows(loaded.network, loaded.palette, tokens, **options).cpu()
    folder = Path(out)
    whole = image_grid([photo[None] for photo in photos], scale=1, captions=["image"])
    grid = image_grid(rows, captions=captions(n_samples), line=line if hole is None else None)
    save_png(torch.cat([whole, grid], 2), folder / "completions.png")
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        stem = shown(Path(name).stem).encode()[:STEM].decode(errors="ignore")
        for sample in range(n_samples):
            save_png(row[1 + sample], folder / f"{number:03d}-{stem}-sample{sample + 1}.png")
    print(f"wrote {folder / 'completions.png'} and {counted(len(names) * n_samples, 'single sample')}")


def read_mask(path: str, size: int) -> Tensor:
    """The pixels nearer to white than to black in the middle square of an image file, bool (size * size,)."""
    try:
        image = decode({"path": str(Path(path).expanduser())}, background=(0, 0, 0)).convert("L")
    except BadImageError as error:
        raise ValueError(f"mask {path}: {error}") from error
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.NEAREST)
    hole = torch.from_numpy(np.array(square) >= 128).flatten()
    if not hole.any():
        raise ValueError(f"mask {path} has no white pixel at {size} x {size}; mark in white what to redraw")
    return hole


def pick_device(name: str) -> torch.device:
    """The device of this name, or ValueError; ``auto`` is the accelerator if there is one, else the CPU."""
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {name!r} is not available: {error}") from error
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
