"""The pictures and the page that ``lightning-igpt quickstart`` leaves.

Not here: what is measured (``quickstart.py``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import torch
from torch import Tensor

from lightning_igpt import __version__, report
from lightning_igpt.callbacks import captions, completion_rows
from lightning_igpt.commands.report_record import read_record, told
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.pictures import heat_map, image_grid, save_png, swatch
from lightning_igpt.sampling import score

N_PICTURES = 10
N_SAMPLES = 4


class Pictures(NamedTuple):
    """What the page shows of test digits; all images are uint8 (3,S,S)."""

    colors: Tensor  # uint8 (K,3), the palette
    palette: Tensor  # (2,N,...): digits as they are, and in the palette
    completions: Tensor  # (N,2+n_samples,...)
    surprise: Tensor  # (2,N,...): the least and the most surprising digits above the surprise of each pixel
    nats: list[float]  # per pixel, of each of these digits
    heat: Tensor  # uint8 (256,3), the colours of surprise
    high: float  # nats of the last of these colours, or more


def draw_pictures(network: ImageGPT, palette: Palette, images: Tensor, seed: int) -> Pictures:
    """Complete and score test digits.

    Args:
        network: The pretrained network.
        palette: Of the network.
        images: uint8 (N,3,S,S), at least ``N_PICTURES``.
        seed: Of the samples.
    """
    tokens = palette.quantize(images)  # (N, T)
    first, side = tokens[:N_PICTURES], images.shape[-1]
    nats = score(network, tokens, batch_size=64).cpu()
    ranked, half = nats.mean(1).argsort(), N_PICTURES // 2
    shown = torch.cat([ranked[:half], ranked[-half:]])
    high = max(math.log(len(palette)), float(np.quantile(nats[shown].numpy(), 0.99)))
    heat = torch.from_numpy(matplotlib.colormaps["magma"](np.arange(256), bytes=True)[:, :3])
    maps = heat_map(nats[shown].view(-1, side, side), heat, high=high)
    return Pictures(
        colors=palette.rgb,
        palette=torch.stack([images[:N_PICTURES], palette.dequantize(first)]),
        completions=completion_rows(network, palette, first, n_samples=N_SAMPLES, seed=seed),
        surprise=torch.stack([palette.dequantize(tokens[shown]), maps]),
        nats=nats[shown].mean(1).tolist(),
        heat=heat,
        high=high,
    )


def save_completions(pictures: Pictures, path: Path) -> None:
    """Write the completions as a PNG file, large enough to look at."""
    save_png(image_grid(pictures.completions, captions=captions(N_SAMPLES), scale=10), path)


def write_report(out: Path, results: Mapping[str, Any], pictures: Pictures) -> None:
    """Write report.html with loss.png and probe_by_layer.png.

    Args:
        out: The folder of the run, with the log of pretraining.
        results: As in report.json.
        pictures: Of the pretrained network.
    """
    fields, seed = results["settings"]["network"], results["settings"]["seed"]
    network = f"{fields['n_layer']} layers, width {fields['n_embd']}, {fields['n_head']} heads"
    record = told(read_record(out / "pretrain", []))
    report.write_page(
        out / "report.html",
        "Image GPT on 8 × 8 digits",
        f"{network}; 1,437 digits to learn from, 144 of them held out at first; 360 to test; "
        f"{results['seconds']:.0f} seconds, seed {seed}; "
        f"lightning_igpt {__version__}, torch {results['versions']['torch']}.",
        [
            report.section("Results", report.table(_rows(results), ("", "measured", "what it is"))),
            _palette(pictures),
            _pretraining(out, results),
            _completions(pictures),
            _surprise(pictures),
            _probes(out, results),
            report.section("How to go on", NEXT_STEPS, report.commands(next_commands(out))),
            *([report.section("How this was made", report.facts("Command, machine, versions", record))] * bool(record)),
        ],
    )


def _rows(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    density, probes, tuned = results["pretrain"], results["probe"], results["finetune"]
    return [
        ("Density, validation", f"{density['val_nats_per_pixel']:.3f} nats/pixel", "one pixel is one of 16 greys"),
        ("↳ per-position unigram", f"{density['unigram_nats_per_pixel']:.3f} nats/pixel", "baseline: no context"),
        ("↳ uniform", f"{density['uniform_nats_per_pixel']:.3f} nats/pixel", "ln 16"),
        ("Linear probe, best layer", f"{probes['best_accuracy']:.3f}", f"layer {probes['best_layer']}, by validation"),
        ("↳ same network, untrained", f"{probes['untrained_best_accuracy']:.3f}", "baseline: random features"),
        ("↳ raw pixels", f"{probes['raw_pixels_accuracy']:.3f}", "baseline: logistic regression, no network"),
        ("Fine-tuned classifier", f"{tuned['accuracy']:.3f}", "joint loss L_gen + L_clf"),
    ]


def _palette(pictures: Pictures) -> str:
    sheet = swatch(pictures.colors, side=8, columns=len(pictures.colors))[None, None]
    return report.section(
        "Palette",
        f"The network reads one word per pixel, of {len(pictures.colors)}: the nearest colour of its palette.",
        report.pixels(sheet, "A row of squares from black to white", "The palette.", scale=4),
        report.pixels(
            pictures.palette,
            "Handwritten digits in two rows that look nearly alike",
            "Above, test digits as they are; below, as the network sees them.",
            scale=7,
        ),
    )


def _pretraining(out: Path, results: Mapping[str, Any]) -> str:
    density, metrics = results["pretrain"], out / "pretrain" / "metrics.csv"
    curves = {
        "training batches": report.read_curve(metrics, "train/nats_per_pixel"),
        "validation": report.read_curve(metrics, "val/nats_per_pixel"),
    }
    levels = {"per-position unigram": density["unigram_nats_per_pixel"], "uniform": density["uniform_nats_per_pixel"]}
    plot = report.plot_loss(curves, levels, out / "loss.png")
    alt = f"Nats per pixel against steps; validation ends at {density['val_nats_per_pixel']:.2f}"
    return report.section(
        "Pretraining",
        "The network learns to predict each pixel from those before it. The dashed line is a model that knows how "
        "often each grey occurs at each position and nothing else: what lies below it was learnt from context.",
        report.drawing(plot, alt, "Nats per pixel; lower is better."),
    )


def _completions(pictures: Pictures) -> str:
    return report.section(
        "Completions",
        "Given the upper half of a digit from the test set, the network draws the rest, pixel by pixel. Several "
        "answers are plausible for most halves, and the samples differ accordingly.",
        report.pixels(
            pictures.completions,
            f"Rows of digits: given half, {N_SAMPLES} samples, truth",
            "Temperature 1; the first test digits, not picked.",
            headings=captions(N_SAMPLES),
        ),
    )


def _surprise(pictures: Pictures) -> str:
    return report.section(
        "Surprise",
        "What one pixel costs the network, given those before it: little where it knows what must follow, much where a "
        "stroke begins or ends where few do.",
        report.pixels(
            pictures.surprise,
            "A row of digits, and below each a map of the surprise of its pixels",
            "Nats per pixel of each digit, and where they come from. The left half are the least surprising digits of "
            "the test set, the right half the most surprising.",
            headings=[f"{nats:.2f}" for nats in pictures.nats],
            scale=7,
            below=report.legend(pictures.heat, "0 nats", f"{pictures.high:.1f} or more"),
        ),
    )


def _probes(out: Path, results: Mapping[str, Any]) -> str:
    probes = results["probe"]
    curves = {
        label: {int(layer): accuracy for layer, accuracy in probes[name].items()}
        for label, name in (("pretrained", "accuracy_by_layer"), ("untrained", "untrained_accuracy_by_layer"))
    }
    levels = {"logistic regression on raw pixels": probes["raw_pixels_accuracy"]}
    plot = report.plot_layers(curves, levels, out / "probe_by_layer.png")
    alt = f"Accuracy against layer; the pretrained network is best at layer {probes['best_layer']}"
    return report.section(
        "Linear probes",
        "A logistic regression on the mean over positions of each layer's features.",
        report.drawing(plot, alt, "Test accuracy by layer; dashed: raw pixels."),
        f"Raw pixels reach {probes['raw_pixels_accuracy']:.3f}: averaging over positions throws away where things "
        "are, and in centred 8 × 8 digits the place of the ink is nearly the whole answer. The probe's fair rival "
        "is the same network before training. On natural images at the paper's scale the probe wins (96.3 % on "
        "CIFAR-10). Fine-tuning, which rearranges the features before they are averaged, gets "
        f"{results['finetune']['accuracy']:.3f} here.",
    )


NEXT_STEPS = "Train on your own images, complete them, probe and fine-tune; or start from a commented recipe:"


def next_commands(out: Path) -> list[str]:
    """Commands that continue from the quickstart's checkpoint."""
    checkpoint = out / "pretrain.ckpt"
    return [
        "lightning-igpt recipes list",
        "lightning-igpt fit --config cifar10_tiny_pretrain --data.init_args.source FOLDER_OF_IMAGES",
        f"lightning-igpt complete --pretrained {checkpoint} --images digits --out completions",
        f"lightning-igpt score --pretrained {checkpoint} --images digits",
        f"tensorboard --logdir {out}",
    ]
