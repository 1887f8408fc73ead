"""Loaders over streams, whose rows come in their own order and can be read once a pass."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import datasets
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_igpt.data.bad_images import BadImages
from lightning_igpt.data.dataset import ImageBatches
from lightning_igpt.data.loaders import Loader, batches_done, epoch_length, make_loader, rank_and_world
from lightning_igpt.data.order import EvalOrder, StreamOrder
from lightning_igpt.data.readers import BadImagePolicy, ImageReader, TokenColumn
from lightning_igpt.data.settings import Settings
from lightning_igpt.data.splits import Division, Part
from lightning_igpt.data.stream_parts import HoldOut, StreamPart
from lightning_igpt.data.stream_progress import StreamProgress, resume
from lightning_igpt.data.streams import StreamBatches, StreamOnce
from lightning_igpt.data.transforms import Augment, CenterCrop, Resize
from lightning_igpt.palette import Palette


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
            ValueError: Nothing says where an epoch ends.
        """
        rank, world_size = rank_and_world(trainer)
        part, settings = self._part("train", need_labels), self.settings
        n_workers = n_readers(part, settings.num_workers, world_size)
        cursors = resume(state.get("stream"), rank=rank, world_size=world_size, n_readers=max(1, n_workers))
        self._progress = StreamProgress(cursors)
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
            cursors=cursors,
        )
        order = StreamOrder(length=self._epoch_length(trainer, world_size), batches_done=lambda: batches_done(trainer))
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
        return {"batches_done": done, "seed": self.settings.seed, "stream": self._progress.state(done)}

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
        if division.val is None and self.settings.val_fraction > 0 and role != "test":
            hold_out = HoldOut(self.settings.val_fraction, held_out=role == "val")
        # Hidden labels of a test split are no concern of a prediction.
        with_labels = source.class_names is not None and (need_labels or role != "test")
        label_column = source.label_column if with_labels else None
        columns = [source.image_column, *([label_column] if label_column else [])]
        stream = source.splits[split]
        if stream.features is not None:
            if label_column not in stream.features:
                label_column, columns = None, columns[:1]
            stream = stream.select_columns(columns)
        return StreamPart(
            source.name,
            split,
            stream,
            source.image_column,
            label_column,
            class_names=tuple(source.class_names or ()),
            own_names=tuple(getattr((stream.features or {}).get(label_column), "names", ())),
            hold_out=hold_out,
            tokens=source.tokens is not None,
        )

    def _epoch_length(self, trainer: Trainer | None, world_size: int) -> int:
        n_images, by_steps = self.n_train, trainer is not None and trainer.max_steps > 0
        if n_images is None and not (by_steps and trainer is not None and trainer.max_epochs in (None, -1)):
            if trainer is None:
                return 2**31  # read by hand
            raise ValueError(
                f"{self.division.source.name} is a stream of unknown length, so nothing says where an epoch ends; give "
                "the trainer max_steps, and not max_epochs"
            )
        return epoch_length(trainer, (n_images or 0) // (self.settings.batch_size * world_size))


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
    rows: Iterable[dict[str, Any]] = (
        {name: values[place] for name, values in block.items()}
        for block in part.stream.iter(100)
        for place, value in enumerate(block[part.image_column])
        if part.hold_out is None or part.hold_out.keeps(value)
    )
    kept = list(itertools.islice(rows, n_images))
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
    return Part(part.source, part.split, dataset)
