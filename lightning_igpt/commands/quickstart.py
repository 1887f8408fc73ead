"""``lightning-igpt quickstart``: the whole pipeline on the embedded emoji, with baselines and a report."""

import json
import logging
import math
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_igpt import __version__
from lightning_igpt.commands.arguments import check_folder
from lightning_igpt.commands.lowdata import draw_subsets, features, measure
from lightning_igpt.commands.quickstart_page import completions_section, result_rows, write_report
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.data import FineTuneDataModule, PretrainDataModule, ProbeDataModule
from lightning_igpt.features import fit_logistic
from lightning_igpt.files import write_text
from lightning_igpt.kmeans import fit_palette
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules import FineTuneModule, PretrainModule, ProbeModule
from lightning_igpt.palette import Palette
from lightning_igpt.trainer import make_trainer
from lightning_igpt.weights import Pretrained, load_pretrained

NETWORK = ImageGPTConfig(n_layer=4, n_head=2, n_embd=64, vocab_size=64, image_size=16)
BATCH_SIZE, N_CLASSES, FEW, SUBSETS, FINETUNE_STEPS = 16, 9, 10, 5, 400


def quickstart(out: str = "igpt-quickstart", steps: int = 800, seed: int = 0) -> None:
    """Pretrain a small network on emoji of 16 x 16 pixels, complete, probe and fine-tune it, and write report.html.

    Args:
        out: Folder for the report, its pictures, the checkpoints and the TensorBoard logs. Missing folders are made.
        steps: Optimizer steps of pretraining.
        seed: Seed of weights, order and samples.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; it must be at least 1")
    check_folder(out, "--out")
    started, folder = time.monotonic(), Path(out)
    quiet_lightning()
    seed_everything(seed, verbose=False)
    print(f"1/4 pretraining without labels, {steps} steps of {BATCH_SIZE} images")
    results: dict[str, Any] = {"pretrain": pretrain(folder, seed, steps)}
    print("2/4 completing test images")
    loaded = load_pretrained(str(folder / "pretrain.ckpt"))
    labeled = ProbeDataModule("emoji", image_size=NETWORK.image_size, val_fraction=0.0)
    labeled.setup()
    images = whole(labeled.test_dataloader())["image"]
    completions = completions_section(loaded.network, loaded.palette, images, folder, seed)
    print("3/4 probing every layer, and the same network untrained")
    results["probe"] = probe(folder, loaded.palette, seed)
    results["few_labels"] = few_labels(loaded, labeled, seed)
    print(f"4/4 fine-tuning, {FINETUNE_STEPS} steps, and the same from scratch")
    results["finetune"] = finetune(folder, loaded.palette, seed)
    results["seconds"] = round(time.monotonic() - started, 1)
    settings = {"steps": steps, "seed": seed, "threads": torch.get_num_threads(), "network": NETWORK.to_dict()}
    results |= {"settings": settings, "versions": {"lightning_igpt": __version__, "torch": torch.__version__}}
    write_text(folder / "report.json", json.dumps(results, indent=2) + "\n")
    write_report(folder, results, completions)
    print(*(f"{what:<34}{value:<20}{note}" for what, value, note in result_rows(results)), sep="\n")
    print(f"open {(folder / 'report.html').resolve().as_uri()}")


def quiet_lightning() -> None:
    """Silence hints that a first-time reader can do nothing with."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for words in ("does not have many workers", "in eval mode at the start", "exists and is not empty", "LeafSpec"):
        warnings.filterwarnings("ignore", f".*{words}.*")


def trainer(folder: Path, **options: Any) -> Trainer:
    """A trainer that logs to TensorBoard and to a new metrics.csv in the folder."""
    (folder / "metrics.csv").unlink(missing_ok=True)  # of an earlier quickstart, since runs append to it
    logger = TensorBoardLogger(folder.parent, name=folder.name, version="")
    options |= {"enable_model_summary": False, "log_every_n_steps": 5}
    return make_trainer(default_root_dir=folder, logger=logger, **options)


def pretrain(folder: Path, seed: int, steps: int) -> dict[str, float]:
    """Pretrain, save pretrain.ckpt, and compare nats per pixel with the baselines."""
    options: dict[str, Any] = {"image_size": NETWORK.image_size, "random_crop": False, "seed": seed}
    data = PretrainDataModule("emoji", batch_size=BATCH_SIZE, train_split="train+train_variants", **options)
    data.setup("fit")
    images, held_out = (whole(part)["image"] for part in (data.train_dataloader(), data.val_dataloader()))
    palette = fit_palette(images, n_colors=NETWORK.vocab_size)
    module = PretrainModule(NETWORK, palette, optimizer="muon", lr=0.03, seed=seed)
    runner = trainer(folder / "pretrain", max_steps=steps)
    runner.fit(module, data)
    runner.save_checkpoint(folder / "pretrain.ckpt")
    val = runner.validate(module, data, verbose=False)[0]["val/nats_per_pixel"]
    unigram = unigram_nats(palette.quantize(images), palette.quantize(held_out), NETWORK.vocab_size)
    nats = {"val": val, "uniform": math.log(NETWORK.vocab_size), "unigram": unigram}
    return {f"{name}_nats_per_pixel": value for name, value in nats.items()}


def unigram_nats(train: Tensor, val: Tensor, vocab_size: int) -> float:
    """Nats per pixel of ``val``, int64 (M, T), by the color frequencies at each position of ``train``, int64 (N, T).

    One is added to the count of each of the ``vocab_size`` colors.
    """
    counts = torch.nn.functional.one_hot(train, vocab_size).sum(0) + 1  # (T, K)
    nats = -(counts / counts.sum(1, keepdim=True)).log()
    return float(nats.gather(1, val.T).mean())


def whole(loader: Any) -> dict[str, Tensor]:
    """All images of a loader as one batch, each once and in the order of the rows."""
    return loader.dataset[[(row, row) for row in range(len(loader.dataset))]]  # type: ignore[no-any-return]


def probe(folder: Path, palette: Palette, seed: int) -> dict[str, Any]:
    """Probe the pretrained and an untrained network, and classify raw pixels, on the same split."""
    results: dict[str, Any] = {}
    for prefix, weights in (("", str(folder / "pretrain.ckpt")), ("untrained_", None)):
        # c is fixed, since choosing it takes longer.
        module = ProbeModule(weights, network=NETWORK, palette=palette, c=1.0, seed=seed)
        data = ProbeDataModule("emoji", seed=seed)
        runner = trainer(folder / f"probe-{'pretrained' if weights else 'untrained'}", max_epochs=1)
        runner.fit(module, data)
        test = runner.test(module, data, verbose=False)[0]
        results[f"{prefix}accuracy_by_layer"] = {str(n): value for n, value in module.accuracy_by_layer.items()}
        results |= {f"{prefix}best_layer": module.best_layer, f"{prefix}best_accuracy": test["test/accuracy"]}
    (x, labels), (x_test, test_labels) = (pixels(part) for part in (data.train_dataloader(), data.test_dataloader()))
    weight, bias = fit_logistic(x, labels, N_CLASSES)
    right = (x_test @ weight.T + bias).argmax(1) == test_labels
    return results | {"raw_pixels_accuracy": float(right.float().mean())}


def pixels(loader: Any) -> tuple[Tensor, Tensor]:
    """Raw pixels of a loader's images, float32 (N, 3 S^2) in 0..1, and their classes, int64 (N,)."""
    batch = whole(loader)
    return batch["image"].flatten(1).float() / 255, batch["label"]


def few_labels(loaded: Pretrained, data: ProbeDataModule, seed: int) -> dict[str, Any]:
    """Test accuracy from few labels, over random subsets, of the middle layer, the same untrained, and raw pixels."""
    parts: list[Any] = [loader.dataset for loader in (data.train_dataloader(), data.test_dataloader())]
    train, test = parts
    subsets = draw_subsets(train.labels, data.class_names or [], FEW, SUBSETS, seed=seed)
    rows, places = subsets.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    reading: dict[str, Any] = {"seed": seed, "batch_size": 64, "num_workers": 0}
    sides = {"": loaded, "untrained_": replace(loaded, network=ImageGPT(loaded.config).eval())}
    results: dict[str, Any] = {}
    for prefix, side in sides.items():
        x, x_test = (
            features(side, [NETWORK.n_layer // 2], part, numbers, **reading)[:, 0]
            for part, numbers in ((train, rows.tolist()), (test, list(range(len(test)))))
        )
        results[f"{prefix}accuracy"] = measure(x, train.labels[rows], x_test, test.labels, places, 1.0)["mean"]
    (x, labels), (x_test, test_labels) = pixels(data.train_dataloader()), pixels(data.test_dataloader())
    return results | {"raw_pixels_accuracy": measure(x, labels, x_test, test_labels, subsets, 1.0)["mean"]}


def finetune(folder: Path, palette: Palette, seed: int) -> dict[str, float]:
    """Fine-tune on the labeled images, pretrained and from scratch, and test the last step; nothing is held out."""
    results: dict[str, float] = {}
    for prefix, weights in (("", str(folder / "pretrain.ckpt")), ("scratch_", None)):
        options: dict[str, Any] = {"lr": 0.003, "schedule": "cosine", "warmup_steps": FINETUNE_STEPS // 20}
        module = FineTuneModule(weights, N_CLASSES, network=NETWORK, palette=palette, seed=seed, **options)
        data = FineTuneDataModule("emoji", batch_size=BATCH_SIZE, val_fraction=0.0, pad=1, seed=seed)
        name = f"finetune-{'pretrained' if weights else 'scratch'}"
        runner = trainer(folder / name, max_steps=FINETUNE_STEPS, limit_val_batches=0)
        runner.fit(module, data)
        test = runner.test(module, data, verbose=False)[0]
        results |= {f"{prefix}accuracy": test["test/accuracy"], f"{prefix}cross_entropy": test["test/cross_entropy"]}
    return results
