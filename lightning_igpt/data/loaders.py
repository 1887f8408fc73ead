"""DataLoaders over finished batches, and what a data module reads from its trainer."""

import os
import signal
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.data.readers import BAD, BadImages
from lightning_igpt.data.sources import Source
from lightning_igpt.data.streams import STATE
from lightning_igpt.images import BILINEAR, BadImageError, Filter
from lightning_igpt.palette import Palette
from lightning_igpt.private import forget_iterator, stop_workers

DEFAULT_IMAGE_SIZE = 32


class Loader(DataLoader[dict[str, Tensor]]):
    """A DataLoader that removes and records what workers report in a batch: bad images, their place in a stream.

    Lightning makes another of some loaders, by the arguments of ``__init__`` and the attributes of the same names.
    """

    _watched: Any = None  # the iterator whose workers are stopped
    _stopper: Callable[[], Any] = list

    def __init__(self, dataset: Any, bad_images: BadImages, **options: Any) -> None:
        super().__init__(dataset, **options)
        self.bad_images = bad_images
        self.states = list(getattr(dataset, "states", ()))  # of a stream: where each worker is after the last batch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:  # type: ignore[override]
        # A generator, so that the order reads the step with the first batch: Lightning makes the iterator before it
        # has restored that where trainer.estimated_stepping_batches is asked for.
        iterator = super().__iter__()
        if self.num_workers > 0 and iterator is not self._watched:  # persistent workers have one for all epochs
            # Before anything else of the loader is collected, and before Python ends: workers ignore SIGTERM.
            self._watched, self._stopper = iterator, weakref.finalize(self, _stop, iterator, os.getpid())
        try:
            for batch in iterator:
                bad = batch.pop(BAD, [])
                self.bad_images.note(bad, len(batch["sample"]) + len(bad))
                if STATE in batch:
                    worker, self.states[worker] = batch.pop(STATE)
                yield batch
        except Exception as error:
            self._stopper()  # not when the traceback, which holds the workers, is collected
            forget_iterator(self)
            if not isinstance(error, BadImageError):
                raise
            # From a worker it has the worker's whole traceback in its text.
            raise BadImageError(str(error).rpartition(f"{BadImageError.__name__}: ")[2].strip()) from error

    def state_dict(self) -> dict[str, Any]:
        """Nothing; it is here because Lightning warns of other loaders that results of a resumed run are unreliable."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def all_states(self) -> list[list[str]]:
        """Where the workers of every process are in a stream; all processes must call it together."""
        if (world_size := place_of(None).world_size) == 1:
            return [self.states]
        states: list[Any] = [None] * world_size
        torch.distributed.all_gather_object(states, self.states)
        return states


def make_loader(
    images: Any, order: Sampler[Any] | None, bad_images: BadImages, batch_size: int | None, num_workers: int
) -> Loader:
    """Read batches in ``num_workers`` processes or, with 0, in this one."""
    return Loader(
        images,
        bad_images,
        batch_size=batch_size,
        sampler=order,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # else each new iterator would use up one of the numbers that dropout draws
    )


class Place(NamedTuple):
    """Which part of every optimizer step this process computes; all of it without a trainer."""

    rank: int = 0
    world_size: int = 1
    accumulate: int = 1


def place_of(trainer: Trainer | None) -> Place:
    """The place of this process; without a trainer, among those of ``torch.distributed``."""
    if trainer is not None:
        return Place(trainer.global_rank, trainer.world_size, trainer.accumulate_grad_batches)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Place()
    return Place(torch.distributed.get_rank(), torch.distributed.get_world_size())


def unfinished(trainer: Trainer | None) -> Trainer | None:
    """The trainer, unless its run is over: it stays with the data module, whose loaders may be used without it."""
    return None if getattr(getattr(trainer, "state", None), "stopped", False) else trainer


def step_of(trainer: Trainer | None, place: Place) -> int | None:
    """The optimizer step that a loader made for ``place`` has reached; None where no trainer counts them."""
    trainer, now = unfinished(trainer), place_of(None).world_size
    if trainer is None and now != place.world_size:
        text = f"this loader was made for {place.world_size} processes but runs in {now}"
        raise RuntimeError(f"{text}, which would read the same images; give fit the data module instead")
    return None if trainer is None else trainer.global_step


def possible_batch_size(wanted: int, n_images: int, place: Place) -> int:
    """The multiple of devices x accumulated micro-batches next to a batch size, at most all images."""
    parts = place.world_size * place.accumulate
    size = max(parts, min(wanted, n_images) // parts * parts)
    if size != wanted:
        rank_zero_info(f"batch_size {wanted} becomes {size}: a multiple of {parts}, at most all images ({n_images})")
    return size


def n_steps(trainer: Trainer | None, per_pass: int | None, source: str) -> int:
    """Optimizer steps in one Lightning epoch: the whole run with ``max_steps`` and no ``max_epochs``, else one pass.

    Lightning resumes in the middle of an epoch exactly, but not at the end of one when ``max_steps`` is set.
    """
    if trainer is None:
        return per_pass or 2**31
    fast = getattr(trainer, "fast_dev_run", False)
    if trainer.max_steps > 0 and (trainer.max_epochs in (None, -1) or (fast and per_pass is None)):
        return trainer.max_steps
    limit = trainer.limit_train_batches
    if per_pass is None and isinstance(limit, float):
        text = f"{source} is a stream, so this loader has no length: set max_steps or limit_train_batches"
        raise ValueError(f"{text}; without the latter give the trainer max_steps, and not max_epochs")
    per_pass = per_pass or max(1, -(-int(limit or 1) // trainer.accumulate_grad_batches))
    if trainer.max_steps > 0 and not fast:
        text = "max_steps and max_epochs are both set: a run that resumes at the end of an epoch stops too early"
        rank_zero_warn(f"{text} (Lightning then miscounts epochs); set only one of them")
    return per_pass


def network_of(trainer: Trainer | None) -> tuple[int | None, Palette | None]:
    """Image size and palette of the network that is trained or evaluated; None where there is none."""
    module = trainer.lightning_module if trainer is not None else None
    palette, config = getattr(module, "palette", None), getattr(module, "config", None)
    size = config.image_size if isinstance(config, ImageGPTConfig) else None  # another's may mean anything
    return size, palette if isinstance(palette, Palette) else None


def matching_size(trainer: Trainer | None, source: Source, wanted: int | None) -> int:
    """The side of the images: as ``wanted``, as the network's, as that of the tokens, or 32."""
    own = None if source.tokens is None else source.tokens.image_size
    size = wanted or network_of(trainer)[0] or own
    if size is None:
        rank_zero_info(f"image_size is not set; images become {DEFAULT_IMAGE_SIZE} x {DEFAULT_IMAGE_SIZE}")
        return DEFAULT_IMAGE_SIZE
    if own not in (None, size):
        raise ValueError(f"image_size is {size}, but {source.name} holds tokens of {own} x {own} images; set {own}")
    return size


def matching_filter(trainer: Trainer | None, wanted: Filter | None) -> Filter:
    """The resize filter: as ``wanted``, as recorded with the network, or bilinear."""
    recorded: Any = None if trainer is None else getattr(trainer.lightning_module, "resize_filter", None)
    return wanted or (recorded if recorded in get_args(Filter) else None) or BILINEAR


def matching_palette(trainer: Trainer | None, source: Source, wanted: str | None, *, cache: bool) -> Palette | None:
    """The palette of tokens: as ``wanted``, or the network's; None where neither is given."""
    mine, network = None if wanted is None else Palette.load(wanted), network_of(trainer)[1]
    if cache or source.tokens is not None:
        palettes = {"its tokens": source.tokens, "palette": mine, "the network": network}
        known = {name: palette.sha256[:12] for name, palette in palettes.items() if palette is not None}
        if len(set(known.values())) > 1:
            listed = ", ".join(f"{sha256} of {name}" for name, sha256 in known.items())
            text = f"{source.name} is read with several palettes ({listed})"
            raise ValueError(f"{text}: every token would mean another color; use one for all")
        if not known:
            raise ValueError("cache=disk keeps tokens: give palette, or use it with a trainer whose module has one")
    return mine or network


def _as_it_is(batch: Any) -> Any:
    return batch


def _stop(iterator: Any, owner: int) -> None:
    if os.getpid() == owner:  # not in a worker of another loader, which has a copy of this one
        stop_workers(iterator)


def _ignore_signals(worker: int) -> None:
    # Schedulers and Ctrl-C signal every process of a job. A worker that dies of it would end the run before it saves.
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
