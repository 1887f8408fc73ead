"""The page that ``lightning-igpt quickstart`` leaves; what is measured: ``quickstart.py``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_igpt import __version__, report
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.pictures import image_grid, plot_curves, save_png
from lightning_igpt.sampling import captions, completion_rows

N_PICTURES, N_SAMPLES, TEMPERATURE = 10, 4, 0.8
NEXT_STEPS = "Complete your own pictures, train on them, or start from a commented recipe:"


def completions_section(network: ImageGPT, palette: Palette, images: Tensor, out: Path, seed: int) -> str:
    """The section in which emoji, uint8 (N,3,S,S), are completed; writes completions.png."""
    side, chosen = images.shape[-1], images[:: len(images) // N_PICTURES][:N_PICTURES]
    heads, given = captions(N_SAMPLES), 3 * side // 4
    options: dict[str, Any] = {"n_samples": N_SAMPLES, "temperature": TEMPERATURE, "seed": seed}
    rows = completion_rows(network, palette, palette.quantize(chosen), keep_rows=given, **options)
    save_png(image_grid(rows, captions=heads, scale=6, line=given), out / "completions.png")
    return report.section(
        "Completions",
        f"The network has never seen these emoji. It gets the upper {given} of {side} rows and draws the rest, pixel "
        f"by pixel, {N_SAMPLES} times.",
        report.pixels(rows, "Given part, samples, ground truth", "Every n-th test emoji, none picked.", headings=heads),
    )


def write_report(out: Path, results: Mapping[str, Any], completions: str) -> None:
    """Write report.html, loss.png and probe_by_layer.png, from the metrics of pretraining and what report.json has."""
    settings, checkpoint = results["settings"], out / "pretrain.ckpt"
    network = "{n_layer} layers, width {n_embd}, {n_head} heads".format(**settings["network"])
    (pretraining,) = report.read_runs(out / "pretrain")
    commands = [
        f"lightning-igpt complete --pretrained {checkpoint} --images emoji",
        f"lightning-igpt score --pretrained {checkpoint} --images emoji",
        "lightning-igpt complete --images YOUR_PHOTO.jpg",
        "lightning-igpt fit --config photos_tiny_pretrain --data.source YOUR_FOLDER",
        "lightning-igpt recipes list",
        f"tensorboard --logdir {out}",
    ]
    sections = [
        completions,
        report.section("Results", report.table(result_rows(results), ("quantity", "result", "note"))),
        _probes(out, results),
        _pretraining(out, results, pretraining.curves),
        report.section("Next steps", NEXT_STEPS, report.commands(commands)),
        report.section("How this was made", report.facts("Settings, versions", pretraining.settings)),
    ]
    subtitle = (
        f"{network}; {settings['steps']} steps without labels; {results['seconds']:.0f} seconds in all on "
        f"a CPU (threads: {settings['threads']}); seed {settings['seed']}; lightning_igpt {__version__}, torch "
        f"{results['versions']['torch']}."
    )
    report.write_page(out / "report.html", "Image GPT on emoji of 16 × 16 pixels", subtitle, sections)


def result_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """The results as (quantity, value, note)."""
    density, probes, few, tuned = (results[name] for name in ("pretrain", "probe", "few_labels", "finetune"))
    colors = results["settings"]["network"]["vocab_size"]

    def share(value: float) -> str:
        return f"{100 * value:.1f} % right"

    return [
        ("Validation loss", f"{density['val_nats_per_pixel']:.3f} nats/pixel", f"a pixel is one of {colors} colors"),
        ("↳ color frequencies", f"{density['unigram_nats_per_pixel']:.3f} nats/pixel", "baseline: no context"),
        ("↳ uniform", f"{density['uniform_nats_per_pixel']:.3f} nats/pixel", f"ln {colors}"),
        ("Linear probe, test", share(probes["best_accuracy"]), f"layer {probes['best_layer']}, chosen by validation"),
        ("↳ raw pixels", share(probes["raw_pixels_accuracy"]), "baseline: logistic regression"),
        ("↳ untrained network", share(probes["untrained_best_accuracy"]), "baseline: random features"),
        ("Linear probe, 10 labels a class", share(few["accuracy"]), "middle layer, mean of 5 subsets"),
        ("↳ raw pixels", share(few["raw_pixels_accuracy"]), "baseline"),
        ("↳ untrained network", share(few["untrained_accuracy"]), "baseline"),
        ("Fine-tuned, test", share(tuned["accuracy"]), "all weights, from the pretrained"),
        ("↳ from scratch", share(tuned["scratch_accuracy"]), "baseline: equal steps, random weights"),
    ]


def _pretraining(out: Path, results: Mapping[str, Any], curves: Mapping[str, report.Curve]) -> str:
    density = results["pretrain"]
    names = {"val/nats_per_pixel": "validation", "train/nats_per_pixel": "training batches"}
    levels = {"color frequencies": density["unigram_nats_per_pixel"], "uniform": density["uniform_nats_per_pixel"]}
    plot = plot_curves({label: curves[name] for name, label in names.items() if name in curves}, levels)
    save_png(plot.light, out / "loss.png")
    return report.section(
        "Pretraining",
        "The network learns to predict each pixel from those before it. The dashed line is a model that knows only how "
        "frequent each color is at each position: the distance below it comes from context.",
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
        "How much does the network know about what a picture shows? A logistic regression on the mean of each layer's "
        "features distinguishes the nine groups of emoji (the largest has a fifth of them).",
        report.drawing(plot, "Accuracy by layer", "Test accuracy by layer; dashed: raw pixels."),
    )
