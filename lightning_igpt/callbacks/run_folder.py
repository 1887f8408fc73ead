"""The folder of a run, and its pictures there and in its loggers."""

import contextlib
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_igpt.files import os_error
from lightning_igpt.pictures import save_png, to_pil

_PICTURES: WeakKeyDictionary[Trainer, Path] = WeakKeyDictionary()  # their folders, where no logger has one of its own
WARNED = set[str]()  # files, loggers and pictures of this run that the log has named


def run_folder(trainer: Trainer) -> Path | None:
    """The folder of a run, for its first process: ``<save_dir>/<name>/<version>`` of its first logger.

    Without a logger it is ``default_root_dir``; None for an address such as ``s3://``, and in a fast_dev_run.
    """
    folder = str(trainer.default_root_dir)
    for logger in trainer.loggers[:1]:
        version = logger.version if isinstance(logger.version, str | None) else f"version_{logger.version}"
        named = "/".join(filter(None, (str(logger.save_dir or folder), str(logger.name or ""), version)))
        folder = str(getattr(logger, "log_dir", None) or named)
    return None if trainer.fast_dev_run or "://" in folder else Path(folder)  # type: ignore[attr-defined]


def write_result(trainer: Trainer, name: str, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a path in the run's folder or, where runs may share that, in a new folder ``pictures``."""
    folder = run_folder(trainer)
    if folder is None:
        return
    with sparing(folder / name):
        if not any(getattr(logger, "log_dir", None) for logger in trainer.loggers[:1]):
            folder = _PICTURES[trainer] = _PICTURES.get(trainer) or _new_folder(folder)
        write(folder / name)


def show(trainer: Trainer, name: str, tag: str, picture: Tensor) -> None:
    """Save a picture, uint8 (3, H, W), in the run's folder, and pass it to the loggers that take images.

    The log says where the first picture of each tag is.
    """

    def write(path: Path) -> None:
        save_png(picture, path)
        if tag not in WARNED:
            WARNED.add(tag)
            rank_zero_info(f"{tag}: {path}")

    write_result(trainer, name, write)
    for logger in [] if trainer.fast_dev_run else trainer.loggers:  # type: ignore[attr-defined]
        try:
            _log_image(logger, tag, picture, trainer.global_step)
        except Exception as error:  # a server may fail in any way
            _warn_once(str(logger), f"{type(logger).__name__} could not log the picture {tag}: {error}")


def _log_image(logger: Any, tag: str, picture: Tensor, step: int) -> None:
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(tag, [to_pil(picture)], step=step)
    elif hasattr(experiment, "add_image"):  # TensorBoard
        experiment.add_image(tag, picture, step)
    elif hasattr(experiment, "log_image") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_image(logger.run_id, to_pil(picture), key=tag, step=step)
    elif hasattr(experiment, "log_image"):  # Comet
        experiment.log_image(to_pil(picture), name=tag, step=step)


@contextlib.contextmanager
def sparing(path: Path, then: Callable[[], None] | None = None) -> Iterator[None]:
    """A failure of the disk within costs the file, or a folder's pictures, and one warning; then ``then`` is called."""
    try:
        yield
    except Exception as error:
        cause = os_error(error)
        if cause is None:
            raise
        reason = cause.strerror if str(path) in str(cause.strerror) else f"{path} cannot be written: {cause.strerror}"
        _warn_once(str(path.parent if path.suffix == ".png" else path), f"{reason}. The run continues without it")
        if then is not None:
            with contextlib.suppress(OSError):
                then()


def _warn_once(key: str, message: str) -> None:
    if key not in WARNED:
        WARNED.add(key)
        rank_zero_warn(message)


def _new_folder(parent: Path) -> Path:
    """Make the first folder of ``pictures``, ``pictures_1``, ... that does not exist."""
    for number in count():
        folder = parent / (f"pictures_{number}" if number else "pictures")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            break
    return folder
