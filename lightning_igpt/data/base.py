"""What the three data modules share: options, opening, splits, loaders, and the state that makes runs resume."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from lightning_igpt.data.bad_images import OnBadImage, write_list
from lightning_igpt.data.fingerprint import fingerprint
from lightning_igpt.data.loaders import Loader, network_image_size, network_palette, rank_and_world
from lightning_igpt.data.mixing import check_weights, mix, mix_streams
from lightning_igpt.data.settings import Settings
from lightning_igpt.data.sources import ImageSource, Source, as_list, name_of, open_source
from lightning_igpt.data.splits import Division, divide, make_parts
from lightning_igpt.data.stored import StoredImages
from lightning_igpt.data.stream_parts import HoldOut, Kept
from lightning_igpt.data.streamed import StreamedImages
from lightning_igpt.data.transforms import Augment, CenterCrop, Resize
from lightning_igpt.palette import Palette


class ImageDataModule(LightningDataModule):
    """Images from one source in train, validation and test parts.

    Every batch is ``{"image": uint8 (B, 3, S, S), "sample": int64 (B,), "label": int64 (B,)}``; ``sample`` numbers
    the draws of a run in training and the rows in evaluation, ``label`` is there when the source has labels. Sources
    of tokens, and ``cache="disk"``, give ``tokens`` int16 (B, S * S) in place of ``image``.

    After ``setup``, ``num_classes`` and ``class_names`` (None without labels) and ``batches_per_epoch`` tell modules
    what they train on; ``bad_images`` says which images were left out.

    Args:
        source: "digits" (embedded); a hub id "owner/name"; a folder of images, of Parquet or Arrow files, or of
            WebDataset shards (.tar), or one such file; a folder written by save_to_disk. In Python also a Dataset,
            DatasetDict, IterableDataset or IterableDatasetDict. Tokens made by ``lightning_igpt.tokenize`` are a
            source, too. A list is a mix to pretrain on; validation and test images are those of the first.
        image_size: Side S of the square images in pixels. Default: the network's, or 32 without a network.
        batch_size: Images per device and step; a step of all devices takes batch_size x devices images.
        num_workers: Processes that read and decode; 0 reads in the main process.
        seed: Decides the order, the hold-out, crops and augmentation. A run resumes only with the same seed.
        val_fraction: Share of the training split held out where the source has no validation split; 0 holds out none.
        config_name: Configuration of a hub data set that has several.
        revision: Branch, tag or commit of a hub data set.
        image_column: Column of images. Default: the only column of type Image.
        label_column: Column of labels. Default: the only ClassLabel, or integers called label, labels or cls.
        train_split: Split to train on, or a slice such as train[:10%] or train+unlabeled. Default: train.
        val_split: Split or slice to validate on. Default: validation, valid, val or dev, else a hold-out of the
            training split.
        test_split: Split or slice to test on. Default: test.
        source_weights: Share of each source of a mix in the images of every thousand. Default: each image once a pass
            (streams: equal shares).
        streaming: Read rows as they arrive, without a copy of all of them first. Shuffles shards and blocks only.
        shuffle_buffer: Streams: rows of a block that are shuffled together; every worker holds a block undecoded.
        val_images: Streams: images to validate on, read once and held in memory undecoded.
        cache: What is kept of decoded images. memory: their pixels, 3 S^2 bytes each. disk: their tokens, 2 S^2 bytes,
            in cache_dir, for all runs with the same images, size and palette. none. auto: memory, up to 256 MiB per
            part and if num_workers is 0.
        cache_dir: Folder of token caches. Default: tokens in $LIGHTNING_IGPT_CACHE or ~/.cache/lightning_igpt.
        palette: Of a token cache; as for the modules. Default: the network's.
        on_bad_image: What to do with an image that cannot be read: error stops the run and names it; skip leaves it
            out, trains on another one in its place, and lists it in bad_images.csv.
        max_bad_share: Largest share of images to leave out; beyond it the run stops.
    """

    needs_labels: ClassVar[bool] = True
    num_classes: int | None = None
    class_names: list[str] | None = None
    images: StoredImages | StreamedImages | None = None  # the parts and how they are read; None before ``setup``

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
        source_weights: list[float] | None = None,
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        val_images: int = 1000,
        cache: Literal["auto", "memory", "none", "disk"] = "auto",
        cache_dir: str | None = None,
        palette: str | None = None,
        on_bad_image: OnBadImage = "error",
        max_bad_share: float = 0.05,
    ) -> None:
        super().__init__()
        # Not logged: Lightning stops where module and data module have different values of one name, such as seed.
        self.save_hyperparameters(ignore=["source", "palette"], logger=False)
        # A data set itself would make checkpoints large, and unreadable with weights_only=True.
        self.hparams["source"] = name_of(source)
        self.source, self.image_size, self.batch_size, self.seed = source, image_size, batch_size, seed
        self.palette, self.source_weights = palette, source_weights
        self.settings = Settings(
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            val_fraction=val_fraction,
            cache=cache,
            cache_dir=cache_dir,
            on_bad_image=on_bad_image,
            max_bad_share=max_bad_share,
            shuffle_buffer=shuffle_buffer,
            val_images=val_images,
        )
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size is {image_size}; it must be at least 1")
        check_weights(len(as_list(source)), source_weights)
        self._split_names = {"train_split": train_split, "val_split": val_split, "test_split": test_split}
        self._open_options: dict[str, Any] = {
            "name": config_name,
            "revision": revision,
            "image_column": image_column,
            "label_column": label_column,
            "train_split": train_split,
            "need_labels": self.needs_labels,
            "streaming": streaming,
        }
        self._opened: list[Source] = []
        self._loaded_state: dict[str, Any] = {}

    @property
    def sources(self) -> list[Source]:
        """What ``source`` names, opened: one, or those of a mix."""
        return self._open()

    @cached_property
    def fingerprint(self) -> str | None:
        """Digest of the images and labels of ``source``, by counts, names, sizes and a sample; no stream is read."""
        return fingerprint(as_list(self.source), self._open())

    @property
    def global_batch(self) -> int:
        """Images per step over all devices."""
        return self.batch_size * rank_and_world(self.trainer)[1]

    @property
    def batches_per_epoch(self) -> int | None:
        """Steps of all devices in one pass over the training part; None before ``setup`` and where nobody knows."""
        n_images = self.images.n_train if self.images is not None else None
        return None if n_images is None else n_images // self.global_batch

    @property
    def bad_images(self) -> dict[str, str]:
        """Images that this process left out so far, and why."""
        logs = self.images.bad_images.values() if self.images is not None else ()
        return {place: reason for log in logs for place, reason in log.found.items()}

    def prepare_data(self) -> None:
        """Download and convert once per node."""
        self._open()

    def setup(self, stage: str | None = None) -> None:
        """Open the source, divide it, and check the labels of all that is trained and validated on.

        Raises:
            ValueError: A column, a split or labels are missing or unusable.
        """
        if self.images is None:
            sources = self._open()
            images = self._stream(sources) if sources[0].streaming else self._store(sources)
            if self.needs_labels:
                images.check_labels()
            self.images = images

    def train_dataloader(self) -> Loader:
        """Shuffled global batches in an endless, resumable order.

        Under a trainer with ``max_steps`` and no ``max_epochs``, one Lightning epoch is the whole run; otherwise it is
        one pass over the data.

        Raises:
            ValueError: The part is smaller than one global batch, or the checkpoint was made with another order.
        """
        state, self._loaded_state = self._loaded_state, {}
        return self._part("train").train(
            self.trainer,
            self._train_resize(),
            augment=self._augment(),
            need_labels=self.needs_labels,
            palette=self._colors(),
            state=state,
        )

    def training_transform(self) -> tuple[Resize, Augment | None]:
        """What makes a training image square, and what changes it then; a token cache of one crop keeps the centre."""
        centre = self.settings.cache == "disk" and self.settings.n_crops == 1
        return CenterCrop(self._size()) if centre else self._train_resize(), self._augment()

    def val_dataloader(self) -> Loader | list[Loader]:
        """Every validation image once; empty with ``val_fraction=0`` and no validation split."""
        return self._eval_loader("val") if self.images is None or "val" in self.images.roles() else []

    def test_dataloader(self) -> Loader:
        """Every test image once.

        Raises:
            ValueError: There is no test split.
        """
        return self._eval_loader("test")

    def predict_dataloader(self) -> Loader:
        """Every image of the test split once, or of validation where there is no test split; labels may be absent."""
        role = "test" if self.images is not None and "test" in self.images.roles() else "val"
        return self._eval_loader(role, need_labels=False)

    def left_out_of_predictions(self) -> set[int]:
        """Rows of ``predict_dataloader`` that could not be read, so that no prediction stands for them."""
        logs = self.images.bad_images if self.images is not None else {}
        return logs["test" if "test" in logs else "val"].numbers if logs else set()

    def state_dict(self) -> dict[str, Any]:
        """How far the run has come in its order, and what the order is made of."""
        return {} if self.images is None else self.images.state(self.trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what the checkpoint says; ``train_dataloader`` checks it, since evaluation may use other settings."""
        self._loaded_state = dict(state_dict)

    def teardown(self, stage: str) -> None:
        """Say how many images were left out, and list them in ``bad_images.csv`` beside the logs."""
        if self.trainer is None or self.images is None:
            return
        # All processes ask for the folder, which they do together, also those that left nothing out.
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        if found := self.bad_images:
            rank = self.trainer.global_rank
            path = write_list(found, folder / (f"bad_images_{rank}.csv" if rank else "bad_images.csv"))
            rank_zero_warn(f"{len(found)} images could not be read and were left out; they are listed in {path}")

    def _train_resize(self) -> Resize:
        return CenterCrop(self._size())

    def _augment(self) -> Augment | None:
        return None

    def _size(self) -> int:
        mark = self._open()[0].tokens
        if mark is None:
            return self.image_size or network_image_size(self.trainer)
        wanted = self.image_size or network_image_size(self.trainer, default=mark.image_size)
        if wanted != mark.image_size:
            raise ValueError(
                f"{self._open()[0].name} holds tokens of {mark.image_size} x {mark.image_size} images, but image_size "
                f"is {wanted}; make tokens of that size from the images"
            )
        return wanted

    def _colors(self) -> Palette | None:
        """The palette of tokens, where there are any; checked against the network's.

        Raises:
            ValueError: Nobody says which, or the tokens have another palette.
        """
        mine = None if self.palette is None else Palette.load(self.palette)
        network = network_palette(self.trainer)
        mark, name = self._open()[0].tokens, self._open()[0].name
        sha256 = mine.sha256 if mine is not None else mark.sha256 if mark is not None else None
        if (
            network is not None
            and sha256 not in (None, network.sha256)
            and (mark is not None or self.settings.cache == "disk")
        ):
            raise ValueError(
                f"{name} is to be read with the palette {str(sha256)[:12]}, but the network has {network.sha256[:12]}: "
                "every token would mean another colour. Use one palette for both"
            )
        if mark is not None and mine is not None and mine.sha256 != mark.sha256:
            raise ValueError(f"{name} holds tokens of the palette {mark.sha256[:12]}, not of {mine.sha256[:12]}")
        if self.settings.cache == "disk" and mark is None and mine is None and network is None:
            raise ValueError("cache=disk keeps tokens: give palette, or use it with a trainer whose module has one")
        return mine or network

    def _open(self) -> list[Source]:
        if not self._opened:
            self._opened = [open_source(one, **self._open_options) for one in as_list(self.source)]
            if len(self._opened) == 1:
                self.class_names = self._opened[0].class_names
                self.num_classes = None if self.class_names is None else len(self.class_names)
            cache = self.settings.cache
            if self._opened[0].streaming and cache in ("disk", "memory"):
                raise ValueError(f"cache is {cache!r}, but rows of a stream do not come back; use cache=none")
        return self._opened

    def _store(self, sources: list[Source]) -> StoredImages:
        divisions = self._divide(sources)
        parts = make_parts(divisions[0], val_fraction=self.settings.val_fraction, seed=self.seed)
        if len(sources) == 1:
            return StoredImages(self.settings, divisions[0].source, parts)
        rest = [make_parts(division, val_fraction=0, seed=self.seed)["train"] for division in divisions[1:]]
        train = [parts["train"], *rest]
        parts["train"] = mix([division.source for division in divisions], train)
        sizes = [len(part) for part in train]
        return StoredImages(self.settings, replace(sources[0], class_names=None), parts, sizes, self.source_weights)

    def _stream(self, sources: list[Source]) -> StreamedImages:
        divisions = self._divide(sources)
        first = divisions[0]
        if len(sources) > 1:
            streams: list[Any] = [one.source.splits[one.train] for one in divisions]
            columns = [one.source.image_column for one in divisions]
            if first.val is None and self.settings.val_fraction > 0:
                streams[0] = streams[0].filter(Kept(columns[0], HoldOut(self.settings.val_fraction, held_out=False)))
            mixed = mix_streams(streams, columns, self.source_weights, self.seed)
            name = " + ".join(source.name for source in sources)
            source = replace(first.source.with_split(name, mixed), class_names=None)
            first = replace(first, source=source, train=name)
        return StreamedImages(self.settings, first)

    def _divide(self, sources: list[Source]) -> list[Division]:
        if len(sources) > 1 and self.needs_labels:
            raise ValueError(
                f"a mix of {len(sources)} sources has no common labels; for probing and fine-tuning give one source, "
                "such as datasets.concatenate_datasets([...])"
            )
        if len({source.streaming for source in sources}) > 1:
            raise ValueError("some sources of the mix are streams and some are not; set streaming=True for all")
        names = {"train_split": self._split_names["train_split"]}
        return [divide(sources[0], **self._split_names), *(divide(source, **names) for source in sources[1:])]

    def _part(self, role: str) -> StoredImages | StreamedImages:
        if self.images is None:
            raise RuntimeError("call setup() before asking for a loader")
        if role not in self.images.roles():
            source = self._open()[0]
            raise ValueError(
                f"{source.name} has no {role} split; set {role}_split to one of: {', '.join(source.splits)}"
            )
        return self.images

    def _eval_loader(self, role: str, *, need_labels: bool | None = None) -> Loader:
        needed = self.needs_labels if need_labels is None else need_labels
        part = self._part(role)
        return part.evaluate(role, self.trainer, self._size(), need_labels=needed, palette=self._colors())
