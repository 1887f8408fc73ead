"""What the three data modules share: options, opening, splits, loaders, and the state that makes runs resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_igpt.data.dataset import ImageBatches, make_cache
from lightning_igpt.data.loaders import (
    Loader,
    batches_done,
    epoch_length,
    make_loader,
    network_image_size,
    rank_and_world,
)
from lightning_igpt.data.order import EndlessOrder, EvalOrder
from lightning_igpt.data.sources import ImageSource, Source, open_source
from lightning_igpt.data.splits import Part, split_source
from lightning_igpt.data.transforms import Augment, CenterCrop, Resize

_LEAST = {"image_size": 1, "batch_size": 1, "num_workers": 0, "seed": 0}


class ImageDataModule(LightningDataModule):
    """Images from one source in train, validation and test parts.

    Every batch is ``{"image": uint8 (B, 3, S, S), "sample": int64 (B,), "label": int64 (B,)}``; ``sample`` numbers
    the draws of a run in training and the rows in evaluation, ``label`` is there when the source has labels.

    After ``setup``, ``num_classes`` and ``class_names`` (None without labels) and ``batches_per_epoch`` tell modules
    what they train on.

    Args:
        source: "digits" (embedded); a hub id "owner/name"; a folder of images; a Parquet file or a folder of them; a
            folder written by save_to_disk. In Python also a datasets.Dataset or DatasetDict.
        image_size: Side S of the square images in pixels. Default: the network's, or 32 without a network.
        batch_size: Images per device and step; a step of all devices takes batch_size x devices images.
        num_workers: Processes that read and decode; 0 reads in the main process.
        seed: Decides the order, the hold-out, crops and augmentation. A run resumes only with the same seed.
        val_fraction: Share of the training split held out where the source has no validation split; 0 holds out none.
        config_name: Configuration of a hub data set that has several.
        revision: Branch, tag or commit of a hub data set.
        image_column: Column of images. Default: the only column of type Image.
        label_column: Column of labels. Default: the only ClassLabel, or integers called label or labels.
        train_split: Split to train on. Default: train.
        val_split: Split to validate on. Default: validation, valid, val or dev, else a hold-out of the training split.
        test_split: Split to test on. Default: test.
        cache: Keep resized images in memory, 3 S^2 bytes each, so that they are decoded once: memory, none, or auto,
            which keeps up to 256 MiB per part if num_workers is 0.
    """

    needs_labels: ClassVar[bool] = True
    num_classes: int | None = None
    class_names: list[str] | None = None

    def __init__(
        self,
        source: ImageSource = "digits",
        *,
        image_size: int | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        val_fraction: float = 0.1,
        config_name: str | None = None,
        revision: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        train_split: str | None = None,
        val_split: str | None = None,
        test_split: str | None = None,
        cache: Literal["auto", "memory", "none"] = "auto",
    ) -> None:
        super().__init__()
        # Not logged: Lightning stops where module and data module have different values of one name, such as seed.
        self.save_hyperparameters(ignore="source", logger=False)
        # A data set itself would make checkpoints large, and unreadable with weights_only=True.
        self.hparams["source"] = str(source) if isinstance(source, str | Path) else type(source).__name__
        self.source, self.image_size, self.batch_size = source, image_size, batch_size
        self.num_workers, self.seed, self.cache = num_workers, seed, cache
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if cache not in ("auto", "memory", "none"):
            raise ValueError(f"cache is {cache!r}; it must be 'auto', 'memory' or 'none'")
        self._open_options: dict[str, Any] = {
            "name": config_name,
            "revision": revision,
            "image_column": image_column,
            "label_column": label_column,
            "train_split": train_split,
            "need_labels": self.needs_labels,
        }
        self._split_options: dict[str, Any] = {
            "seed": seed,
            "val_fraction": val_fraction,
            "train_split": train_split,
            "val_split": val_split,
            "test_split": test_split,
        }
        self._opened: Source | None = None
        self._parts: dict[str, Part] = {}
        self._order: EndlessOrder | None = None
        self._loaded_state: dict[str, int] = {}

    @property
    def global_batch(self) -> int:
        """Images per step over all devices."""
        return self.batch_size * rank_and_world(self.trainer)[1]

    @property
    def batches_per_epoch(self) -> int | None:
        """Steps of all devices in one pass over the training part; None before ``setup``."""
        return len(self._parts["train"]) // self.global_batch if self._parts else None

    def prepare_data(self) -> None:
        """Download and convert once per node."""
        self._open()

    def setup(self, stage: str | None = None) -> None:
        """Open the source, divide it, and check the labels of all that is trained and validated on.

        Raises:
            ValueError: A column, a split or labels are missing or unusable.
        """
        source = self._open()
        if self._parts:
            return
        parts = split_source(source, **self._split_options)
        if self.needs_labels:
            n_used = len(self._labels(parts["train"]).unique())  # type: ignore[no-untyped-call]
            if n_used < 2:
                where = f"{source.name}, split {parts['train'].split!r}"
                raise ValueError(f"{where} has images of a single class; a classifier needs two or more")
            if "val" in parts:
                self._labels(parts["val"])
        self._parts = parts

    def train_dataloader(self) -> Loader:
        """Shuffled global batches in an endless, resumable order.

        Under a trainer with ``max_steps`` and no ``max_epochs``, one Lightning epoch is the whole run; otherwise it is
        one pass over the data.

        Raises:
            ValueError: The part is smaller than one global batch, or the checkpoint was made with another order.
        """
        part, trainer = self._part("train"), self.trainer
        rank, world_size = rank_and_world(trainer)
        self._order = EndlessOrder(
            len(part),
            global_batch=self.global_batch,
            length=epoch_length(trainer, len(part) // self.global_batch),
            seed=self.seed,
            rank=rank,
            world_size=world_size,
            batches_done=lambda: batches_done(trainer),
        )
        self._check_loaded_state()
        images = self._images(part, resize=self._train_resize(), augment=self._augment())
        return make_loader(images, self._order, num_workers=self.num_workers)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Every validation image once; empty with ``val_fraction=0`` and no validation split."""
        return self._eval_loader(self._part("val")) if "val" in self._parts else []

    def test_dataloader(self) -> Loader:
        """Every test image once.

        Raises:
            ValueError: There is no test split.
        """
        return self._eval_loader(self._part("test"))

    def predict_dataloader(self) -> Loader:
        """Every image of the test split once, or of validation where there is no test split; labels may be absent."""
        return self._eval_loader(self._part("test" if "test" in self._parts else "val"), need_labels=False)

    def state_dict(self) -> dict[str, int]:
        """How far the run has come in its order, and what the order is made of."""
        if self._order is None:
            return {}
        return {"batches_done": batches_done(self.trainer), **self._order.fingerprint}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Keep what the checkpoint says; ``train_dataloader`` checks it, since evaluation may use other settings."""
        self._loaded_state = dict(state_dict)

    def _check_loaded_state(self) -> None:
        assert self._order is not None
        state, self._loaded_state = self._loaded_state, {}
        for key, mine in self._order.fingerprint.items():
            if state.get(key, mine) != mine:
                raise ValueError(
                    f"the checkpoint was made with {key}={state[key]}, this run has {key}={mine}: after "
                    f"{state['batches_done']} batches the images would not continue in the same order. Set it as it "
                    "was (global_batch is batch_size x devices), or start a new run from the weights with pretrained="
                )

    def _train_resize(self) -> Resize:
        return CenterCrop(self._size())

    def _augment(self) -> Augment | None:
        return None

    def _size(self) -> int:
        return self.image_size or network_image_size(self.trainer)

    def _open(self) -> Source:
        if self._opened is None:
            self._opened = open_source(self.source, **self._open_options)
            self.class_names = self._opened.class_names
            self.num_classes = None if self.class_names is None else len(self.class_names)
        return self._opened

    def _part(self, role: str) -> Part:
        if role in self._parts:
            return self._parts[role]
        if not self._parts:
            raise RuntimeError("call setup() before asking for a loader")
        source = self._open()
        raise ValueError(f"{source.name} has no {role} split; set {role}_split to one of: {', '.join(source.splits)}")

    def _labels(self, part: Part) -> Tensor:
        labels = self._open().labels(part.split)
        return labels if part.rows is None else labels[part.rows]

    def _labels_if_any(self, part: Part) -> Tensor | None:
        if self.class_names is None:
            return None
        try:
            return self._labels(part)
        except ValueError as error:
            rank_zero_info(f"batches will carry no labels: {error}")
            return None

    def _images(
        self, part: Part, *, resize: Resize, augment: Augment | None = None, need_labels: bool | None = None
    ) -> ImageBatches:
        needed = self.needs_labels if need_labels is None else need_labels
        return ImageBatches(
            part,
            image_column=self._open().image_column,
            resize=resize,
            labels=self._labels(part) if needed else self._labels_if_any(part),
            augment=augment,
            cache=make_cache(self.cache, len(part), resize.size, num_workers=self.num_workers),
        )

    def _eval_loader(self, part: Part, *, need_labels: bool | None = None) -> Loader:
        rank, world_size = rank_and_world(self.trainer)
        order = EvalOrder(len(part), batch_size=self.batch_size, rank=rank, world_size=world_size)
        images = self._images(part, resize=CenterCrop(self._size()), need_labels=need_labels)
        return make_loader(images, order, num_workers=self.num_workers)
