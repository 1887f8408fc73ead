"""Loggers that write files: each run has its own folder, and a failure of the disk does not end the run."""

import copy
import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lightning_igpt.callbacks.finite_guard import check_folder
from lightning_igpt.callbacks.run_folder import sparing
from lightning_igpt.files import write_csv


def _spared(name: str) -> Any:
    """A method of the logger for which a failure of the disk costs what was logged, and one warning."""

    @rank_zero_only
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        with sparing(Path(self.log_dir), self.reopen):
            getattr(super(_Steady, self), name)(*args, **kwargs)

    return method


class _Steady(Logger):
    """Where no version was given, the folder is that of the first version which no other run has made."""

    _own: int | str | None = None  # the version, once its folder is made

    @property
    def version(self) -> Any:
        """The version given or made; until the run starts, the next one."""
        # A logger keeps the version that it is first asked for, so a copy is asked.
        return super(_Steady, copy.copy(self)).version if self._own is None else self._own  # type: ignore[safe-super]

    @property
    def experiment(self: Any) -> Any:
        """Lightning's; the first call makes the folder."""
        taken = None
        while self._own is None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self._own = self.version
            try:
                if "://" not in self.log_dir:
                    Path(self.log_dir).mkdir(parents=True, exist_ok=self._own == taken)  # a version that was given
            except FileExistsError:
                taken, self._own = self._own, None
        return super().experiment  # type: ignore[misc]

    def reopen(self) -> None:
        """Make the folder again, if it was deleted, and let TensorBoard start another file; OSError without room."""
        check_folder(Path(str(self.log_dir)), 2**16)
        self.experiment.file_writer = self.experiment.all_writers = None

    methods = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize")
    log_metrics, log_hyperparams, log_graph, save, finalize = map(_spared, methods)


class SteadyTensorBoard(_Steady, TensorBoardLogger):
    """TensorBoardLogger that loses the values of a failure."""


class SteadyCSV(_Steady, CSVLogger):
    """CSVLogger that keeps values until they can be written."""


STEADY: dict[Any, Any] = {TensorBoardLogger: SteadyTensorBoard, CSVLogger: SteadyCSV}  # subclasses stay as they are


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

    def write(self) -> None:
        """Append the rows, all or none; where they have new columns, replace the file."""
        self._rows, self._row = [*self._rows, *filter(None, [self._row])], {}
        columns, names, rows = set[str]().union(*self._rows), list[str](), self._rows
        with sparing(self.path):
            size = self.path.stat().st_size if self.path.exists() else 0
            if size:
                with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
                    reader = csv.DictReader(file)
                    names = list(reader.fieldnames or ())
                    rows = rows if columns <= set(names) else [*reader, *rows]
            new = sorted(columns - set(names))
            cells = [[row.get(name, "") for name in names + new] for row in rows]
            if new:
                write_csv(self.path, [names + new, *cells])
            elif cells:
                try:
                    with self.path.open("a", newline="", encoding="utf-8") as file:
                        csv.writer(file).writerows(cells)
                except OSError:
                    os.truncate(self.path, size)
                    raise
            self._rows = []
