"""``metrics.csv``, one row for each logged step, and the learning rates in it."""

import csv
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger

from lightning_igpt.callbacks.run_folder import sparing
from lightning_igpt.files import write_csv


class MetricsFile(Logger):
    """A logger that writes one CSV row for each step, when the next step is logged.

    Rows that the disk does not take are written with a later one.
    """

    name, version = "metrics", ""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self._row, self._rows = path, dict[str, Any](), list[dict[str, Any]]()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step != self._row.get("step"):
            self.write()
        self._row |= {**metrics, "step": step}

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...  # they are in run.json

    def cut(self, step: int) -> None:
        cut_rows(self.path, step)

    def write(self) -> None:
        """Append the rows, all or none; where they have new columns, replace the file."""
        self._rows, self._row = [*self._rows, *filter(None, [self._row])], {}
        with sparing(self.path):
            names, _ = read_rows(self.path, 0)
            new = sorted(set[str]().union(*self._rows).difference(names))
            rows = [*read_rows(self.path)[1], *self._rows] if new else self._rows
            cells = [[row.get(name, "") for name in names + new] for row in rows]
            if new:
                write_csv(self.path, [names + new, *cells])
            elif cells:
                size = self.path.stat().st_size
                try:
                    with self.path.open("a", newline="", encoding="utf-8") as file:
                        csv.writer(file).writerows(cells)
                except OSError:
                    os.truncate(self.path, size)
                    raise
            self._rows = []


def read_rows(path: Path, most: int | None = None) -> tuple[list[str], list[dict[str, Any]]]:
    """Columns and rows, at most so many, of a metrics.csv, which need not exist."""
    if not path.exists():
        return [], []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or ()), list(itertools.islice(reader, most))


def cut_rows(path: Path, step: int) -> None:
    """Remove what a metrics.csv has from ``step`` on, which a resumed run logs again."""
    names, rows = read_rows(path)
    kept = [row for row in rows if not (row.get("step") or "").isdecimal() or int(row["step"]) < step]
    if len(kept) < len(rows):
        with sparing(path):
            write_csv(path, [names, *([row.get(name, "") for name in names] for row in kept)])


class LearningRate(Callback):
    """Log ``lr``; where parameter groups have different peak rates, ``lr/1``, ``lr/2``, ... in the order of groups."""

    _step = -1

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or (step + 1) % every or step == self._step:
            return
        self._step = step
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates = {float(group.get("initial_lr", group["lr"])): float(group["lr"]) for group in groups}
        named = {f"lr/{number}" if len(rates) > 1 else "lr": rate for number, rate in enumerate(rates.values(), 1)}
        for logger in trainer.loggers:
            logger.log_metrics(named, step)
