"""``lightning-igpt lowdata``: probes fitted on few labels (paper, section 4.7, Table 4); none to choose a layer."""

import json
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_igpt import __version__
from lightning_igpt.commands.arguments import check_folder
from lightning_igpt.commands.complete import pick_device
from lightning_igpt.data import ProbeDataModule
from lightning_igpt.features import fit_logistic
from lightning_igpt.files import counted, shown, write_csv, write_text
from lightning_igpt.modules.batches import read_batch
from lightning_igpt.objectives import MASK_RATIO, draw_mask
from lightning_igpt.weights import Pretrained, load_pretrained

PAPER = {4: "73.2 +- 1.5", 25: "87.6 +- 0.6", 400: "94.3 +- 0.1"}  # iGPT-L of ImageNet on CIFAR-10, in %; Table 4


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

    Prints mean and standard deviation of the test accuracy over the subsets; writes lowdata.csv and lowdata.json.

    Args:
        source: Labeled images with a test split: a folder, Parquet, a hub id, digits or emoji.
        out: Folder for lowdata.csv and lowdata.json. Missing folders are made.
        labels_per_class: Budgets, one or more, such as --labels_per_class 4 25 400.
        n_subsets: Random subsets per budget. Subset i of a smaller budget is part of subset i of a larger one.
        layer: The layer whose features are classified: 0 is the input of the first block, n_layer the final norm.
            Default: n_layer // 2, chosen without labels; the paper does not say how it chose.
        layers: Further layers to measure: all, or numbers. Do not choose a layer by these test accuracies.
        c: Inverse strength of the L2 penalty, as scikit-learn's C. The paper does not state it.
        seed: Seed of the subsets, and of a BERT network's masks, one per image.
        num_workers: Processes that read and decode; 0 reads in the main process.
        val_fraction: Share of the training split to leave out, which a run with this seed and share holds out.
        train_split: Split to draw from. Default: train.
        test_split: Split to test on. Default: test.
    """
    check_folder(out, "--out")
    for name, value in (("labels_per_class", min(labels_per_class, default=0)), ("n_subsets", n_subsets), ("c", c)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    budgets = sorted(set(labels_per_class))
    loaded = load_pretrained(pretrained)
    config = loaded.config
    chosen = config.n_layer // 2 if layer is None else layer
    asked = sorted({chosen, *(range(config.n_layer + 1) if "all" in (layers or []) else layers or [])})
    if asked[0] < 0 or asked[-1] > config.n_layer:
        raise ValueError(f"layers are {asked}; this network has 0 to {config.n_layer}")
    reading: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "num_workers": num_workers}
    where: dict[str, Any] = {"config_name": config_name, "image_column": image_column, "label_column": label_column}
    where |= {"train_split": train_split, "test_split": test_split, "val_fraction": val_fraction}
    data: Any = ProbeDataModule(source, image_size=config.image_size, resize=loaded.resize_filter, **reading, **where)
    data.setup()
    train, test, names = data.train_dataloader().dataset, data.test_dataloader().dataset, data.class_names or []
    subsets = draw_subsets(train.labels, names, budgets[-1], n_subsets, seed=seed)
    rows, places = subsets.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    print(shown(f"{loaded.origin}, layer {chosen}"))
    print(f"{source}: {counted(len(train), 'training image')} ({len(rows)} used), {counted(len(test), 'test image')}")
    loaded.network.to(pick_device(device)).eval()
    x = features(loaded, asked, train, rows.tolist(), **reading)
    x_test = features(loaded, asked, test, list(range(len(test))), **reading)
    results = [
        {"layer": asked[i], "labels_per_class": n}
        | measure(x[:, i], train.labels[rows], x_test[:, i], test.labels, places[..., :n], c)
        for i, n in product(range(len(asked)), budgets)
    ]
    facts: dict[str, Any] = {"pretrained": loaded.origin, "network": config.to_dict(), "version": __version__}
    facts |= {"palette_sha256": loaded.palette.sha256, "source": source, "n_classes": len(names)}
    facts |= {"n_train_images": len(train), "n_test_images": len(test), "c": c, "seed": seed}
    facts |= {"layer": chosen, "layer_choice": "the middle" if layer is None else "as asked for"}
    write_results(Path(out), facts, results)


def draw_subsets(labels: Tensor, class_names: Sequence[str], largest: int, n_subsets: int, *, seed: int) -> Tensor:
    """Rows of ``n_subsets`` random subsets with ``largest`` images of each class, int64 (S, C, n).

    The first m rows of a class are its subset of the budget m, so that results do not depend on the other budgets.
    """
    classes = [np.flatnonzero(labels.numpy() == number) for number in range(len(class_names))]
    name, fewest = min(zip(class_names, map(len, classes), strict=True), key=lambda pair: pair[1])
    if fewest < largest:
        what = f"class {name!r} has {counted(fewest, 'training image')}, fewer than labels_per_class {largest}"
        raise ValueError(f"{what}; set --labels_per_class to at most {fewest}")
    generators = [np.random.default_rng([seed, subset]) for subset in range(n_subsets)]
    return torch.from_numpy(np.array([[rng.permutation(rows)[:largest] for rows in classes] for rng in generators]))


@torch.no_grad()
def features(
    loaded: Pretrained, layers: list[int], images: Any, rows: list[int], seed: int, batch_size: int, num_workers: int
) -> Tensor:
    """Features of rows of a dataset, on the CPU: float32 (R, layers, D); BERT's masks depend on seed and row alone."""
    network, config = loaded.network, loaded.config
    draws = [[(row, row) for row in rows[i : i + batch_size]] for i in range(0, len(rows), batch_size)]
    parts = []
    for batch in DataLoader(images, batch_size=None, sampler=draws, num_workers=num_workers):
        batch = {name: values.to(network.wpe.weight.device) for name, values in batch.items()}
        tokens, masked = read_batch(batch, loaded.palette, config).tokens, None
        if config.objective == "bert":
            options: dict[str, Any] = {"seed": seed, "tokens_per_pixel": config.tokens_per_pixel}
            masked = draw_mask(batch["sample"], config.n_positions, ratio=MASK_RATIO, **options)
        parts.append(network.features(tokens, layers, masked=masked).float().cpu())  # (B, layers, D)
    return torch.cat(parts)


def measure(
    x: Tensor, labels: Tensor, x_test: Tensor, test_labels: Tensor, subsets: Tensor, c: float
) -> dict[str, list[float] | float | None]:
    """Test accuracy of a logistic regression on each subset, rows (S, C, n) of ``x``, with mean and deviation."""
    heads = (fit_logistic(x[subset], labels[subset], subsets.shape[1], c=c) for subset in subsets.flatten(1))
    right = [(x_test @ weight.T + bias).argmax(1) == test_labels for weight, bias in heads]
    accuracies = [part.double().mean().item() for part in right]
    sd = statistics.stdev(accuracies) if len(accuracies) > 1 else None
    return {"accuracies": accuracies, "mean": statistics.fmean(accuracies), "sd": sd}


def write_results(folder: Path, facts: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """Print a table; write lowdata.csv, a row for every subset, and lowdata.json with all that decided the numbers."""
    print(f"{'layer':>5}  {'labels per class':>16}  {'test accuracy, %':<17}  the paper's L on CIFAR-10")
    rows: list[list[Any]] = [["layer", "labels_per_class", "subset", "test_accuracy"]]
    for result in results:
        layer, count, sd = result["layer"], result["labels_per_class"], result["sd"]
        mean = f"{100 * result['mean']:.1f}" + ("" if sd is None else f" +- {100 * sd:.1f}")
        print(f"{layer:>5}  {count:>16}  {mean:<17}  {PAPER.get(count, '-')}")
        rows += [[layer, count, subset, f"{value:.6f}"] for subset, value in enumerate(result["accuracies"])]
    write_csv(folder / "lowdata.csv", rows)
    write_text(folder / "lowdata.json", json.dumps({**facts, "results": results}, indent=2) + "\n")
    print(f"wrote {folder / 'lowdata.csv'} and lowdata.json")
