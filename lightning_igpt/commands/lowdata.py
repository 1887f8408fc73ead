"""``lightning-igpt lowdata``: probes fitted on a handful of labels (paper, section 4.7 and Table 4).

Not here: the measuring (``lowdata_measure.py``); choosing a layer, since that takes labels, and a budget of labels is
the point.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from lightning_igpt import __version__
from lightning_igpt.commands.arguments import run_function
from lightning_igpt.commands.complete import pick_device
from lightning_igpt.commands.lowdata_measure import Parts, Reader, Result, draw_subsets, measure, open_parts
from lightning_igpt.commands.places import check_folder
from lightning_igpt.commands.report_paper import LOW_DATA, LOW_DATA_PROTOCOL
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.data import ProbeDataModule
from lightning_igpt.weights import Pretrained, load_pretrained

LISTS = ("--labels_per_class", "--layers")  # flags that take several numbers


def lowdata(
    pretrained: str,
    source: str,
    out: str = "lowdata",
    labels_per_class: tuple[int, ...] = (4, 25, 400),
    n_subsets: int = 5,
    layer: int | None = None,
    layers: Literal["all"] | list[int] | None = None,
    c: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    device: str = "auto",
    val_fraction: float = 0.0,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
) -> None:
    """Classify with few labels: logistic regression on frozen features, from random subsets of the training images.

    Prints the mean and standard deviation of the test accuracy over the subsets, and writes lowdata.csv (every subset)
    and lowdata.json.

    Args:
        pretrained: The network: a .ckpt file or run folder, a Hugging Face folder or hub id, or an OpenAI checkpoint.
        source: Labelled images with a test split: a folder, Parquet, a hub id, or digits.
        out: Folder for lowdata.csv and lowdata.json. Missing folders are made.
        labels_per_class: Budgets, one or more, such as --labels_per_class 4 25 400.
        n_subsets: Random subsets per budget. Subset i of a smaller budget is part of subset i of a larger one.
        layer: The layer whose features are classified: 0 is the input of the first block, n_layer the final norm.
            Default: the middle, n_layer // 2, which takes no labels to choose. The paper does not say how it chose. If
            you chose yours with other labels, the budget is no longer what it says: tell so beside the result.
        layers: Further layers to measure beside it: all, or numbers. These are test accuracies, to look at and not to
            choose by.
        c: Inverse strength of the L2 penalty, as scikit-learn's C. The paper does not state it.
        seed: Of the subsets, and of a BERT network's masks, one per image.
        batch_size: Images per forward pass.
        num_workers: Processes that read and decode; 0 reads in the main process.
        device: cpu, cuda, mps, or auto.
        val_fraction: Share of the training split to leave out, as a run with this seed and share held it out.
        config_name: Configuration of a hub data set that has several.
        image_column: Column of images. Default: the only column of type Image.
        label_column: Column of labels. Default: the only ClassLabel, or integers called label or labels.
        train_split: Split to draw from. Default: train.
        test_split: Split to test on. Default: test.
    """
    check_folder(out, "--out")
    budgets = check_numbers(labels_per_class, n_subsets, c)
    loaded = load_pretrained(pretrained)
    chosen, asked = pick_layers(loaded.config, layer, layers)
    how = "the middle, which took no labels to choose" if layer is None else "as asked for"
    data = ProbeDataModule(
        source,
        image_size=loaded.config.image_size,
        batch_size=batch_size,
        num_workers=num_workers,
        seed=seed,
        val_fraction=val_fraction,
        config_name=config_name,
        image_column=image_column,
        label_column=label_column,
        train_split=train_split,
        test_split=test_split,
    )
    parts = open_parts(data, budgets[-1])
    subsets = draw_subsets(parts.train_labels, parts.n_classes, budgets[-1], n_subsets, seed=seed)
    network = loaded.network.to(pick_device(device)).eval().requires_grad_(False)
    announce(loaded, source, parts, subsets, f"{chosen}, {how}")
    reader = Reader(network, loaded.palette, asked, seed, batch_size, num_workers)
    results = list(measure(reader, parts, subsets, budgets, c))
    facts = {
        "pretrained": loaded.origin,
        "network": network.config.to_dict(),
        "palette_sha256": loaded.palette.sha256,
        "source": source,
        **parts.counts,
        "layer": chosen,
        "layer_choice": how,
        "c": c,
        "seed": seed,
        "version": __version__,
    }
    write_results(Path(out), facts, results)
    print(summary(results, chosen))
    print(f"wrote {Path(out) / 'lowdata.csv'} and lowdata.json")


def announce(loaded: Pretrained, source: str, parts: Parts, subsets: Tensor, layer: str) -> None:
    """Print what is about to be measured.

    Args:
        loaded: The network.
        source: The images as the user named them.
        parts: The images.
        subsets: int64 (S, C, n), from draw_subsets.
        layer: Which, and how it was chosen.
    """
    print(f"network  {loaded.origin}: {loaded.config.n_layer} layers, width {loaded.config.n_embd}")
    print(
        f"data     {source}: {len(subsets)} subsets of {len(parts.train)} training images "
        f"({len(set(subsets.flatten().tolist()))} drawn), {len(parts.test)} test images"
    )
    print(f"layer    {layer}")


def check_numbers(labels_per_class: Sequence[int], n_subsets: int, c: float) -> list[int]:
    """The budgets, ascending and each once.

    Raises:
        ValueError: A number is out of range.
    """
    for name, value in (("labels_per_class", min(labels_per_class, default=0)), ("n_subsets", n_subsets)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not c > 0:
        raise ValueError(f"c is {c}; it must be above 0")
    return sorted(set(labels_per_class))


def pick_layers(
    config: ImageGPTConfig, layer: int | None, layers: Literal["all"] | list[int] | None
) -> tuple[int, list[int]]:
    """(the layer of the result, all layers to measure in ascending order).

    Raises:
        ValueError: A layer does not exist.
    """
    chosen = config.n_layer // 2 if layer is None else layer
    further = range(config.n_layer + 1) if layers == "all" else layers or []
    asked = sorted({chosen, *further})
    if asked[0] < 0 or asked[-1] > config.n_layer:
        raise ValueError(f"asked for the layers {asked}; this network has 0 to {config.n_layer}")
    return chosen, asked


def write_results(folder: Path, facts: dict[str, Any], results: Sequence[Result]) -> None:
    """Write lowdata.csv, a row for every subset, and lowdata.json with all that decided the numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lowdata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["layer", "labels_per_class", "subset", "test_accuracy"])
        for result in results:
            for subset, accuracy in enumerate(result.accuracies):
                writer.writerow([result.layer, result.labels_per_class, subset, f"{accuracy:.6f}"])
    rows = [{**asdict(result), "mean": result.mean, "sd": result.sd} for result in results]
    (folder / "lowdata.json").write_text(json.dumps({**facts, "results": rows}, indent=2) + "\n")


def summary(results: Sequence[Result], chosen: int) -> str:
    """A table of the layer of the result, one of the other layers, and what the paper's numbers are."""
    lines = ["", f"{'labels per class':<18}{'test accuracy, %':<20}paper, another network and data (below)"]
    for result in results:
        if result.layer == chosen:
            n = result.labels_per_class
            printed = "{} +- {}".format(*LOW_DATA[n]) if n in LOW_DATA else "-"
            lines.append(f"{n:<18}{percent(result):<20}{printed}")
    further = [result for result in results if result.layer != chosen]
    if further:
        lines += ["", "further layers; the best of them would be chosen by the test labels"]
        lines += [f"{f'layer {r.layer}, {r.labels_per_class} labels':<24}{percent(r)}" for r in further]
    return "\n".join([*lines, "", f"paper: {LOW_DATA_PROTOCOL}"])


def percent(result: Result) -> str:
    """Mean and standard deviation in percent."""
    deviation = "" if result.sd is None else f" +- {100 * result.sd:.1f}"
    return f"{100 * result.mean:.1f}{deviation}"


def with_lists(words: Sequence[str]) -> list[str]:
    """Turn ``--layers 4 8`` into ``--layers "[4, 8]"``, the form that jsonargparse reads."""
    found: list[str] = []
    for word in words:
        if word.isdecimal() and found and found[-1] in LISTS:
            found.append(f"[{word}]")
        elif word.isdecimal() and len(found) > 1 and found[-2] in LISTS and found[-1].endswith("]"):
            found[-1] = f"{found[-1][:-1]}, {word}]"
        else:
            found.append(word)
    return found


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    return run_function(lowdata, with_lists(words), "lowdata")
