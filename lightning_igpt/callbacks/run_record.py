"""What made a run, kept in its folder and its checkpoints; and what has changed when a run continues.

Not here: versions, hardware, git and the command line (``provenance.py``).
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lightning_igpt.callbacks import provenance
from lightning_igpt.callbacks.provenance import name_of, plain
from lightning_igpt.weights.safety import replacing

log = logging.getLogger(__name__)

FILE = "run.json"
RECORD = "run_record"  # key in a checkpoint
GROUPS = {
    "bits": "Results may differ in the last bits",
    "data": "Other data",
    "code": "Other code",
    "settings": "Other settings",
}
# Not compared: what computes nothing in a run; paths, which differ where nothing else does; what changes speed alone;
# and what has a name of its own in the record.
UNTOLD_VERSIONS = {"lightning_igpt", "driver", "transformers"}
UNTOLD = {"source", "cache_dir", "num_workers", "max_feature_bytes", "palette", "seed"}
LONGEST = 60  # characters of a value in a message

Values = dict[str, Any]


class RunRecord(Callback):
    """Write down what made a run, and tell where a resumed run differs.

    When training starts, ``run.json`` in the run's folder gets an entry: the time, the words of the command line (the
    values of options that are named like secrets are masked), versions, machine and devices, the commits of the code
    and whether files differ from them, settings and callbacks, the palette's hash, the data's fingerprint, the seeds,
    and where pretrained weights came from. Entries of earlier runs in the same folder stay. A run that keeps neither
    logs nor checkpoints has no folder, so nothing is written.

    Checkpoints hold what of it may change results, without paths. A run that continues one compares, and warns once
    with all that differs, also where it may differ, such as ``lr``.

    Training is the same with it and without it, bit for bit, and nothing that cannot be found out or written stops a
    run. Idle outside of ``fit``.
    """

    record: Values | None = None  # of the last fit; on the first process only

    def __init__(self) -> None:
        self._kept: dict[str, Values] = {}  # what checkpoints of this run hold
        self._earlier: Any = None  # what the checkpoint holds that this run continues
        self._continues = False
        self._path: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.record, self._kept, self._earlier, self._continues = None, {}, None, False

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what the checkpoint says; it is compared when training starts."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._earlier, self._continues = checkpoint.get(RECORD), True

    # Not state_dict: Lightning would ask everyone who opens the checkpoint without this callback to add it.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what may change results."""
        if self._kept:
            checkpoint[RECORD] = self._kept

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = _folder(trainer)  # which all processes ask for together
        if not trainer.is_global_zero:
            return
        self._path = None if folder is None else folder / FILE
        self.record = record = describe(trainer, pl_module)
        self._kept = _or(lambda: comparable(record), {})
        self._write()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.record is None or not self._continues:
            return
        name = Path(trainer.ckpt_path).name if trainer.ckpt_path else "the checkpoint"
        earlier = self._earlier if isinstance(self._earlier, Mapping) else None
        found = None if earlier is None else differences(earlier, self._kept)
        self.record["resumed"] = {"checkpoint": plain(trainer.ckpt_path), "differences": found}
        self._write()
        if found:
            rank_zero_warn(f"the run that wrote {name} goes on, but not all is as it was.\n{told(found)}")
        elif earlier is None:
            log.info("%s does not tell what made it, so nothing is compared", name)

    def _write(self) -> None:
        if self._path is None or self.record is None:
            return
        try:
            write_record(self._path, self.record)
        except (OSError, ValueError) as error:
            self._path = None  # once is enough
            rank_zero_warn(f"this run is not recorded: {error}")


def describe(trainer: Trainer, module: Any) -> Values:
    """The entry of a run in run.json; what cannot be found out is None."""
    data = getattr(trainer, "datamodule", None)
    parts: dict[str, Callable[[], Any]] = {
        "command": lambda: provenance.command_line(sys.argv),
        "working_directory": Path.cwd,
        "versions": provenance.versions,
        "machine": provenance.machine,
        "hardware": lambda: _hardware(trainer),
        "arithmetic": provenance.arithmetic,
        "code": provenance.code,
        "module": lambda: _class_and_hparams(module),
        "palette_sha256": lambda: module.palette.sha256,
        "pretrained": lambda: _origin(module),
        "data": lambda: None if data is None else _class_and_hparams(data),
        "data_fingerprint": lambda: getattr(data, "fingerprint", None),
        "seeds": lambda: _seeds(module, data),
        "trainer": lambda: {name: getattr(trainer, name, None) for name in _TRAINER},
        "callbacks": lambda: [type(one).__qualname__ for one in trainer.callbacks],  # type: ignore[attr-defined]
    }
    found = {name: _or(lambda part=part: plain(part()), None) for name, part in parts.items()}  # type: ignore[misc]
    return {"started": provenance.now(), **found, "resumed": None}


def comparable(record: Mapping[str, Any]) -> dict[str, Values]:
    """What of an entry may change results, by the names of GROUPS: plain values, and no path."""
    versions, machine, hardware = (dict(record[name] or {}) for name in ("versions", "machine", "hardware"))
    bits = {name: value for name, value in versions.items() if name not in UNTOLD_VERSIONS}
    names = hardware.pop("devices", [])
    bits |= hardware | {"device": ", ".join(sorted(set(names)))} | (record["arithmetic"] or {})
    if names == ["cpu"]:
        bits |= {name: machine[name] for name in ("processor", "instructions", "threads") if name in machine}
    code: Values = {name: versions[name] for name in ("lightning_igpt",) if name in versions}
    repositories = record["code"] or {}
    for where, prefix in (("working_directory", ""), ("package", "package ")):
        if repositories.get(where):
            code[f"{prefix}commit"] = repositories[where]["commit"]
            code[f"{prefix}uncommitted changes"] = repositories[where]["changes"]
    module, data = record["module"] or {}, record["data"] or {}
    settings = {"model": module.get("class"), "data": data.get("class")}
    settings |= _flat("model", module.get("hparams") or {}) | _flat("data", data.get("hparams") or {})
    settings |= {f"{name} seed": value for name, value in (record["seeds"] or {}).items()}
    settings |= {f"trainer.{name}": value for name, value in (record["trainer"] or {}).items() if name in _COMPARED}
    images = {"fingerprint": record["data_fingerprint"], "palette": record["palette_sha256"]}
    known = {name: value for name, value in images.items() if value is not None}
    return {"bits": bits, "data": known, "code": code, "settings": settings}


def differences(earlier: Mapping[str, Any], now: Mapping[str, Values]) -> dict[str, dict[str, list[Any]]]:
    """[was, is] of all that both tell and that differs, by group and name."""
    found: dict[str, dict[str, list[Any]]] = {}
    for group in GROUPS:
        was, mine = earlier.get(group), now.get(group, {})
        if isinstance(was, Mapping):
            differ = {name: [was[name], value] for name, value in mine.items() if name in was and was[name] != value}
            found |= {group: differ} if differ else {}
    code = found.get("code", {})
    for name in ("commit", "uncommitted changes"):  # one repository is told of once
        if code.get(name) == code.get(f"package {name}"):
            code.pop(f"package {name}", None)
    return found


def told(found: Mapping[str, Mapping[str, list[Any]]]) -> str:
    """A line for each group of differences: ``name: was -> is``, ..."""
    lines = []
    for group, values in found.items():
        pairs = ", ".join(f"{name}: {_short(was)} -> {_short(now)}" for name, (was, now) in values.items())
        lines.append(f"{GROUPS[group]}: {pairs}")
    return "\n".join(lines)


def write_record(path: Path, record: Values) -> None:
    """Put an entry into run.json, in place of the one that started at the same time, or after all others.

    The file is replaced by a whole one, or stays as it is.

    Raises:
        OSError: The folder cannot be written.
        ValueError: A file of that name is there that this package did not write.
    """
    runs: Any = []
    if path.exists():
        with suppress(ValueError):
            runs = json.loads(path.read_text(encoding="utf-8"))
        runs = runs.get("runs") if isinstance(runs, dict) else None
        if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
            raise ValueError(f"{path} is there already, and is no record of runs; move it away")
    runs = [run for run in runs if run.get("started") != record["started"]]
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump({"runs": [*runs, record]}, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())


_COMPARED = (
    "max_steps",
    "max_epochs",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
)
_TRAINER = (*_COMPARED, "val_check_interval", "check_val_every_n_epoch", "limit_val_batches", "log_every_n_steps")


def _hardware(trainer: Trainer) -> Values:
    return {
        "devices": provenance.device_names(trainer.strategy.root_device, trainer.device_ids),
        "world_size": trainer.world_size,
        "nodes": trainer.num_nodes,
        "strategy": type(trainer.strategy).__name__,
        "precision": str(trainer.precision),
    }


def _class_and_hparams(owner: Any) -> Values:
    """A palette's colours are left to its hash, and what Lightning's command line adds is left out."""
    hparams = {name: value for name, value in dict(owner.hparams).items() if not str(name).startswith("_")}
    if not isinstance(hparams.get("palette", ""), str):
        hparams["palette"] = "colours, see palette_sha256"
    return {"class": name_of(type(owner)), "hparams": hparams}


def _origin(module: Any) -> Values | None:
    words, path = getattr(module, "origin", None), getattr(module, "origin_path", None)
    if words is None:
        return None
    return {"origin": words, **({} if path is None else provenance.file_identity(path))}


def _seeds(module: Any, data: Any) -> Values:
    seed = os.environ.get("PL_GLOBAL_SEED")
    seeds = {"global": int(seed) if seed else None}
    for name, owner in (("model", module), ("data", data)):
        seeds[name] = getattr(owner, "seed", getattr(owner, "hparams", {}).get("seed"))
    return seeds


def _flat(prefix: str, values: Mapping[str, Any]) -> Values:
    """Nested settings by names with dots, without paths."""
    found: Values = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(f"{prefix}.{name}", value)
        elif name not in UNTOLD and not (isinstance(value, str) and Path(value).is_absolute()):
            found[f"{prefix}.{name}"] = value
    return found


def _folder(trainer: Trainer) -> Path | None:
    """Where the run keeps its files; None where it keeps none, or keeps them elsewhere than on a disk."""
    root = str(trainer.log_dir or trainer.default_root_dir)
    if getattr(trainer, "fast_dev_run", False) or not (trainer.loggers or trainer.checkpoint_callbacks):
        return None
    places = [str(place) for one in trainer.checkpoint_callbacks if (place := getattr(one, "dirpath", None))]
    elsewhere = [place for place in places if not Path(place).resolve().is_relative_to(Path(root).resolve())]
    # Without logs, the root may be but the folder that the process was started in.
    if not trainer.loggers and places and elsewhere == places:
        root = places[0]
    return None if "://" in root else Path(root)


def _or(find: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return find()
    except Exception as error:  # of any kind: a run does not stop because something about it cannot be told
        log.debug("not recorded: %r", error)
        return otherwise


def _short(value: Any) -> str:
    text = str(value)
    if len(text) in (40, 64) and not set(text) - set("0123456789abcdef"):
        return text[:12]  # a hash
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
