"""Loaders over images that lie here: any row can be read at any time, so the order is exact and can be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_igpt.data.bad_images import BadImages
from lightning_igpt.data.dataset import ImageBatches, Reader
from lightning_igpt.data.loaders import Loader, batches_done, epoch_length, make_loader, rank_and_world
from lightning_igpt.data.order import EndlessOrder, EvalOrder, MixedOrder
from lightning_igpt.data.readers import BadImagePolicy, ImageReader, TokenColumn, make_cache
from lightning_igpt.data.settings import Settings
from lightning_igpt.data.sources import Source
from lightning_igpt.data.splits import Part
from lightning_igpt.data.token_cache import TokenFileReader, open_token_cache
from lightning_igpt.data.transforms import Augment, CenterCrop, Resize
from lightning_igpt.palette import Palette


@dataclass
class StoredImages:
    """Parts of a source that lies here, and the loaders over them.

    Args:
        settings: How images are read.
        source: Where labels come from.
        parts: ``train`` and, where there are any, ``val`` and ``test``.
        sizes: Of a mixture, the rows of each source in ``train``.
        weights: Of a mixture, the shares of the sources.
    """

    settings: Settings
    source: Source
    parts: dict[str, Part]
    sizes: Sequence[int] = ()
    weights: Sequence[float] | None = None
    bad_images: dict[str, BadImages] = field(default_factory=dict)
    _order: EndlessOrder | None = None

    @property
    def n_train(self) -> int:
        """Training images."""
        return len(self.parts["train"])

    def roles(self) -> list[str]:
        """The parts there are."""
        return list(self.parts)

    def check_labels(self) -> None:
        """Raise ValueError where training or validation lack labels, or have a single class."""
        part = self.parts["train"]
        if len(self._labels("train").unique()) < 2:  # type: ignore[no-untyped-call]
            where = f"{self.source.name}, split {part.split!r}"
            raise ValueError(f"{where} has images of a single class; a classifier needs two or more")
        if "val" in self.parts:
            self._labels("val")

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
        """Shuffled global batches in an endless order.

        Raises:
            ValueError: The part is smaller than one global batch, or ``state`` was made with another order.
        """
        rank, world_size = rank_and_world(trainer)
        options: dict[str, Any] = {
            "global_batch": self.settings.batch_size * world_size,
            "seed": self.settings.seed,
            "rank": rank,
            "world_size": world_size,
            "batches_done": lambda: batches_done(trainer),
            "length": epoch_length(trainer, self.n_train // (self.settings.batch_size * world_size)),
        }
        if self.weights is None:
            self._order = EndlessOrder(self.n_train, **options)
        else:
            self._order = MixedOrder(self.sizes, self.weights, **options)
        self._check_state(state)
        return self._loader("train", self._order, resize, need_labels, palette, augment=augment, replace=True)

    def evaluate(
        self, role: str, trainer: Trainer | None, size: int, *, need_labels: bool, palette: Palette | None
    ) -> Loader:
        """Every image of a part once, in order."""
        rank, world_size = rank_and_world(trainer)
        options: dict[str, Any] = {"batch_size": self.settings.batch_size, "rank": rank, "world_size": world_size}
        if role == "train":
            options["batches_done"] = lambda: batches_done(trainer)
        order = EvalOrder(len(self.parts[role]), **options)
        return self._loader(role, order, CenterCrop(size), need_labels, palette)

    def state(self, trainer: Trainer | None) -> dict[str, Any]:
        """What a checkpoint needs to resume the order."""
        return {} if self._order is None else {"batches_done": batches_done(trainer), **self._fingerprint()}

    def _fingerprint(self) -> dict[str, Any]:
        assert self._order is not None
        return self._order.fingerprint | ({"sizes": list(self.sizes)} if self.sizes else {})

    def _check_state(self, state: dict[str, Any]) -> None:
        if "stream" in state:
            raise ValueError(
                f"the checkpoint was made with streaming=True: after {state['batches_done']} batches the images would "
                "not continue in the same order. Stream again, or start a new run from the weights with pretrained="
            )
        fingerprint = self._fingerprint()
        for key in dict.fromkeys([*fingerprint, *state]) if state else ():
            theirs, mine = state.get(key), fingerprint.get(key)
            if key != "batches_done" and theirs != mine:
                raise ValueError(
                    f"the checkpoint was made with {key}={theirs}, this run has {key}={mine}: after "
                    f"{state['batches_done']} batches the images would not continue in the same order. Set it as it "
                    "was (global_batch is batch_size x devices), or start a new run from the weights with pretrained="
                )

    def _loader(
        self,
        role: str,
        order: Any,
        resize: Resize,
        need_labels: bool,
        palette: Palette | None,
        *,
        augment: Augment | None = None,
        replace: bool = False,
    ) -> Loader:
        part = self.parts[role]
        self.bad_images[role] = BadImages(self.settings.max_bad_share, len(part.dataset))
        policy = BadImagePolicy(self.settings.on_bad_image, replace, self.settings.seed)
        labels = self._labels(role) if need_labels else self._labels_if_any(role)
        images = ImageBatches(
            self._reader(part, resize, policy, palette, role), len(part), labels=labels, augment=augment
        )
        return make_loader(images, order, num_workers=self.settings.num_workers, bad_images=self.bad_images[role])

    def _reader(self, part: Part, resize: Resize, policy: BadImagePolicy, palette: Palette | None, role: str) -> Reader:
        column, settings = self.source.image_column, self.settings
        if self.source.tokens is not None:
            return TokenColumn(part, column, resize.size)
        if settings.cache != "disk":
            cache = make_cache(settings.cache, len(part), resize.size, num_workers=settings.num_workers)
            return ImageReader(part, column, resize, cache=cache, policy=policy)
        assert palette is not None
        n_crops = settings.n_crops if role == "train" else 1
        if n_crops == 1 and not isinstance(resize, CenterCrop):
            rank_zero_info("cache=disk keeps the centre of large images; n_crops=10 keeps ten random squares of each")
            resize = CenterCrop(resize.size)
        whole = Part(part.source, part.split, part.dataset, members=part.members)
        file = open_token_cache(
            settings.token_folder,
            ImageReader(whole, column, resize, policy=policy),
            palette,
            n_crops=n_crops,
            num_workers=settings.num_workers,
            max_bad_share=settings.max_bad_share,
        )
        return TokenFileReader(part, file, policy)

    def _labels(self, role: str) -> Tensor:
        part = self.parts[role]
        labels = self.source.labels(part.split)
        return labels if part.rows is None else labels[part.rows]

    def _labels_if_any(self, role: str) -> Tensor | None:
        if self.source.class_names is None:
            return None
        try:
            return self._labels(role)
        except ValueError as error:
            rank_zero_info(f"batches will carry no labels: {error}")
            return None
