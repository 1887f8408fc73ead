"""Draws the pictures of this site with ``lightning_igpt.pictures``: ``python docs/make_pictures.py docs/pictures``.

Without options: palette, quantized, raster, shift, taps, layers, emoji_completions, emoji_holes.
``--runs igpt-quickstart``: curves.
``--cifar10`` with CIFAR-10's folder or hub id: completions, surprise.
"""

import argparse
import math
import re
from pathlib import Path

import numpy as np
import torch
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image
from sklearn.datasets import load_sample_images

import lightning_igpt as igpt
from lightning_igpt import pictures
from lightning_igpt.report import read_runs
from lightning_igpt.sampling import captions, completion_rows

CELL = 192  # pixels of a photograph
TEXT = {"ha": "center", "va": "center"}


def quantized(out):
    """A photograph, at two sizes, and what the palette makes of it."""
    photo = Image.fromarray(load_sample_images().images[0]).crop((106, 0, 533, 427))
    palette, row, titles = igpt.Palette.load("openai"), [], ["photo"]
    row.append(torch.from_numpy(np.array(photo.resize((CELL, CELL)))).permute(2, 0, 1)[None])
    for side in (32, 64):
        image = torch.from_numpy(np.array(photo.resize((side, side)))).permute(2, 0, 1)[None]  # (1, 3, S, S)
        shown = (image, palette.dequantize(palette.quantize(image)))
        row += [pictures.enlarge(part, CELL // side) for part in shown]
        titles += [f"{side} x {side}", f"{len(palette)} colors"]
    pictures.save_png(pictures.image_grid(torch.stack(row, 1), scale=1, captions=titles), out / "quantized.png")
    pictures.save_png(pictures.swatch(palette.rgb), out / "palette.png")


def six_emoji(loaded):
    """Tokens (6, T) of six test emoji, evenly spaced in the split."""
    data = igpt.ProbeDataModule("emoji", image_size=loaded.config.image_size, batch_size=1000)
    data.setup("test")
    images = next(iter(data.test_dataloader()))["image"]
    return loaded.palette.quantize(images[:: len(images) // 6][:6])


def emoji(out):
    """Completions by the embedded network."""
    loaded = igpt.load_pretrained("emoji")
    options = {"n_samples": 4, "keep_rows": 10, "temperature": 0.8}
    rows = completion_rows(loaded.network, loaded.palette, six_emoji(loaded), **options)
    pictures.save_png(pictures.image_grid(rows, captions=captions(4), scale=4), out / "emoji_completions.png")


def holes(out):
    """Holes filled by the embedded masked network."""
    loaded = igpt.load_pretrained("emoji_bert")
    tokens, known = six_emoji(loaded), torch.ones(16, 16, dtype=torch.bool)
    known[5:11, 5:11] = False
    original = loaded.palette.dequantize(tokens)  # (6, 3, 16, 16)
    shown, known = torch.where(known, original, 128), known.flatten().expand(6, -1)
    options = {"temperature": 0.8, "steps": 36, "generator": torch.manual_seed(0)}
    filled = [loaded.palette.dequantize(igpt.inpaint(loaded.network, tokens, known, **options)) for _ in range(4)]
    grid = pictures.image_grid(torch.stack([shown, *filled, original], 1), captions=captions(4), scale=4)
    pictures.save_png(grid, out / "emoji_holes.png")


def photos(out, source):
    """Completions of the first test images by the embedded network, and maps of their surprise."""
    loaded = igpt.load_pretrained("photos")
    data = igpt.PretrainDataModule(source, image_size=loaded.config.image_size, batch_size=8)
    data.setup("test")
    tokens = loaded.palette.quantize(next(iter(data.test_dataloader()))["image"])  # (8, T)
    torch.manual_seed(0)
    rows = completion_rows(loaded.network, loaded.palette, tokens, n_samples=4, keep_rows=12, temperature=0.8)
    pictures.save_png(pictures.image_grid(rows, captions=captions(4)), out / "completions.png")
    nats, side, n_colors = igpt.score(loaded.network, tokens), loaded.config.image_size, len(loaded.palette)
    limit = pictures.surprise_limit(nats, n_colors)
    maps = pictures.surprise_map(nats.view(-1, side, side), limit=limit)
    seen = loaded.palette.dequantize(tokens)
    grid = pictures.image_grid([seen[:4], maps[:4], seen[4:], maps[4:]])
    pictures.save_png(pictures.stack([grid, pictures.surprise_bar(limit, n_colors)]), out / "surprise.png")


def of_runs(out, folder):
    """Nats per pixel of a pretraining."""
    for run in read_runs(folder):
        if "val/nats_per_pixel" in run.curves and "val/accuracy" not in run.curves:
            curves = {stage: run.curves[f"{stage}/nats_per_pixel"] for stage in ("val", "train")}
            plot = pictures.plot_curves(curves, {"uniform": math.log(16)})
            plot.light.savefig(out / "curves.png")


def layers(out):
    """Accuracy by layer on CIFAR-10, from the card of the embedded network photos."""
    card = (Path(igpt.__file__).parent / "assets" / "photos" / "README.md").read_text()
    rows = {"pretrained": "this network", "untrained": "the same network untrained"}
    found = {label: re.search(rf"\| {name}, by layer from 0 to 6 \| (.*) \|", card)[1] for label, name in rows.items()}
    curves = {label: (range(7), [100 * float(word) for word in text.split()]) for label, text in found.items()}
    raw = 100 * float(re.search(r"raw 16 x 16 pixels.*\| (.*) \|", card)[1])
    plot = pictures.plot_curves(
        curves, {"raw pixels": raw}, xlabel="layer (0: embeddings)", ylabel="test accuracy in %"
    )
    plot.light.savefig(out / "layers.png")


def blank(axes, x, y):
    axes.set(xlim=x, ylim=y)
    axes.set_axis_off()


def arrow(axes, theme, start, end, bend=0.0):
    looks = {"arrowstyle": "->", "color": theme.ink, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=looks | {"connectionstyle": f"arc3,rad={bend}"})


def box(axes, theme, x, y, text, width=0.84, fill=None):
    edge = (x - width / 2, y - 0.36)
    axes.add_patch(FancyBboxPatch(edge, width, 0.72, boxstyle="round,pad=0.02", fc=fill or theme.grid, ec="none"))
    axes.text(x, y, text, color=theme.paper if fill else theme.ink, **TEXT)


def raster(axes, theme):
    """What a pixel is predicted from: autoregressive on the left, BERT on the right."""
    for left, hidden, read in ((0, {12}, range(12)), (6, {3, 12, 16, 19}, range(25))):
        axes.text(left + 2.5, -0.4, "BERT" if left else "autoregressive", **TEXT)
        for place in range(25):
            row, column = divmod(place, 5)
            fill = theme.level if place in hidden else theme.first if place in read else "none"
            edge = theme.second if fill == "none" else fill
            axes.add_patch(Rectangle((left + column + 0.04, row + 0.04), 0.92, 0.92, facecolor=fill, edgecolor=edge))
            ink = theme.second if fill == "none" else theme.paper
            axes.text(left + column + 0.5, row + 0.5, str(place), color=ink, **TEXT)
    for label, color in (("read", theme.first), ("predicted", theme.level)):
        axes.scatter([], [], marker="s", s=80, color=color, label=label)
    blank(axes, (-0.1, 11.1), (5.1, -0.8))


def shift(axes, theme):
    """What the autoregressive network reads and predicts at each position."""
    columns = ("0", "1", "2", "...", "$T-2$", "$T-1$")
    inputs = ("sos", "$x_0$", "$x_1$", "...", "$x_{T-3}$", "$x_{T-2}$")
    outputs = ("$x_0$", "$x_1$", "$x_2$", "...", "$x_{T-2}$", "$x_{T-1}$")
    for y, text in ((0.45, "predicts"), (2.55, "reads"), (3.6, "position")):
        axes.text(-0.25, y, text, ha="right", va="center")
    box(axes, theme, 3.0, 1.5, "network: position $t$ sees 0 to $t$", width=5.9)
    for x, (place, above, below) in enumerate(zip(columns, outputs, inputs, strict=True)):
        axes.text(x + 0.5, 3.6, place, color=theme.second, **TEXT)
        for y, text, fill in ((0.45, above, theme.level), (2.55, below, theme.second if x == 0 else theme.first)):
            axes.text(x + 0.5, y, text, **TEXT) if text == "..." else box(axes, theme, x + 0.5, y, text, fill=fill)
        if place != "...":
            arrow(axes, theme, (x + 0.5, 1.1), (x + 0.5, 0.85))
            arrow(axes, theme, (x + 0.5, 2.15), (x + 0.5, 1.9))
    blank(axes, (-1.75, 6.2), (4.0, -0.1))


def taps(axes, theme):
    """One block of the network with its tap, and the last norm with the last one."""
    frame = {"boxstyle": "round,pad=0.1", "facecolor": "none", "edgecolor": theme.second, "linestyle": "--"}
    axes.add_patch(FancyBboxPatch((0.95, 0.85), 6.35, 2.15, **frame))
    axes.text(4.1, 0.42, "block $l$, for $l$ = 0 to $L-1$", **TEXT)
    axes.text(0.4, 1.3, "$h^l$", **TEXT)
    for start, end in ((0.7, 4.25), (4.65, 6.7), (7.1, 7.75), (8.25, 8.65), (10.15, 10.8)):  # the residual stream
        arrow(axes, theme, (start, 1.3), (end, 1.3))
    for x, text in ((4.45, "+"), (6.9, "+"), (8.0, "...")):
        axes.text(x, 1.3, text, **TEXT)
    for norm, part, name, width in ((1.5, 3.35, "attention", 1.5), (5.0, 6.25, "MLP", 0.85)):
        arrow(axes, theme, (norm, 1.3), (norm, 2.14))
        arrow(axes, theme, (norm + 0.42, 2.5), (part - width / 2 - 0.02, 2.5))
        arrow(axes, theme, (part + width / 2 + 0.03, 2.5), (4.45 if name == "attention" else 6.9, 1.55), bend=0.35)
        box(axes, theme, norm, 2.5, "norm", width=0.8)
        box(axes, theme, part, 2.5, name, width=width)
    box(axes, theme, 9.4, 1.3, "last norm", width=1.5)
    axes.text(10.55, 0.8, "logits", **TEXT)
    for x, top, text in ((2.22, 2.5, "tap $l$"), (10.4, 1.3, "tap $L$")):
        axes.plot((x, x), (top, 3.55), color=theme.level, linestyle=(0, (2, 1.5)))
        axes.text(x, 3.9, text, color=theme.level, **TEXT)
        arrow(axes, theme, (x, 4.2), (6.31 + (x - 6.31) * 0.1, 4.6))
    axes.text(6.31, 5.1, "mean over all $T$ positions:\n$L+1$ vectors for probes", **TEXT)
    blank(axes, (0, 11.2), (5.8, 0))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--cifar10")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    quantized(options.out)
    emoji(options.out)
    holes(options.out)
    layers(options.out)
    for draw, size in ((raster, (5.6, 3.4)), (shift, (5.6, 2.5)), (taps, (5.6, 2.9))):
        pictures.draw_figure(draw, size=size).savefig(options.out / f"{draw.__name__}.png")
    if options.runs:
        of_runs(options.out, options.runs)
    if options.cifar10:
        photos(options.out, options.cifar10)


if __name__ == "__main__":
    main()
