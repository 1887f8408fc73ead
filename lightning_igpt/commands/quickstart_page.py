"""The page that ``lightning-igpt quickstart`` leaves; what is measured: ``quickstart.py``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_igpt import __version__, report
from lightning_igpt.modules import PretrainModule
from lightning_igpt.pictures import image_grid, plot_curves, save_png, surprise_limit, surprise_map, swatch
from lightning_igpt.sampling import captions, completion_rows, score

N_PICTURES, N_SAMPLES = 10, 4
NEXT_STEPS = "Train on your own images, complete them, probe and fine-tune; or start from a commented recipe:"


def picture_sections(module: PretrainModule, images: Tensor, out: Path, seed: int) -> list[str]:
    """Sections in which digits, uint8 (N,3,S,S), are quantized, completed and scored; write completions.png."""
    network, palette = module.network, module.palette
    tokens, side = palette.quantize(images), images.shape[-1]  # (N, T)
    sheet = swatch(palette.rgb, side=8, columns=len(palette))[None, None]
    quantized = torch.stack([images[:N_PICTURES], palette.dequantize(tokens[:N_PICTURES])])
    heads = captions(N_SAMPLES)
    rows = completion_rows(network, palette, tokens[:N_PICTURES], n_samples=N_SAMPLES, seed=seed)
    save_png(image_grid(rows, captions=heads, scale=10), out / "completions.png")
    nats = score(network, tokens, batch_size=64).cpu()
    ranked, half = nats.mean(1).argsort(), N_PICTURES // 2
    shown = torch.cat([ranked[:half], ranked[-half:]])
    limit = surprise_limit(nats[shown], len(palette))
    maps = surprise_map(nats[shown].view(-1, side, side), limit=limit)
    means = [f"{value:.2f}" for value in nats[shown].mean(1).tolist()]
    surprise, legend = torch.stack([palette.dequantize(tokens[shown]), maps]), report.surprise_legend(limit)
    before = "Test digits before (above) and after quantization (below)."
    lowest = "Nats per pixel of the least (left) and the most surprising (right) test digits, above maps of them."
    return [
        report.section(
            "Palette",
            f"Each pixel becomes one token: the nearest of the palette's {len(palette)} colors.",
            report.pixels(sheet, "A row of squares from black to white", "The palette.", scale=4),
            report.pixels(quantized, "Handwritten digits in two rows that look nearly alike", before, scale=7),
        ),
        report.section(
            "Completions",
            "The network sees the upper half of a test digit and draws the rest pixel by pixel. Most halves allow "
            "several digits, and the samples differ accordingly.",
            report.pixels(rows, "Half, samples, truth", "The first test digits, not picked.", headings=heads),
        ),
        report.section(
            "Surprise",
            "The cost of each pixel given those before it: low where the continuation is certain, high where a stroke "
            "begins or ends unexpectedly.",
            report.pixels(surprise, "Digits above maps of surprise", lowest, headings=means, scale=7, below=legend),
        ),
    ]


def write_report(out: Path, results: Mapping[str, Any], pictures: list[str]) -> None:
    """Write report.html, loss.png and probe_by_layer.png, from the metrics of pretraining and what report.json has."""
    settings, checkpoint = results["settings"], out / "pretrain.ckpt"
    network = "{n_layer} layers, width {n_embd}, {n_head} heads".format(**settings["network"])
    (pretraining,) = report.read_runs(out / "pretrain")
    commands = [
        "lightning-igpt recipes list",
        "lightning-igpt fit --config cifar10_tiny_pretrain --data.init_args.source FOLDER_OF_IMAGES",
        f"lightning-igpt complete --pretrained {checkpoint} --images digits --out completions",
        f"lightning-igpt score --pretrained {checkpoint} --images digits",
        f"tensorboard --logdir {out}",
    ]
    sections = [
        report.section("Results", report.table(result_rows(results), ("", "measured", "what it is"))),
        _pretraining(out, results, pretraining.curves),
        *pictures,
        _probes(out, results),
        report.section("Next steps", NEXT_STEPS, report.commands(commands)),
        report.section("How this was made", report.facts("Settings, versions", pretraining.settings)),
    ]
    subtitle = (
        f"{network}; 1,437 digits to train on, 360 to test; {results['seconds']:.0f} seconds, seed "
        f"{settings['seed']}; lightning_igpt {__version__}, torch {results['versions']['torch']}."
    )
    report.write_page(out / "report.html", "Image GPT on 8 × 8 digits", subtitle, sections)


def result_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The results as (what, value, note)."""
    density, probes, tuned = results["pretrain"], results["probe"], results["finetune"]
    return [
        ("Density, validation", f"{density['val_nats_per_pixel']:.3f} nats/pixel", "one pixel is one of 16 grays"),
        ("↳ per-position unigram", f"{density['unigram_nats_per_pixel']:.3f} nats/pixel", "baseline: no context"),
        ("↳ uniform", f"{density['uniform_nats_per_pixel']:.3f} nats/pixel", "ln 16"),
        ("Linear probe, best layer", f"{probes['best_accuracy']:.3f}", f"layer {probes['best_layer']}, by validation"),
        ("↳ same network, untrained", f"{probes['untrained_best_accuracy']:.3f}", "baseline: random features"),
        ("↳ raw pixels", f"{probes['raw_pixels_accuracy']:.3f}", "baseline: logistic regression, no network"),
        ("Fine-tuned classifier", f"{tuned['accuracy']:.3f}", "joint loss L_gen + L_clf"),
    ]


def _pretraining(out: Path, results: Mapping[str, Any], curves: Mapping[str, report.Curve]) -> str:
    density = results["pretrain"]
    names = {"val/nats_per_pixel": "validation", "train/nats_per_pixel": "training batches"}
    levels = {"per-position unigram": density["unigram_nats_per_pixel"], "uniform": density["uniform_nats_per_pixel"]}
    plot = plot_curves({label: curves[name] for name, label in names.items() if name in curves}, levels)
    save_png(plot.light, out / "loss.png")
    return report.section(
        "Pretraining",
        "The network learns to predict each pixel from those before it. The dashed line is a model that knows the "
        "frequency of each gray at each position only: the distance below it comes from context.",
        report.drawing(plot, "Nats per pixel over steps", "Nats per pixel; lower is better."),
    )


def _probes(out: Path, results: Mapping[str, Any]) -> str:
    probes = results["probe"]
    names = {"pretrained": "accuracy_by_layer", "untrained": "untrained_accuracy_by_layer"}
    curves = {label: ([int(n) for n in probes[name]], list(probes[name].values())) for label, name in names.items()}
    levels = {"logistic regression on raw pixels": probes["raw_pixels_accuracy"]}
    plot = plot_curves(curves, levels, xlabel="layer (0: embeddings)", ylabel="test accuracy")
    save_png(plot.light, out / "probe_by_layer.png")
    return report.section(
        "Linear probes",
        "A logistic regression on the mean over positions of each layer's features.",
        report.drawing(plot, "Accuracy by layer", "Test accuracy by layer; dashed: raw pixels."),
        f"Raw pixels reach {probes['raw_pixels_accuracy']:.3f}: the mean over positions drops where things are, which "
        "in centered 8 × 8 digits is nearly the whole answer. The fair baseline of the probe is the untrained network. "
        "On natural images at the paper's scale the probe wins (96.3 % on CIFAR-10). Fine-tuning changes the features "
        f"before they are averaged and reaches {results['finetune']['accuracy']:.3f} here.",
    )
