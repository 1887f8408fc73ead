"""Loggers that write files: a run has a folder to itself and continues there; a failure of the disk does not end it."""

import copy
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from filelock import FileLock
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_igpt.callbacks.finite_guard import check_folder
from lightning_igpt.callbacks.metrics_file import cut_rows, read_rows
from lightning_igpt.callbacks.run_folder import sparing

_LOCKS: WeakKeyDictionary[Logger, FileLock] = WeakKeyDictionary()  # of the folders that the loggers of this process use


def _spared(name: str) -> Any:
    """A method of the logger for which a failure of the disk costs what was logged, and one warning."""

    @rank_zero_only
    def method(self: Any, *args: Any, **kwargs: Any) -> None:
        with sparing(Path(self.log_dir), self.reopen):
            getattr(super(_Steady, self), name)(*args, **kwargs)

    return method


class _Steady(Logger):
    """Where no version is given, the folder is the first that no other run has made; locked until ``finalize``."""

    _own: int | str | None = None  # the version, once its folder is made or locked
    _is_new = False  # whether this logger made the folder

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
                    self._is_new = self._own != taken
            except FileExistsError:
                taken, self._own = self._own, None
        if self not in _LOCKS and rank_zero_only.rank == 0 and "://" not in self.log_dir:  # type: ignore[attr-defined]
            self._lock(Path(self.log_dir))
        return super().experiment  # type: ignore[misc]

    def _lock(self, folder: Path) -> bool:
        """Lock a folder, if no other run uses it and the file system has locks."""
        lock = FileLock(folder / ".lock", timeout=0)
        with suppress(OSError, NotImplementedError):
            lock.acquire()
            _LOCKS[self] = lock
        return lock.is_locked

    def continue_in(self: Any, folder: Path) -> bool:
        """Use the folder of an earlier run of this logger, unless a version was given or the folder is in use."""
        root, version = Path(self.root_dir).absolute(), self.version
        if not isinstance(version, int) or not folder.is_relative_to(root) or Path(self.log_dir).exists():
            return True
        if rank_zero_only.rank == 0 and not self._lock(folder):  # type: ignore[attr-defined]
            return False
        self._own = str(folder.relative_to(root))
        return True

    def cut(self, step: int) -> None:
        """Let TensorBoard hide what was logged from ``step`` on, which a resumed run logs again."""
        self.experiment.close()
        self.experiment.purge_step = step

    def reopen(self) -> None:
        """Make the folder again, if it was deleted, and let TensorBoard start another file; OSError without room."""
        check_folder(Path(str(self.log_dir)), 2**16)
        self.experiment.file_writer = self.experiment.all_writers = None

    methods = ("log_metrics", "log_hyperparams", "log_graph", "save", "finalize")
    log_metrics, log_hyperparams, log_graph, save, _finalize = map(_spared, methods)

    def finalize(self, status: str) -> None:
        """Write what is left, and let other runs have the folder; of a run that failed before it began, remove it."""
        self._finalize(status)
        if lock := _LOCKS.pop(self, None):
            lock.release()
            folder = Path(str(self.log_dir))
            files = [*folder.glob("*")]
            empty = all(path.name.startswith((".lock", "events.", "hparams.", "config.")) for path in files)
            if status == "failed" and self._is_new and empty:
                with suppress(OSError):
                    for path in files:
                        path.unlink()
                    for place in (folder, *folder.parents[:2]):
                        place.rmdir()  # if it is empty


class SteadyTensorBoard(_Steady, TensorBoardLogger):
    """TensorBoardLogger that loses the values of a failure."""


class SteadyCSV(_Steady, CSVLogger):
    """CSVLogger that keeps values until they can be written, and those of the run that it continues."""

    def continue_in(self, folder: Path) -> bool:
        """As above; Lightning's logger deletes the values that it finds in a folder, so they are written again."""
        _, rows = read_rows(folder / "metrics.csv")
        free = super().continue_in(folder)
        if self._own is not None and rows and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.experiment.metrics = rows
            self.save()
        return free

    def cut(self, step: int) -> None:
        """Remove what was logged from ``step`` on."""
        cut_rows(Path(self.log_dir) / "metrics.csv", step)


STEADY: dict[Any, Any] = {TensorBoardLogger: SteadyTensorBoard, CSVLogger: SteadyCSV}  # subclasses stay as they are


def continue_run(trainer: Trainer, checkpoint: str | Path) -> None:
    """Let loggers write to the folder of the run that a checkpoint comes from, unless another process uses it.

    Call it before ``trainer.fit``. A logger that was given a version keeps it.
    """
    folder = next((place for place in Path(checkpoint).absolute().parents if (place / "run.json").exists()), None)
    for logger in trainer.loggers:
        if folder is not None and isinstance(logger, _Steady) and not logger.continue_in(folder):
            rank_zero_warn(f"{folder} is in use by another run or cannot be locked; this run gets a new folder")
            return
