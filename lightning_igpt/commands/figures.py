"""``lightning-igpt figures``: pictures of a palette, a network and its runs, for a page or a talk."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_igpt import sampling
from lightning_igpt.callbacks import captions, completion_rows
from lightning_igpt.commands.arguments import run_function
from lightning_igpt.commands.complete import pick_device
from lightning_igpt.commands.figures_diagrams import raster_figure, shift_figure, taps_figure
from lightning_igpt.commands.figures_draw import (
    Draw,
    completions_figure,
    palette_figure,
    quantised_figure,
    save_both,
    surprise_figure,
)
from lightning_igpt.commands.figures_runs import run_figures
from lightning_igpt.commands.images import read_originals
from lightning_igpt.commands.places import check_folder
from lightning_igpt.commands.score import check_finite
from lightning_igpt.data.readers import OnBadImage
from lightning_igpt.images import resize_center_crop
from lightning_igpt.palette import Palette
from lightning_igpt.weights import Pretrained, load_pretrained

SIZES = (32, 64)  # at which images are shown without a network
QUANTISED = 4  # images of that figure, at most
PHOTO = 256  # side of an original in pixels, at most
BATCH = 32  # images per forward pass
OF_IMAGES, OF_A_NETWORK, OF_RUNS = ("palette", "quantised"), ("completions", "surprise"), ("curves", "layers")
DIAGRAMS: dict[str, Draw] = {"raster": raster_figure, "shift": shift_figure, "taps": taps_figure}


def figures(
    out: str = "figures",
    pretrained: str | None = None,
    images: str | None = None,
    runs: str | None = None,
    palette: str | None = None,
    only: str | None = None,
    n_images: int = 8,
    n_samples: int = 4,
    seed: int = 0,
    split: str | None = None,
    device: str = "auto",
    on_bad_image: OnBadImage = "error",
) -> None:
    """Write pictures of a palette, a network and its runs, each as NAME.png and, for a dark page, NAME-dark.png.

    Always palette and quantised: the colours, and photos beside what resizing and palette leave of them. With
    --pretrained also completions and surprise, the latter not of BERT networks; with --runs curves and layers.

    Args:
        out: Folder for the PNG files; those of the same name are replaced. Missing folders are made.
        pretrained: The network: a .ckpt file or run folder, a Hugging Face folder or hub id, or an OpenAI checkpoint.
        images: An image file, a folder of images, Parquet, a hub id, or digits. Default: the two photographs that come
            with scikit-learn.
        runs: Folder of a run, or one with runs below it: nats per pixel of pretraining, accuracy by layer of probes.
        palette: openai, gray:K, a .npy file, a Hugging Face folder or a hub id; default the network's, else openai.
        only: Some figures only, by name, with commas between: palette, quantised, completions, surprise, curves,
            layers, and the diagrams raster, shift and taps, which are drawn only where they are named here.
        n_images: How many images, from the first on.
        n_samples: Completions of each.
        seed: Of the draws.
        split: Split of a data set; default test, else validation, else train.
        device: cpu, cuda, mps, or auto.
        on_bad_image: What to do with an image that cannot be read: error stops; skip names it and goes on.
    """
    check_folder(out, "--out")
    names = wanted(only, has_network=pretrained is not None, has_runs=runs is not None)
    if n_images < 1:
        raise ValueError(f"asked for {n_images} images; it takes 1 at least")
    if n_samples < 1:
        raise ValueError(f"n_samples is {n_samples}; it must be at least 1")
    if pretrained is not None and palette is not None:
        raise ValueError(f"{pretrained} has a palette of its own; drop palette, or pretrained")
    draws = DIAGRAMS | ({} if runs is None else run_figures(Path(runs)))
    loaded = None if pretrained is None else load_pretrained(pretrained)
    colors = Palette.load(palette or "openai") if loaded is None else loaded.palette
    draws["palette"] = palette_figure(colors)
    if {*names} & {"quantised", *OF_A_NETWORK}:
        source = read_originals(images, split=split, limit=n_images, on_bad_image=on_bad_image) if images else None
        originals = sample_photos()[:n_images] if source is None else [image for image, _ in source]
        sizes = SIZES if loaded is None else (loaded.config.image_size,)
        draws["quantised"] = _quantised(originals[:QUANTISED], sizes, colors)
        if loaded is not None:
            draws |= _of_a_network(loaded, originals, names, n_samples=n_samples, seed=seed, device=device)
    for name in names:
        if name not in draws and only is None:
            print(f"left out {name}: {_reason(name, runs)}")
        elif name not in draws:
            raise ValueError(f"there is no figure {name}: {_reason(name, runs)}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name in draws:
            light, dark = save_both(draws[name], folder, name)
            print(f"wrote {light} and {dark.name}")


def wanted(only: str | None, *, has_network: bool, has_runs: bool) -> list[str]:
    """The names of the figures to draw, in the order of the documentation.

    Args:
        only: Names with commas between; None: all that what is given allows, but no diagrams.
        has_network: Whether a network is given.
        has_runs: Whether runs are given.

    Raises:
        ValueError: A name is unknown, or what the figure shows is not given.
    """
    possible = [*OF_IMAGES, *(OF_A_NETWORK if has_network else ()), *(OF_RUNS if has_runs else ())]
    if only is None:
        return possible
    known = [*OF_IMAGES, *OF_A_NETWORK, *OF_RUNS, *DIAGRAMS]
    named = [name.strip() for name in only.split(",")]
    for name in named:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
            raise ValueError(f"there is no figure {name!r}; {hint}")
        if name not in possible and name not in DIAGRAMS:
            raise ValueError(f"figure {name} needs --{'runs' if name in OF_RUNS else 'pretrained'}")
    return [name for name in known if name in named]


def sample_photos() -> list[Image.Image]:
    """The two photographs that come with scikit-learn, a temple and a flower, 640 by 427 pixels."""
    from sklearn.datasets import load_sample_images

    return [Image.fromarray(photo) for photo in load_sample_images().images]


def _quantised(originals: Sequence[Image.Image], sizes: Sequence[int], palette: Palette) -> Draw:
    photos = [resize_center_crop(image, min(PHOTO, *image.size)) for image in originals]
    return quantised_figure(photos, [_resized(originals, size) for size in sizes], palette)


def _of_a_network(
    loaded: Pretrained,
    originals: Sequence[Image.Image],
    names: Sequence[str],
    *,
    n_samples: int,
    seed: int,
    device: str,
) -> dict[str, Draw]:
    """Completions, and the surprise of a network that has a likelihood, as far as they are wanted."""
    place, draws = pick_device(device), {}
    network = loaded.network.to(place)
    tokens = loaded.palette.quantize(_resized(originals, loaded.config.image_size)).to(place)  # (N, T)
    if "completions" in names:
        rows = completion_rows(network, loaded.palette, tokens, n_samples=n_samples, seed=seed)
        draws["completions"] = completions_figure(rows.cpu(), captions(n_samples))
    if "surprise" in names and loaded.config.objective == "autoregressive":
        nats = sampling.score(network, tokens, batch_size=BATCH).cpu()
        check_finite(nats.mean(1, dtype=torch.float64), [f"image {number}" for number in range(len(nats))])
        draws["surprise"] = surprise_figure(tokens.cpu(), nats, loaded.palette)
    return draws


def _resized(images: Sequence[Image.Image], size: int) -> Tensor:
    """uint8 (N, 3, size, size)."""
    arrays = [np.array(resize_center_crop(image, size)) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


def _reason(name: str, runs: str | None) -> str:
    if name == "surprise":
        return "a BERT network has no likelihood"
    return f"{runs} holds no {'pretraining' if name == 'curves' else 'probe of several layers'}"


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    return run_function(figures, words, "figures")
