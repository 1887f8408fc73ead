"""DataLoaders for batches made by an order, and what the trainer says about the run they are for."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_igpt.data.bad_images import BadImages
from lightning_igpt.data.dataset import BAD
from lightning_igpt.data.stream_progress import StreamProgress
from lightning_igpt.data.streams import PLACE
from lightning_igpt.images import BadImageError
from lightning_igpt.palette import Palette

DEFAULT_IMAGE_SIZE = 32


class Loader(DataLoader[dict[str, Tensor]]):
    """A DataLoader that Lightning takes for resumable: for any other it warns, falsely here, of unreliable results.

    Its place comes from the loop's own count (``batches_done``), so there is nothing to save. What workers tell beside
    the batches, of bad images and of their place in a stream, is taken off here.
    """

    bad_images: BadImages | None = None
    progress: StreamProgress | None = None
    _watched: Any = None  # the iterator whose workers will be stopped
    _stopper: weakref.finalize[[Any, int], Loader] | None = None

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        # Asked for its first batch only, the order is asked where the run stands: Lightning may make an iterator before
        # it has restored that (for trainer.estimated_stepping_batches, which schedules ask for).
        iterator: Any = super().__iter__()
        if self.num_workers > 0 and iterator is not self._watched:
            # Told to stop before anything else of the loader goes, and before Python ends: workers that ignore SIGTERM
            # are waited for otherwise. When a cycle is collected, their queues are closed first, and they never hear.
            self._stopper = weakref.finalize(self, _stop, iterator, os.getpid())
            self._watched = iterator
        while True:
            try:
                batch = next(iterator, None)
                stripped = None if batch is None else self._strip(batch)
            except Exception as error:
                if self.num_workers > 0:
                    _stop(iterator, os.getpid())  # and not when the traceback goes, which holds them
                    self._iterator = None
                if not isinstance(error, BadImageError):
                    raise
                # From a worker it comes with the worker's whole traceback in its text.
                raise BadImageError(str(error).rpartition(f"{BadImageError.__name__}: ")[2].strip()) from error
            if stripped is None:
                return
            yield stripped

    def _strip(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        bad, place = batch.pop(BAD, []), batch.pop(PLACE, None)
        if self.bad_images is not None:
            self.bad_images.note(bad, len(batch["sample"]) + len(bad))
        if self.progress is not None and place is not None:
            self.progress.note(*place)
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load."""


def make_loader(
    images: Dataset[dict[str, Any]],
    order: Sampler[Any] | None,
    *,
    num_workers: int,
    bad_images: BadImages,
    progress: StreamProgress | None = None,
) -> Loader:
    """Read the batches of ``order``, in ``num_workers`` processes or, with 0, in this one.

    Args:
        images: Gives whole batches.
        order: What to ask for; None for a data set that is iterated over.
        num_workers: Processes.
        bad_images: Takes note of images that were left out.
        progress: Takes note of the place in a stream.
    """
    loader = Loader(
        images,
        batch_size=None,  # the order yields whole batches
        sampler=order,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_signals_to_the_main_process,
        generator=torch.Generator(),  # else each new iterator would take a number of those that dropout draws
    )
    loader.bad_images, loader.progress = bad_images, progress
    return loader


def rank_and_world(trainer: Trainer | None) -> tuple[int, int]:
    """Number of this process and of all; (0, 1) without a trainer."""
    return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)


def batches_done(trainer: Trainer | None) -> int:
    """Batches per device whose gradients are in the weights since the run began, resumed parts included."""
    if trainer is None:
        return 0
    # The loop counts after the optimiser's work, so batches that workers have prefetched do not move it; and it counts
    # over all epochs and resumptions, however the epochs were cut.
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    epoch_ended = progress.is_last_batch and progress.current.processed == progress.current.ready
    # No checkpoint holds the gradients of a window of accumulation that is not complete.
    waiting = 0 if epoch_ended else progress.current.processed % trainer.accumulate_grad_batches
    return int(progress.total.processed) - waiting


def epoch_length(trainer: Trainer | None, batches_per_epoch: int) -> int:
    """Batches per device in one Lightning epoch.

    With ``max_steps`` and no ``max_epochs`` it is the whole run: Lightning resumes in the middle of an epoch exactly,
    but not at the end of one when ``max_steps`` is set. Otherwise it is one pass over the data.
    """
    if trainer is None or trainer.max_steps < 1:
        return batches_per_epoch
    if trainer.max_epochs in (None, -1):
        return trainer.max_steps * trainer.accumulate_grad_batches
    if not getattr(trainer, "fast_dev_run", False):
        rank_zero_warn(
            "max_steps and max_epochs are both set: a run that resumes from a checkpoint made at the end of an epoch "
            "will stop too early (Lightning then miscounts epochs). Set only one of them"
        )
    return batches_per_epoch


def network_image_size(trainer: Trainer | None, default: int = DEFAULT_IMAGE_SIZE) -> int:
    """The ``image_size`` of the network in training, or ``default`` where none says."""
    module = trainer.lightning_module if trainer is not None else None
    size = getattr(getattr(module, "config", None), "image_size", None)
    if size is None:
        rank_zero_info(f"no network says its image_size; images are {default} x {default}")
    return size or default


def network_palette(trainer: Trainer | None) -> Palette | None:
    """The palette of the module in training; None where it has none."""
    module = trainer.lightning_module if trainer is not None else None
    palette = getattr(module, "palette", None)
    return palette if isinstance(palette, Palette) else None


def _stop(iterator: Any, owner: int) -> None:
    if os.getpid() != owner:  # a worker of another loader, which has a copy of this one
        return
    workers = list(iterator._workers)
    iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()  # they ignore SIGTERM, and Python would wait for them for ever


def _leave_signals_to_the_main_process(worker: int) -> None:
    # A scheduler signals every process of a job. A worker that dies of it would end the run before it can save.
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
