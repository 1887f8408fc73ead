"""Draw the site's pictures of palette, quantization, completions, surprise, curves and layers, light and dark.

    python docs/make_pictures.py --quickstart igpt-quickstart --images FOLDER [--pretrained NETWORK]

``--quickstart`` is the folder of ``lightning-igpt quickstart``. Its network completes ``--images``, unless
``--pretrained`` names another. The photograph comes with scikit-learn.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from lightning_igpt.callbacks import captions, completion_rows
from lightning_igpt.commands.images import read_images
from lightning_igpt.images import resize_center_crop
from lightning_igpt.palette import Palette
from lightning_igpt.pictures import (
    DARK,
    LIGHT,
    enlarge,
    image_grid,
    plot_curves,
    save_png,
    surprise_limit,
    surprise_map,
    swatch,
)
from lightning_igpt.report import read_curves
from lightning_igpt.sampling import score
from lightning_igpt.weights import load_pretrained

OUT = Path(__file__).parent / "pictures"
PHOTO = 256  # side of a shown photograph in pixels


def save_grid(name, rows, titles=None):
    """A grid on the paper of both themes; ``rows`` as ``image_grid`` takes them."""
    for suffix, theme in (("", LIGHT), ("-dark", DARK)):
        paper = tuple(int(theme.paper[i : i + 2], 16) for i in (1, 3, 5))
        save_png(image_grid(rows, gap=8, background=paper, captions=titles), OUT / f"{name}{suffix}.png")


def save_plot(name, plot):
    """Both figures of a plot."""
    for suffix, figure in zip(("", "-dark"), plot, strict=True):
        figure.savefig(OUT / f"{name}{suffix}.png")


def pixels(photo, size):
    """uint8 (3, size, size) of a photograph (H, W, 3)."""
    return torch.from_numpy(np.array(resize_center_crop(Image.fromarray(photo), size)).transpose(2, 0, 1).copy())


def draw_palette(palette, photo):
    """The colors, and what resizing and palette leave of a photograph."""
    save_grid("palette", swatch(palette.rgb)[None, None])
    columns, titles = [pixels(photo, PHOTO)], ["photo"]
    for size in (32, 64):
        resized = pixels(photo, size)
        seen = palette.dequantize(palette.quantize(resized[None]))[0]
        columns += [enlarge(one, PHOTO // size) for one in (resized, seen)]
        titles += [f"{size} x {size}", f"{len(palette)} colors"]
    save_grid("quantised", torch.stack(columns)[None], titles)


def draw_network(loaded, images, n_images=8):
    """Completions, and images above maps of their surprise."""
    side = loaded.config.image_size
    tokens = loaded.palette.quantize(read_images(images, side, limit=n_images).pixels)
    save_grid("completions", completion_rows(loaded.network, loaded.palette, tokens, n_samples=4), captions(4))
    nats = score(loaded.network, tokens).view(-1, side, side)
    maps = surprise_map(nats, limit=surprise_limit(nats, len(loaded.palette)))
    save_grid("surprise", torch.stack([loaded.palette.dequantize(tokens), maps]))


def draw_quickstart(folder):
    """Nats per pixel over steps, and accuracy by layer."""
    found, curves = json.loads((folder / "report.json").read_text()), read_curves(folder / "pretrain" / "metrics.csv")
    shown = {"validation": curves["val/nats_per_pixel"], "training": curves["train/nats_per_pixel"]}
    save_plot("curves", plot_curves(shown, {"uniform": found["pretrain"]["uniform_nats_per_pixel"]}))
    names = {"pretrained": "accuracy_by_layer", "untrained": "untrained_accuracy_by_layer"}
    layers = {label: found["probe"][name] for label, name in names.items()}
    points = {label: ([int(layer) for layer in one], list(one.values())) for label, one in layers.items()}
    save_plot("layers", plot_curves(points, xlabel="layer (0: embeddings)", ylabel="test accuracy"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument("--pretrained")
    options = parser.parse_args()
    draw_palette(Palette.load("openai"), load_sample_images().images[0])
    draw_network(load_pretrained(options.pretrained or options.quickstart / "pretrain.ckpt"), options.images)
    draw_quickstart(options.quickstart)
