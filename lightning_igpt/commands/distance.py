"""``lightning-igpt distance``: how far completions, or whole samples, are from real images, with what decides it."""

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_igpt import __version__
from lightning_igpt.commands.arguments import check_file
from lightning_igpt.commands.complete import DEFAULT, pick_device
from lightning_igpt.commands.help import row
from lightning_igpt.commands.images import images_of, open_images, squares
from lightning_igpt.distances import fingerprint, frechet_distance, image_features, kernel_distance, load_extractor
from lightning_igpt.files import write_text
from lightning_igpt.sampling import completion_rows
from lightning_igpt.weights import Pretrained, load_pretrained

LEAST = 4  # images, of which a half has a covariance


def distance(
    source: str,
    pretrained: str = DEFAULT,
    features: str = DEFAULT,
    out: str = "distance.json",
    keep_rows: int | None = None,
    limit: int = 1000,
    temperature: float = 1.0,
    seed: int = 0,
    split: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    palette: str | None = None,
) -> None:
    """Measure how far a network's completions of real images are from the images: Frechet and kernel distance.

    Also prints two floors: the distance between random halves of the real images, to compare with that between one half
    and samples for the other; and the distance between the real images and the same images in the palette's colors.

    Args:
        features: Features to compare: the middle layer of a network of this package, named as in pretrained; a vision
            model of transformers, by hub id or folder, such as facebook/dinov2-base; or inception, as in published
            FIDs, with torch-fidelity.
        out: JSON file for the distances and settings. Missing folders are made.
        keep_rows: Given rows of pixels of each image; 0 draws whole images. Default: the upper half.
        limit: Number of images, evenly spread over the split. Frechet distances of few images are too large, so compare
            those of equal numbers only.
        temperature: Divides the logits: 1 is the network's own distribution.
        seed: Seed of the draws and of the halves.
    """
    check_file(out, "--out", "distance.json")
    place = pick_device(device)
    extractor = load_extractor(features).to(place)
    loaded = load_pretrained(pretrained, palette=palette)
    loaded.network.to(place)
    side = loaded.config.image_size
    rows = side // 2 if keep_rows is None else keep_rows
    opened, split = open_images(source, split)
    real = squares(images_of(opened, split, limit), side, loaded.resize_filter)[0]
    if len(real) < LEAST:
        raise ValueError(f"distances need {LEAST} images; {source}, split {split}, limit {limit} has {len(real)}")
    drawn, recolored = samples(loaded, real, batch_size, seed=seed, keep_rows=rows, temperature=temperature)
    x, y, z = (image_features(extractor, part, batch_size=batch_size) for part in (real, drawn, recolored))
    first, second = torch.from_numpy(np.random.default_rng(seed).permutation(len(real))).tensor_split(2)
    pairs = {"samples from real images": (x, y), "samples of one half from the other": (x[first], y[second])}
    pairs |= {"floor: real halves": (x[first], x[second]), "floor: palette": (x, z)}
    what = f"whole images of {side} x {side}" if not rows else f"completions of the lower {side - rows} of {side} rows"
    facts: dict[str, Any] = {"network": loaded.origin, "network_weights": fingerprint(loaded.network), "samples": what}
    facts |= {"temperature": temperature, "seed": seed, "source": source, "split": split, "n_images": len(real)}
    facts |= {"features": getattr(extractor, "title", features), "features_weights": fingerprint(extractor)}
    facts |= {"n_features": x.shape[1], "resize": f"{loaded.resize_filter} (Pillow) to {side} x {side}, then as needed"}
    for name, value in facts.items():
        print(row(name, str(value)))
    print(f"\n{'distance':<36}{'Frechet':>12}{'kernel':>12}   images")
    for name, pair in pairs.items():
        frechet, (kernel, deviation) = frechet_distance(*pair), kernel_distance(*pair, seed=seed)
        sizes = [len(part) for part in pair]
        print(f"{name:<36}{frechet:>12.4f}{kernel:>12.6f}   {sizes[0]} against {sizes[1]}")
        facts[name] = {"frechet": frechet, "kernel": kernel, "kernel_sd": deviation, "n_images": sizes}
    if features != "inception":
        print("These features are not Inception's: compare the numbers with each other, never with a published FID.")
    write_text(out, json.dumps({**facts, "version": __version__}, indent=2) + "\n")
    print(f"wrote {out}")


def samples(loaded: Pretrained, images: Tensor, batch_size: int, *, seed: int, **options: Any) -> tuple[Tensor, Tensor]:
    """One sample for each of the images, and the images in the palette's colors, uint8 (N, 3, S, S) each.

    Options are those of ``completion_rows``. The draws of an image depend on the seed and its number alone.
    """
    place, parts = loaded.network.wpe.weight.device, []
    for first in tqdm(range(0, len(images), batch_size), unit="batch", disable=None):
        tokens = loaded.palette.quantize(images[first : first + batch_size].to(place))
        seeds = [np.random.SeedSequence([seed, first + i]).generate_state(1)[0] for i in range(len(tokens))]
        own = [torch.Generator(place).manual_seed(int(number)) for number in seeds]
        parts.append(completion_rows(loaded.network, loaded.palette, tokens, n_samples=1, generator=own, **options))
    _, drawn, recolored = torch.cat([part.cpu() for part in parts]).unbind(1)
    return drawn, recolored
