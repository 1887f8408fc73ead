"""What a run's folder holds: its numbers, its pictures, and what made it.

A run is a folder with TensorBoard events, metrics.csv, or one of the files that this package's callbacks and commands
write; ``fit`` and ``test`` of one recipe are two. Not here: pages and plots (``report.py``).
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from lightning_igpt.commands.report_curves import EVENTS, Curve, read_curves, read_layers
from lightning_igpt.commands.report_record import read_record
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.weights.checkpoint import STAMP, read_checkpoint

PICTURES = {
    "completions.png": "Completions: what was given, samples, the truth.",
    "confusion.png": "Confusion matrix of the test images.",
    "worst.png": "The test images with the highest loss, each with what it is and what was said.",
}
EVIDENCE = (EVENTS, "metrics.csv", "lowdata.json", "probe_by_layer.csv", "probe_by_layer.png", *PICTURES)
GRIDS = "completions/step-*.png"
SOUGHT = ", ".join((*EVIDENCE, GRIDS))


@dataclass
class Run:
    """One run; what its files do not tell is None or empty."""

    name: str
    folder: Path
    module: str | None = None  # class name
    version: str | None = None
    network: ImageGPTConfig | None = None
    palette_sha256: str | None = None
    pretrained: str | None = None
    source: str | None = None
    n_images: int | None = None  # in the training part
    n_drawn: int | None = None  # images seen in training, repeats included
    n_classes: int | None = None
    curves: dict[str, Curve] = field(default_factory=dict)
    layers: dict[str, dict[int, float]] = field(default_factory=dict)  # accuracy by layer, by part of the data
    pictures: dict[Path, str] = field(default_factory=dict)  # path: caption
    low_data: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)  # of run.json
    warnings: list[str] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to show."""
        return not (self.curves or self.layers or self.pictures or self.low_data)

    def last(self, name: str) -> float | None:
        """The last value of a metric."""
        return self.curves[name][-1][1] if name in self.curves else None


def find_runs(given: Path) -> dict[str, Path]:
    """The runs in a folder and below it, by name; versions in the order of their numbers.

    Raises:
        FileNotFoundError: There is no such folder, or no run in it; the message tells what was looked for.
    """
    if not given.is_dir():
        reason = "is no folder" if given.exists() else "does not exist"
        raise FileNotFoundError(f"{given} {reason}; name the folder of a run, or one with runs below it")
    files = [path for path in given.rglob("*") if path.is_file()]
    found = {path.parent for path in files if any(fnmatch.fnmatch(path.name, pattern) for pattern in EVIDENCE)}
    found |= {path.parent.parent for path in files if path.match(GRIDS)}
    if not found:
        raise FileNotFoundError(f"{given} holds no run: looked in it and below for {SOUGHT}")
    if len(found) == 1:
        return {str(given): found.pop()}
    return {_name(given, folder): folder for folder in sorted(found, key=_by_numbers)}


def read_runs(given: Path) -> list[Run]:
    """Read all runs in a folder and below it.

    Raises:
        FileNotFoundError: As for find_runs; or there are runs, but whole and of something else.
    """
    runs = [read_run(name, folder) for name, folder in find_runs(given).items()]
    if all(run.is_empty and not run.warnings for run in runs):
        raise FileNotFoundError(
            f"{given} holds nothing of this package: looked for metrics such as val/nats_per_pixel and val/accuracy, "
            f"and for {SOUGHT}"
        )
    return runs


def read_run(name: str, folder: Path) -> Run:
    """Read all there is; what cannot be read is named in ``warnings``."""
    run = Run(name, folder)
    config = _read_yaml(run, folder / "config.yaml")
    _describe(run, config, _read_yaml(run, folder / "hparams.yaml"))
    _read_stamp(run, config)
    run.curves = read_curves(folder, run.warnings)
    run.layers = read_layers(folder, run.curves, run.warnings)
    run.low_data = _read_low_data(run)
    run.record = read_record(folder, run.warnings)
    _find_pictures(run)
    return run


def _read_low_data(run: Run) -> dict[str, Any]:
    path = run.folder / "lowdata.json"
    if not path.exists():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        run.network = ImageGPTConfig.resolve(found["network"])
        run.palette_sha256, run.pretrained, run.version = found["palette_sha256"], found["pretrained"], found["version"]
        run.source, run.n_classes = found["source"], found["n_classes"]
        for result in found["results"]:
            result["layer"], result["labels_per_class"], result["mean"], result["sd"]
    except (KeyError, TypeError, ValueError) as error:
        run.warnings.append(f"{path} is damaged and was skipped: {error!r}")
        return {}
    return found


def _find_pictures(run: Run) -> None:
    grids = sorted(run.folder.glob(GRIDS), key=_by_numbers)
    if grids:
        step = int("".join(filter(str.isdecimal, grids[-1].stem)) or 0)
        run.pictures[grids[-1]] = f"Completions after step {step:,}: what was given, samples, the truth."
    layers = {} if run.layers else {"probe_by_layer.png": "Probe accuracy by layer."}
    for name, caption in (PICTURES | layers).items():
        if (run.folder / name).exists():
            run.pictures[run.folder / name] = caption


def _read_yaml(run: Run, path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except Exception as error:  # whatever is wrong with it, the rest can be shown
        run.warnings.append(f"{path} cannot be read: {str(error).splitlines()[0]}")
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _describe(run: Run, config: Mapping[str, Any], hparams: Mapping[str, Any]) -> None:
    """What config.yaml and hparams.yaml say."""
    model, data = _section(config, "model"), _section(config, "data")
    run.module = str(model["class_path"]).rpartition(".")[2] if model.get("class_path") else None
    run.source = _section(data, "init_args").get("source")
    run.pretrained = _section(model, "init_args").get("pretrained")
    run.n_classes = hparams.get("num_classes")
    _set_network(run, hparams.get("network"))


def _read_stamp(run: Run, config: Mapping[str, Any]) -> None:
    """What the newest checkpoint says, or the one that was tested."""
    files = [*run.folder.glob("*.ckpt"), *run.folder.glob("checkpoints/*.ckpt")]
    if not files and Path(str(config.get("ckpt_path") or "")).is_file():
        files = [Path(config["ckpt_path"])]
    if not files:
        return
    try:
        checkpoint = read_checkpoint(max(files, key=lambda path: path.stat().st_mtime))
    except ValueError as error:
        run.warnings.append(str(error).splitlines()[0])
        return
    stamp = checkpoint[STAMP]
    run.module, run.version = stamp.get("class"), stamp.get("version")
    run.palette_sha256 = stamp.get("palette_sha256")
    _set_network(run, stamp.get("network"))
    run.n_classes = _section(checkpoint, "hyper_parameters").get("num_classes", run.n_classes)
    run.source = _section(checkpoint, "datamodule_hyper_parameters").get("source", run.source)
    for state in checkpoint.values():
        if isinstance(state, dict) and {"batches_done", "n_images", "global_batch"} <= set(state):
            run.n_images, run.n_drawn = state["n_images"], state["batches_done"] * state["global_batch"]


def _set_network(run: Run, fields: Any) -> None:
    try:
        run.network = ImageGPTConfig.resolve(fields) if fields else run.network
    except (TypeError, ValueError) as error:
        run.warnings.append(f"{run.folder}: {error}")


def _section(mapping: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = mapping.get(key)
    return value if isinstance(value, dict) else {}


def _name(given: Path, folder: Path) -> str:
    """Where a run lies below what was given, without the folder that every Lightning run has."""
    parts = [part for part in folder.relative_to(given).parts if part != "lightning_logs"]
    return " · ".join([str(given), *parts])


def _by_numbers(path: Path) -> list[Any]:
    """A sort key under which version_10 follows version_9."""
    return [(part.isdecimal(), int(part) if part.isdecimal() else part) for part in re.split(r"(\d+)", str(path))]
