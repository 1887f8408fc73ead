"""Loaders over streams, whose rows come in their own order and can be read once a pass."""

from __future__ import annotations

import itertools
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_igpt.data.bad_images import BadImages
from lightning_igpt.data.dataset import ImageBatches
from lightning_igpt.data.loaders import Loader, batches_done, epoch_length, make_loader, rank_and_world
from lightning_igpt.data.order import EvalOrder
from lightning_igpt.data.readers import BadImagePolicy, ImageReader, TokenColumn
from lightning_igpt.data.settings import Settings
from lightning_igpt.data.splits import Division, Part
from lightning_igpt.data.stream_parts import HoldOut, StreamPart, fetch, has_own_buffer
from lightning_igpt.data.stream_progress import PlacedOrder, StreamProgress, resume
from lightning_igpt.data.streams import StreamBatches, StreamOnce
from lightning_igpt.data.transforms import Augment, CenterCrop, Resize
from lightning_igpt.images import BadImageError
from lightning_igpt.palette import PALETTE_COLUMN, Palette


@dataclass
class StreamedImages:
    """The parts of a stream, and the loaders over them.

    Args:
        settings: How images are read.
        division: The splits of the stream.
    """

    settings: Settings
    division: Division
    bad_images: dict[str, BadImages] = field(default_factory=dict)
    _progress: StreamProgress | None = None
    _kept: Part | None = None

    @property
    def n_train(self) -> int | None:
        """Training images, where the stream tells; a hold-out takes its share of them, give or take a few."""
        info = self.division.source.splits[self.division.train].info
        split = (info.splits or {}).get(self.division.train)
        if split is None or not split.num_examples:
            return None
        held_out = self.settings.val_fraction if self.division.val is None else 0
        return int(split.num_examples * (1 - held_out))

    def roles(self) -> list[str]:
        """The parts there are."""
        val = self.division.val is not None or self.settings.val_fraction > 0
        return ["train", *(["val"] if val else []), *(["test"] if self.division.test is not None else [])]

    def check_labels(self) -> None:
        """Nothing: labels of a stream are checked as they come."""

    def train(
        self,
        trainer: Trainer | None,
        resize: Resize,
        *,
        augment: Augment | None,
        need_labels: bool,
        palette: Palette | None,
        state: dict[str, Any],
    ) -> Loader:
        """Batches without end, from every reader's own shards.

        Raises:
            ValueError: Nothing says where an epoch ends, or ``state`` was made with another order.
        """
        rank, world_size = rank_and_world(trainer)
        part, settings = self._part("train", need_labels), self.settings
        n_workers = n_readers(part, settings.num_workers, world_size)
        self._check_state(state)
        self._progress = self._begin(state, trainer, max(1, n_workers))
        images = StreamBatches(
            part,
            resize,
            batch_size=settings.batch_size,
            rank=rank,
            world_size=world_size,
            num_workers=n_workers,
            seed=settings.seed,
            block=settings.shuffle_buffer,
            augment=augment,
            policy=BadImagePolicy(settings.on_bad_image),
        )
        length = self._epoch_length(trainer, world_size)
        order = PlacedOrder(self._progress, length=length, batches_done=lambda: batches_done(trainer))
        self.bad_images["train"] = BadImages(settings.max_bad_share, self.n_train)
        return make_loader(
            images, order, num_workers=n_workers, bad_images=self.bad_images["train"], progress=self._progress
        )

    def evaluate(
        self, role: str, trainer: Trainer | None, size: int, *, need_labels: bool, palette: Palette | None
    ) -> Loader:
        """Validation: its first ``val_images`` rows, kept in memory. Any other part: every row once, in one process.

        Raises:
            ValueError: There are several processes.
        """
        rank, world_size = rank_and_world(trainer)
        part, resize, settings = self._part(role, need_labels), CenterCrop(size), self.settings
        policy = BadImagePolicy(settings.on_bad_image, replace=False)
        self.bad_images[role] = BadImages(settings.max_bad_share)
        if role == "val":
            return self._validate(part, resize, policy, rank, world_size)
        if world_size > 1:
            raise ValueError(
                f"{part.source}, split {part.split!r}, is a stream; {world_size} devices cannot share it so that each "
                "image comes once. Use one device (--trainer.devices 1), or streaming=False"
            )
        once = StreamOnce(part, resize, batch_size=settings.batch_size, policy=policy)
        return make_loader(once, None, num_workers=min(settings.num_workers, 1), bad_images=self.bad_images[role])

    def state(self, trainer: Trainer | None) -> dict[str, Any]:
        """What a checkpoint needs to resume every reader."""
        if self._progress is None:
            return {}
        done = batches_done(trainer)
        return {"batches_done": done, **self._fingerprint, "stream": self._progress.state(done)}

    @property
    def _fingerprint(self) -> dict[str, Any]:
        """What must not change when a run resumes; plain values."""
        return {
            "seed": self.settings.seed,
            "shuffle_buffer": self.settings.shuffle_buffer,
            "val_fraction": self.settings.val_fraction if self.division.val is None else 0,
            "shards": self.division.source.splits[self.division.train].num_shards or 1,
        }

    def _check_state(self, state: dict[str, Any]) -> None:
        if state and "stream" not in state:
            raise ValueError(
                "the checkpoint was made without streaming, this run streams: the images would not continue in the "
                "same order. Set streaming as it was, or start a new run from the weights with pretrained="
            )
        for key, mine in self._fingerprint.items():
            if state.get(key, mine) != mine:
                raise ValueError(
                    f"the checkpoint was made with {key}={state[key]}, this run has {key}={mine}: after "
                    f"{state['batches_done']} batches the images would not continue in the same order. Set it as it "
                    "was, or start a new run from the weights with pretrained="
                )

    def _begin(self, state: dict[str, Any], trainer: Trainer | None, n_readers: int) -> StreamProgress:
        before = self._progress
        if not state and before is not None and len(before.start) == n_readers and batches_done(trainer):
            return before  # the same run asks for another loader
        rank, world_size = rank_and_world(trainer)
        if has_own_buffer(self.division.source.splits[self.division.train]):
            rank_zero_warn(
                f"{self.division.source.name} was shuffled with stream.shuffle, and no checkpoint holds its buffer: a "
                "resumed run will miss images of the pass. Leave it out; shuffle_buffer shuffles, and resumes exactly"
            )
        return StreamProgress(resume(state.get("stream"), rank=rank, world_size=world_size, n_readers=n_readers))

    def _validate(self, part: StreamPart, resize: Resize, policy: BadImagePolicy, rank: int, world_size: int) -> Loader:
        """The same rows whenever and by however many devices it is asked for."""
        if self._kept is None:
            self._kept = _keep(part, self.settings.val_images)
        n_images = len(self._kept)
        reader: ImageReader | TokenColumn = (
            TokenColumn(self._kept, part.image_column, resize.size)
            if part.tokens
            else ImageReader(self._kept, part.image_column, resize, policy=policy)
        )
        labels = None
        if part.label_column is not None:
            labels = torch.tensor([part.label(row) for row in self._kept.dataset.select_columns([part.label_column])])
        order = EvalOrder(n_images, batch_size=self.settings.batch_size, rank=rank, world_size=world_size)
        images = ImageBatches(reader, n_images, labels=labels)
        return make_loader(images, order, num_workers=self.settings.num_workers, bad_images=self.bad_images["val"])

    def _part(self, role: str, need_labels: bool) -> StreamPart:
        source, division = self.division.source, self.division
        split = {"train": division.train, "val": division.val, "test": division.test}[role] or division.held_out_of
        hold_out = None
        # Of a mix, the first source has lost what is held out before it was mixed with the others.
        divided = role == "val" or (role == "train" and division.train == division.held_out_of)
        if divided and division.val is None and self.settings.val_fraction > 0:
            hold_out = HoldOut(self.settings.val_fraction, held_out=role == "val")
        # Hidden labels of a test split are no concern of a prediction.
        with_labels = source.class_names is not None and (need_labels or role != "test")
        label_column = source.label_column if with_labels else None
        columns = [source.image_column, *([label_column] if label_column else [])]
        stream, own_names = source.splits[split], None
        if stream.features is not None:
            if label_column is not None and label_column not in stream.features:
                if need_labels:
                    raise ValueError(f"{source.name}, split {split!r}, has no labels: no column {label_column!r}")
                label_column, columns = None, columns[:1]
            own_names = getattr(stream.features.get(label_column), "names", None)
            columns += [PALETTE_COLUMN] if source.tokens is not None and PALETTE_COLUMN in stream.features else []
            stream = stream.select_columns(columns)
        return StreamPart(
            source.name,
            split,
            stream,
            source.image_column,
            label_column,
            class_names=source.class_names or (),
            own_names=own_names,
            need_labels=need_labels,
            hold_out=hold_out,
            tokens=source.tokens is not None,
            sha256=None if source.tokens is None else source.tokens.sha256,
        )

    def _epoch_length(self, trainer: Trainer | None, world_size: int) -> int:
        if self.n_train is not None:
            # At least one: a reader fills its batch from the next pass.
            return epoch_length(trainer, max(1, self.n_train // (self.settings.batch_size * world_size)))
        if trainer is None:
            return 2**31  # read by hand
        if trainer.max_steps > 0 and (trainer.max_epochs in (None, -1) or getattr(trainer, "fast_dev_run", False)):
            return trainer.max_steps * trainer.accumulate_grad_batches
        raise ValueError(
            f"{self.division.source.name} is a stream of unknown length, so nothing says where an epoch ends; give the "
            "trainer max_steps, and not max_epochs"
        )


def n_readers(part: StreamPart, num_workers: int, world_size: int) -> int:
    """Workers that have shards of their own on every device; 0 reads in the main process."""
    shards = part.stream.num_shards or 1
    used = min(num_workers, max(1, shards // world_size))
    if used < num_workers:
        rank_zero_info(
            f"{part.source}, split {part.split!r}, has {shards} shards for {world_size} devices, so {used} of "
            f"{num_workers} workers read it. More shards: several files, stream.reshard(), or "
            "to_iterable_dataset(num_shards=...)"
        )
    return used


def _keep(part: StreamPart, n_images: int) -> Part:
    """The first rows of a part, undecoded, as a data set in memory."""
    kept = list(itertools.islice(part.rows(), n_images))
    for row in kept:
        with suppress(BadImageError):  # it will be told of when it is read
            row[part.image_column] = fetch(row[part.image_column])
    if not kept:
        raise ValueError(
            f"{part.source}, split {part.split!r}, has no rows to validate on; set val_split or another val_fraction, "
            "or val_fraction=0 for no validation"
        )
    rank_zero_info(
        f"validating on {len(kept)} images of {part.source}, split {part.split!r}"
        + (", the first there are (val_images)" if len(kept) == n_images else "")
    )
    dataset = datasets.Dataset.from_list(kept, features=part.stream.features)
    if isinstance(dataset.features[part.image_column], datasets.Image):
        dataset = dataset.cast_column(part.image_column, datasets.Image(decode=False))
    return Part(part.source, f"{part.split} (kept in memory)", dataset)
