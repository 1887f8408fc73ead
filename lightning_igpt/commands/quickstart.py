"""``lightning-igpt quickstart``: the whole pipeline on the embedded digits, with baselines and a report."""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor

from lightning_igpt import __version__
from lightning_igpt.commands.arguments import run_function
from lightning_igpt.commands.places import check_folder
from lightning_igpt.commands.quickstart_plan import BATCH_SIZE, planned
from lightning_igpt.commands.quickstart_report import Pictures, draw_pictures, save_completions, write_report
from lightning_igpt.config import PRESETS
from lightning_igpt.data import FineTuneDataModule, PretrainDataModule, ProbeDataModule
from lightning_igpt.features import fit_logistic
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules import FineTuneModule, PretrainModule, ProbeModule
from lightning_igpt.objectives import next_pixel_loss
from lightning_igpt.trainer import make_trainer

NETWORK = replace(PRESETS["igpt_tiny"], vocab_size=16, image_size=8)
PALETTE = "gray:16"


@dataclass
class Run:
    """Where results go and what has been found so far."""

    out: Path
    seed: int
    results: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def trainer(self, name: str, **options: Any) -> Trainer:
        """A trainer that logs to TensorBoard and to a CSV file under ``out/name``."""
        loggers = [TensorBoardLogger(self.out, name=name, version=""), CSVLogger(self.out, name=name, version="")]
        return make_trainer(
            default_root_dir=self.out / name, logger=loggers, enable_model_summary=False, log_every_n_steps=5, **options
        )


def quickstart(
    out: str = "igpt-quickstart",
    steps: int = 800,
    epochs: int = 8,
    seed: int = 0,
    threads: int | None = None,
    dry_run: bool = False,
) -> None:
    """Pretrain a small network on 8 x 8 digits, complete, probe and fine-tune it, and write report.html.

    Args:
        out: Folder for the report, its pictures, the checkpoints and the TensorBoard logs. Missing folders are made.
        steps: Optimiser steps of pretraining.
        epochs: Passes over the labelled digits in fine-tuning.
        seed: Of weights, order and samples.
        threads: Of the CPU. Default: as many as are fastest in a short trial; on matrices this small, and beside other
            programs, that is often one.
        dry_run: Print what would run, with sizes, and stop.
    """
    for name, value in (("steps", steps), ("epochs", epochs), ("threads", 1 if threads is None else threads)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    check_folder(out, "--out")
    if dry_run:
        print(*planned(NETWORK, steps, epochs, out), sep="\n")
        return
    torch.set_num_threads(threads or fastest_threads())
    quiet_lightning()
    seed_everything(seed, verbose=False)
    run = Run(Path(out), seed)
    run.out.mkdir(parents=True, exist_ok=True)
    print(f"1/4 pretraining without labels, {steps} steps")
    checkpoint = pretrain(run, steps)
    print("2/4 completing lower halves")
    pictures = draw(run, checkpoint)
    print("3/4 probing every layer, and the same network untrained")
    probe(run, checkpoint)
    print(f"4/4 fine-tuning to a classifier, {epochs} epochs")
    finetune(run, checkpoint, epochs)
    run.results["seconds"] = round(time.monotonic() - run.started, 1)
    settings = {"steps": steps, "epochs": epochs, "seed": seed, "threads": torch.get_num_threads()}
    run.results["settings"] = settings | {"network": NETWORK.to_dict()}
    run.results["versions"] = {"lightning_igpt": __version__, "torch": torch.__version__}
    (run.out / "report.json").write_text(json.dumps(run.results, indent=2) + "\n")
    write_report(run.out, run.results, pictures)
    print(summary(run.results))
    print(f"open {run.out / 'report.html'}")


def fastest_threads() -> int:
    """The number of threads with which a training step of this network takes least time here and now."""
    network = ImageGPT(NETWORK)
    tokens = torch.randint(NETWORK.vocab_size, (16, NETWORK.n_positions))
    seconds = {}
    for threads in sorted({1, 2, torch.get_num_threads()}):
        torch.set_num_threads(threads)
        trials = []
        for _ in range(4):
            start = time.monotonic()
            next_pixel_loss(network(tokens), tokens).backward()  # type: ignore[no-untyped-call]
            trials.append(time.monotonic() - start)
        seconds[threads] = sorted(trials)[1]  # one trial may be lucky; the first warms up
    return min(seconds, key=seconds.__getitem__)


def pretrain(run: Run, steps: int) -> str:
    """Pretrain; record nats per pixel beside the baselines. Returns the checkpoint's path."""
    module = PretrainModule(NETWORK, PALETTE, lr=0.003, seed=run.seed)
    data = PretrainDataModule("digits", batch_size=BATCH_SIZE, seed=run.seed)
    trainer = run.trainer("pretrain", max_steps=steps)
    trainer.fit(module, data)
    path = str(run.out / "pretrain.ckpt")
    trainer.save_checkpoint(path)
    val = trainer.validate(module, data, verbose=False)[0]["val/nats_per_pixel"]
    train_tokens, val_tokens = (
        module.tokens_of(whole(loader)) for loader in (data.train_dataloader(), data.val_dataloader())
    )
    run.results["pretrain"] = {
        "val_nats_per_pixel": val,
        "uniform_nats_per_pixel": math.log(NETWORK.vocab_size),
        "unigram_nats_per_pixel": unigram_nats(train_tokens, val_tokens, NETWORK.vocab_size),
    }
    return path


def unigram_nats(train: Tensor, val: Tensor, vocab_size: int) -> float:
    """Nats per pixel of the model that knows each position's colour frequencies and nothing else.

    Args:
        train: int64 (N, T), counted with one added to every colour.
        val: int64 (M, T), scored.
        vocab_size: K.
    """
    counts = torch.nn.functional.one_hot(train, vocab_size).sum(0) + 1  # (T, K)
    nats = -(counts / counts.sum(1, keepdim=True)).log()
    return float(nats.gather(1, val.T).mean())


def whole(loader: Any) -> dict[str, Tensor]:
    """All images of a loader as one batch, each once and in the order of the rows."""
    batch: dict[str, Tensor] = loader.dataset[[(row, row) for row in range(len(loader.dataset))]]
    return batch


def draw(run: Run, checkpoint: str) -> Pictures:
    """Complete and score test digits, and save the completions."""
    module = PretrainModule.load_from_checkpoint(checkpoint, map_location="cpu")
    data = PretrainDataModule("digits", image_size=NETWORK.image_size, seed=run.seed)
    data.setup("test")
    images = whole(data.test_dataloader())["image"]
    pictures = draw_pictures(module.network, module.palette, images, run.seed)
    save_completions(pictures, run.out / "completions.png")
    return pictures


def probe(run: Run, checkpoint: str) -> None:
    """Probe the pretrained and an untrained network, and classify raw pixels, on the same split."""
    found: dict[str, dict[int, float]] = {}
    for label, weights in (("pretrained", checkpoint), ("untrained", None)):
        module = ProbeModule(
            weights, network=NETWORK, palette=PALETTE, c=1.0, seed=run.seed
        )  # a choice of c takes longer
        data = ProbeDataModule("digits", seed=run.seed)
        trainer = run.trainer(f"probe-{label}", max_epochs=1)
        trainer.fit(module, data)
        test = trainer.test(module, data, verbose=False)[0]
        found[label] = module.accuracy_by_layer
        run.results.setdefault("probe", {})[label] = {
            "best_layer": module.best_layer,
            "accuracy": test["test/accuracy"],
        }
    probes = run.results["probe"]
    run.results["probe"] = {
        "accuracy_by_layer": {str(layer): value for layer, value in found["pretrained"].items()},
        "best_layer": probes["pretrained"]["best_layer"],
        "best_accuracy": probes["pretrained"]["accuracy"],
        "untrained_accuracy_by_layer": {str(layer): value for layer, value in found["untrained"].items()},
        "untrained_best_accuracy": probes["untrained"]["accuracy"],
        "raw_pixels_accuracy": raw_pixels_accuracy(run.seed),
    }


def raw_pixels_accuracy(seed: int) -> float:
    """Test accuracy of the probe's logistic regression on the pixels themselves."""
    data = ProbeDataModule("digits", image_size=NETWORK.image_size, seed=seed)
    data.setup()
    parts = []
    for loader in (data.train_dataloader(), data.test_dataloader()):
        batch = whole(loader)
        parts.append((batch["image"][:, 0].flatten(1).float() / 255, batch["label"]))
    (x, y), (x_test, y_test) = parts
    weight, bias = fit_logistic(x, y, 10)
    return float(((x_test @ weight.T + bias).argmax(1) == y_test).float().mean())


def finetune(run: Run, checkpoint: str, epochs: int) -> None:
    """Fine-tune on all training digits and test what the last step left.

    Nothing is picked by validation, as the rate falls to zero, so nothing is held out for it.
    """
    options: dict[str, Any] = {"lr": 0.004, "schedule": "cosine", "warmup_steps": 20}
    module: LightningModule = FineTuneModule(checkpoint, 10, seed=run.seed, **options)
    data: LightningDataModule = FineTuneDataModule(
        "digits", batch_size=BATCH_SIZE, val_fraction=0.0, pad=0, flip=False, seed=run.seed
    )
    trainer = run.trainer("finetune", max_epochs=epochs, limit_val_batches=0)
    trainer.fit(module, data)
    test = trainer.test(module, data, verbose=False)[0]
    run.results["finetune"] = {"accuracy": test["test/accuracy"], "cross_entropy": test["test/cross_entropy"]}


def summary(results: dict[str, Any]) -> str:
    """The results in four lines."""
    density, probes = results["pretrain"], results["probe"]
    return "\n".join(
        [
            f"density      {density['val_nats_per_pixel']:.3f} nats per pixel "
            f"(unigram per position {density['unigram_nats_per_pixel']:.3f}, uniform "
            f"{density['uniform_nats_per_pixel']:.3f})",
            f"probe        {probes['best_accuracy']:.3f} at layer {probes['best_layer']} "
            f"(untrained {probes['untrained_best_accuracy']:.3f}, raw pixels {probes['raw_pixels_accuracy']:.3f})",
            f"fine-tuned   {results['finetune']['accuracy']:.3f}",
            f"seconds      {results['seconds']}",
        ]
    )


def quiet_lightning() -> None:
    """Silence hints that a first-time reader can do nothing with."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*in eval mode at the start.*",
        ".*exists and is not empty.*",
        ".*LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message)


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    return run_function(quickstart, words, "quickstart")
