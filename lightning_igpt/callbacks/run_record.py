"""What made a run and what it logged, as files in its folder: ``run.json`` and ``metrics.csv``."""

import json
import platform
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_igpt.callbacks.metrics_file import MetricsFile
from lightning_igpt.callbacks.run_folder import WARNED, run_folder, sparing
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.files import counted, write_text
from lightning_igpt.planning import parameter_count

RECORD = "run_record"  # key in checkpoints
LIBRARIES = ("lightning-igpt", "torch", "lightning", "datasets", "numpy", "pillow")
DATA = ("batch_size", "seed", "val_fraction")  # with source and images, what decides the order
TRAINER = ("precision", "max_steps", "max_epochs", "accumulate_grad_batches", "world_size")


class RunRecord(Callback):
    """Record what made a run and what it logged, and warn where a resumed run differs.

    When a fit starts, ``run.json`` in the run's folder gets an entry under ``runs``. Where there is a logger,
    ``metrics.csv`` gets a row for each logged step; a resumed run replaces what was logged after its checkpoint.
    """

    _metrics: MetricsFile | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._now: dict[str, Any] = {}  # of this fit, on the first process
        self._earlier: dict[str, Any] = {}  # in the resumed checkpoint
        WARNED.clear()
        folder = run_folder(trainer) if trainer.is_global_zero else None
        if folder and trainer.loggers and not any(isinstance(logger, CSVLogger) for logger in trainer.loggers):
            self._metrics = MetricsFile(folder / "metrics.csv")
            trainer.loggers = [*trainer.loggers, self._metrics]

    # Not state_dict: Lightning would warn everyone who loads the checkpoint without this callback.
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        record = checkpoint.get(RECORD)
        self._earlier = record if isinstance(record, dict) else {}
        for logger in trainer.loggers if trainer.is_global_zero else []:
            if hasattr(logger, "cut"):
                logger.cut(checkpoint["global_step"])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[RECORD] = getattr(self, "_now", {})  # saved before any fit, there is no record

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        record, was = describe(trainer, pl_module), self._earlier
        folder = run_folder(trainer) if trainer.loggers or trainer.checkpoint_callbacks else None
        if folder is not None:
            path = folder / "run.json"
            with sparing(path):
                runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
                write_text(path, json.dumps({"runs": [*runs, record]}, indent=1))
        now = self._now = comparable(record)
        changes = [f"{key} {was[key]!r} -> {now[key]!r}" for key in sorted(now.keys() & was) if now[key] != was[key]]
        if changes:
            rank_zero_warn(f"the resumed run differs from the run that wrote its checkpoint: {', '.join(changes)}")

    def _close(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if self._metrics is not None:
            self._metrics.write()
            trainer.loggers, self._metrics = [one for one in trainer.loggers if one is not self._metrics], None

    teardown = on_exception = _close


class Outline(Callback):
    """When training starts, log the network, where its weights are from, the data, and where results go."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        config, data = getattr(pl_module, "config", None), getattr(trainer, "datamodule", None)
        if isinstance(config, ImageGPTConfig):
            size = f"depth {config.n_layer}, width {config.n_embd}, {parameter_count(config):,} parameters"
            each = " of 3 tokens" * (config.tokens_per_pixel == 3)
            rank_zero_info(f"network: {size}, {config.image_size} x {config.image_size} pixels{each}")
        if origin := trainer.ckpt_path or getattr(pl_module, "origin", None):
            rank_zero_info(f"weights: {f'step {trainer.global_step} of ' * bool(trainer.ckpt_path)}{origin}")
        parts, names = getattr(data, "parts", {}), {"train": "training", "val": "validation"}
        counts = [counted(len(parts[part]), f"{name} image") for part, name in names.items() if part in parts]
        source = getattr(data, "source", None)
        source = source if isinstance(source, str) else type(source or data).__name__
        rank_zero_info(", ".join([f"data: {source}", *counts]))
        rank_zero_info(f"results: {run_folder(trainer) or trainer.default_root_dir}")


def describe(trainer: Trainer, module: Any) -> dict[str, Any]:
    """The entry of a run in run.json, as JSON values."""
    data, device = getattr(trainer, "datamodule", None), trainer.strategy.root_device
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    record = {
        "started": datetime.now(timezone.utc).isoformat(),
        "versions": {"python": platform.python_version()} | {name: metadata.version(name) for name in LIBRARIES},
        "machine": {"host": platform.node(), "processor": processor, "threads": torch.get_num_threads()},
        "commit": _commit(Path.cwd()),
        "trainer": {name: getattr(trainer, name) for name in TRAINER},
        "module": {"class": type(module).__name__, "hparams": _hparams(module)},
        "data": {"class": type(data).__name__, "hparams": _hparams(data)},
        "resize": getattr(data, "resize_filter", None),
        "images": {f"{name}_images": len(part) for name, part in getattr(data, "parts", {}).items()},
        "module_seed": _hparams(module).get("seed"),
        "palette_sha256": getattr(getattr(module, "palette", None), "sha256", None),
    }
    return json.loads(json.dumps(record, default=str))  # type: ignore[no-any-return]


def comparable(record: Mapping[str, Any]) -> dict[str, Any]:
    """What of an entry a resumed run should share with the run that it continues."""
    settings, names = record["data"]["hparams"], ("palette_sha256", "module_seed", "resize")
    shared = {f"data_{name}": settings.get(name) for name in DATA} | {name: record[name] for name in names}
    shared["precision"] = record["trainer"]["precision"]
    shared["data_source"] = Path(str(settings.get("source"))).name  # whole paths must not be published
    return shared | dict(record["versions"]) | dict(record["images"])


def _hparams(owner: Any) -> dict[str, Any]:
    """Hyperparameters, without the colors of a palette, which has a hash."""
    pairs = getattr(owner, "hparams", {}).items()
    return {name: value for name, value in pairs if name != "palette" or isinstance(value, str)}


def _commit(folder: Path) -> str | None:
    """Commit of the git repository around a folder, with "-dirty" where tracked files differ; None without one."""
    words = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(words, capture_output=True, text=True, timeout=5).stdout.strip() or None
    return None
