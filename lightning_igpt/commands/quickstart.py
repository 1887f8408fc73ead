"""``lightning-igpt quickstart``: the whole pipeline on the embedded digits, with baselines and a report."""

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
from lightning_igpt.commands.quickstart_page import picture_sections, result_rows, write_report
from lightning_igpt.config import PRESETS
from lightning_igpt.data import FineTuneDataModule, PretrainDataModule, ProbeDataModule
from lightning_igpt.features import fit_logistic
from lightning_igpt.files import write_text
from lightning_igpt.modules import FineTuneModule, PretrainModule, ProbeModule
from lightning_igpt.trainer import make_trainer

NETWORK = replace(PRESETS["igpt_tiny"], vocab_size=16, image_size=8)
PALETTE, BATCH_SIZE = "gray:16", 16


def quickstart(
    out: str = "igpt-quickstart", steps: int = 800, epochs: int = 8, seed: int = 0, threads: int = 1
) -> None:
    """Pretrain a small network on 8 x 8 digits, complete, probe and fine-tune it, and write report.html.

    Args:
        out: Folder for the report, its pictures, the checkpoints and the TensorBoard logs. Missing folders are made.
        steps: Optimizer steps of pretraining.
        epochs: Passes over the labeled digits in fine-tuning.
        seed: Of weights, order and samples.
        threads: Of the CPU. For matrices this small more are hardly faster, and much slower next to other programs.
    """
    for name, value in {"steps": steps, "epochs": epochs, "threads": threads}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    check_folder(out, "--out")
    started, folder = time.monotonic(), Path(out)
    torch.set_num_threads(threads)
    quiet_lightning()
    seed_everything(seed, verbose=False)
    print(f"1/4 pretraining without labels, {steps} steps of {BATCH_SIZE} images")
    results: dict[str, Any] = {"pretrain": pretrain(folder, seed, steps)}
    print("2/4 completing lower halves")
    module = PretrainModule.load_from_checkpoint(folder / "pretrain.ckpt", map_location="cpu")
    data = PretrainDataModule("digits", image_size=NETWORK.image_size, seed=seed)
    data.setup("test")
    pictures = picture_sections(module, whole(data.test_dataloader())["image"], folder, seed)
    print("3/4 probing every layer, and the same network untrained")
    results["probe"] = probe(folder, seed)
    print(f"4/4 fine-tuning, {epochs} epochs")
    results["finetune"] = finetune(folder, seed, epochs)
    results["seconds"] = round(time.monotonic() - started, 1)
    settings = {"steps": steps, "epochs": epochs, "seed": seed, "threads": threads, "network": NETWORK.to_dict()}
    results |= {"settings": settings, "versions": {"lightning_igpt": __version__, "torch": torch.__version__}}
    write_text(folder / "report.json", json.dumps(results, indent=2) + "\n")
    write_report(folder, results, pictures)
    print(*(f"{what:<28}{value:<20}{note}" for what, value, note in result_rows(results)), sep="\n")
    print(f"open {folder / 'report.html'}")


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
    module = PretrainModule(NETWORK, PALETTE, lr=0.003, seed=seed)
    data = PretrainDataModule("digits", batch_size=BATCH_SIZE, seed=seed)
    runner = trainer(folder / "pretrain", max_steps=steps)
    runner.fit(module, data)
    runner.save_checkpoint(folder / "pretrain.ckpt")
    val = runner.validate(module, data, verbose=False)[0]["val/nats_per_pixel"]
    train, held_out = (module.tokens_of(whole(part)) for part in (data.train_dataloader(), data.val_dataloader()))
    n_colors = NETWORK.vocab_size
    nats = {"val": val, "uniform": math.log(n_colors), "unigram": unigram_nats(train, held_out, n_colors)}
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


def probe(folder: Path, seed: int) -> dict[str, Any]:
    """Probe the pretrained and an untrained network, and classify raw pixels, on the same split."""
    results: dict[str, Any] = {}
    for prefix, weights in (("", str(folder / "pretrain.ckpt")), ("untrained_", None)):
        # c is fixed, since choosing it takes longer.
        module = ProbeModule(weights, network=NETWORK, palette=PALETTE, c=1.0, seed=seed)
        data = ProbeDataModule("digits", seed=seed)
        runner = trainer(folder / f"probe-{'pretrained' if weights else 'untrained'}", max_epochs=1)
        runner.fit(module, data)
        test = runner.test(module, data, verbose=False)[0]
        results[f"{prefix}accuracy_by_layer"] = {str(n): value for n, value in module.accuracy_by_layer.items()}
        results |= {f"{prefix}best_layer": module.best_layer, f"{prefix}best_accuracy": test["test/accuracy"]}
    (x, labels), (x_test, labels_test) = (
        (batch["image"][:, 0].flatten(1).float() / 255, batch["label"])
        for batch in map(whole, (data.train_dataloader(), data.test_dataloader()))
    )
    weight, bias = fit_logistic(x, labels, 10)
    right = (x_test @ weight.T + bias).argmax(1) == labels_test
    return results | {"raw_pixels_accuracy": float(right.float().mean())}


def finetune(folder: Path, seed: int, epochs: int) -> dict[str, float]:
    """Fine-tune on all training digits and test the last step; nothing is held out, since validation picks nothing."""
    options: dict[str, Any] = {"lr": 0.004, "schedule": "cosine", "warmup_steps": 20}
    module = FineTuneModule(str(folder / "pretrain.ckpt"), 10, seed=seed, **options)
    data = FineTuneDataModule("digits", batch_size=BATCH_SIZE, val_fraction=0.0, pad=0, flip=False, seed=seed)
    runner = trainer(folder / "finetune", max_epochs=epochs, limit_val_batches=0)
    runner.fit(module, data)
    test = runner.test(module, data, verbose=False)[0]
    return {"accuracy": test["test/accuracy"], "cross_entropy": test["test/cross_entropy"]}
