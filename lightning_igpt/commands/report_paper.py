"""The paper's numbers, and in what a run differs from the experiment behind each of them.

Sources: Chen et al., "Generative Pretraining from Pixels" (ICML 2020), version 2; for the densities the README of
github.com/openai/image-gpt. Numbers that the text does not print, such as those of figures, are not here, and none is
printed for the density of BERT networks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from lightning_igpt.commands.report_runs import Run
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.palette import Palette
from lightning_igpt.planning import parameter_count

LOW_DATA = {4: (73.2, 1.5), 25: (87.6, 0.6), 400: (94.3, 0.1)}  # CIFAR-10, labels per class: mean, sd in %; Table 4
LOW_DATA_PROTOCOL = (
    "iGPT-L (1362M parameters), pretrained on ImageNet at 32 x 32; logistic regression on CIFAR-10, mean and standard "
    "deviation over 5 random subsets (section 4.7, Table 4); how its layer was chosen is not stated"
)
DENSITY = {"igpt_s": 2.0895, "igpt_m": 2.0614, "igpt_l": 2.0466}  # nats per pixel
PROBE = {"CIFAR-10": (96.3, "Table 1"), "CIFAR-100": (82.8, "Table 1"), "STL-10": (95.5, "Table 1")}  # %
FINETUNE = {"CIFAR-10": (99.0, "section 4.5"), "CIFAR-100": (88.5, "Table 3")}  # %
FINETUNE_BERT = {"CIFAR-10": (98.6, "section 4.6")}  # %

_CLASSES = {"CIFAR-10": 10, "CIFAR-100": 100, "STL-10": 10}
_IMAGES = {"CIFAR-10": 50_000, "CIFAR-100": 50_000, "STL-10": 5_000}  # of which the paper held out a tenth
_IMAGENET_IMAGES, _IMAGENET_DRAWN = 1_281_167, 128_000_000  # 1M steps of 128 images


@dataclass(frozen=True)
class Comparison:
    """A number of a run beside one of the paper."""

    run: str
    task: str
    here: str
    paper: str
    differs: list[str]  # "mine (the paper's)"


def comparisons(run: Run) -> Iterator[Comparison]:
    """The paper's numbers of the same kind as this run's, each with all that is known to differ."""
    if run.low_data:
        yield from _low_data(run)
    elif run.module == "PretrainModule" and run.network and run.network.objective == "autoregressive":
        yield from _density(run)
    elif run.module in ("ProbeModule", "FineTuneModule"):
        yield from _accuracy(run)


def _density(run: Run) -> Iterator[Comparison]:
    part, value = _measured(run, "nats_per_pixel")
    if value is None or run.network is None:
        return
    same = [name for name in DENSITY if _same_size(run.network, name)] or list(DENSITY)
    paper = f"{', '.join(f'{DENSITY[name]} {_letter(name)}' for name in same)} (README; ImageNet)"
    differs = [*_network(run, same), *_palette(run), f"{_source(run)} (ImageNet)"]
    differs += _count(run.n_images, _IMAGENET_IMAGES, "training images")
    differs += _count(run.n_drawn, _IMAGENET_DRAWN, "images drawn in training")
    differs += [f"started from {run.pretrained} (random weights)"] if run.pretrained else []
    yield Comparison(run.name, "density, nats per pixel", f"{value:.4f}", paper, [*differs, *_part(part)])


def _accuracy(run: Run) -> Iterator[Comparison]:
    part, value = _measured(run, "accuracy")
    if value is None:
        return
    bert = run.network is not None and run.network.objective == "bert"
    numbers, task = (PROBE, "linear probe") if run.module == "ProbeModule" else (FINETUNE, "fine-tuning")
    data = _data_set(run)
    data = data if data in numbers else "CIFAR-10"
    differs = [*_network(run, ["igpt_l"]), *_palette(run), *_pretraining(run), *_task_data(run, data)]
    if bert and task == "fine-tuning" and data in FINETUNE_BERT:
        numbers, task = FINETUNE_BERT, "fine-tuning, BERT"
    elif bert:
        differs.append("BERT objective (autoregressive; the text prints no number for BERT here)")
    if run.n_images != _IMAGES[data] * 9 // 10:
        differs += _count(run.n_images, _IMAGES[data], "training images", ", a tenth held out")
    here, paper = percent(value), "{} % L ({}; {})".format(*numbers[data], data)
    yield Comparison(run.name, task, here, paper, [*differs, *_part(part)])


def _low_data(run: Run) -> Iterator[Comparison]:
    found = run.low_data
    differs = [*_network(run, ["igpt_l"]), *_palette(run), *_pretraining(run), *_task_data(run, "CIFAR-10")]
    if run.network is not None and run.network.objective == "bert":
        differs.append("BERT objective (autoregressive)")
    differs.append(f"layer {found['layer']}, {found['layer_choice']} (choice not stated)")
    for result in found["results"]:
        budget = result["labels_per_class"]
        if result["layer"] == found["layer"] and budget in LOW_DATA:
            n_subsets = len(result["accuracies"])
            subsets = [] if n_subsets == 5 else [f"{n_subsets} subsets (5)"]
            paper = "{} ± {} % L (Table 4; CIFAR-10)".format(*LOW_DATA[budget])
            here = percent(result["mean"], result["sd"])
            yield Comparison(run.name, f"{budget} labels per class", here, paper, differs + subsets)


def percent(mean: float, sd: float | None = None) -> str:
    """An accuracy, 0 to 1, and perhaps its standard deviation, in percent."""
    deviation = "" if sd is None else f" ±\N{NO-BREAK SPACE}{100 * sd:.1f}"
    return f"{100 * mean:.1f}{deviation}\N{NO-BREAK SPACE}%"


def _measured(run: Run, metric: str) -> tuple[str, float | None]:
    """(part of the data, value): the test's, or else the last on validation."""
    test = run.last(f"test/{metric}")
    return ("test", test) if test is not None else ("validation", run.last(f"val/{metric}"))


def _part(part: str) -> list[str]:
    return [] if part == "test" else ["measured on validation images (test images)"]


def _same_size(network: ImageGPTConfig, preset: str) -> bool:
    shape = PRESETS[preset]
    return (network.n_layer, network.n_embd) == (shape.n_layer, shape.n_embd)


def _letter(preset: str) -> str:
    return preset.rpartition("_")[2].upper()


def _network(run: Run, presets: list[str]) -> list[str]:
    if run.network is None:
        return ["network not recorded"]
    found = []
    if not any(_same_size(run.network, name) for name in presets):
        sizes = ", ".join(f"{parameter_count(PRESETS[name]) // 10**6}M" for name in presets)
        found.append(f"{parameter_count(run.network) / 1e6:.1f}M parameters ({sizes})")
    if run.network.image_size != 32:
        found.append(f"{run.network.image_size} × {run.network.image_size} pixels (32 × 32)")
    return found


def _palette(run: Run) -> list[str]:
    if run.network is not None and run.network.vocab_size != 512:
        return [f"{run.network.vocab_size} colours (512)"]
    if run.palette_sha256 is None:
        return ["palette not recorded (OpenAI's)"]
    return [] if run.palette_sha256 == Palette.load("openai").sha256 else ["another palette of 512 colours (OpenAI's)"]


def _pretraining(run: Run) -> list[str]:
    return [f"pretrained weights: {run.pretrained or 'none recorded'} (ImageNet, 128M images drawn)"]


def _task_data(run: Run, data: str) -> list[str]:
    found = [] if _data_set(run) == data else [f"{_source(run)} ({data})"]
    if run.n_classes is not None and run.n_classes != _CLASSES[data]:
        found.append(f"{run.n_classes} classes ({_CLASSES[data]})")
    return found


def _source(run: Run) -> str:
    return f"data: {run.source}" if run.source else "data not recorded"


def _data_set(run: Run) -> str | None:
    """The paper's data set whose name is in the source's."""
    name = re.sub(r"[^a-z0-9]", "", (run.source or "").lower())
    return next((data for data in ("CIFAR-100", "CIFAR-10", "STL-10") if data.replace("-", "").lower() in name), None)


def _count(mine: int | None, paper: int, what: str, note: str = "") -> list[str]:
    if mine is None:
        return [f"{what} not recorded ({paper:,}{note})"]
    return [] if mine == paper else [f"{mine:,} {what} ({paper:,}{note})"]
