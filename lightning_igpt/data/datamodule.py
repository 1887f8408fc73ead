"""What the three data modules share: options, opening, splits and loaders."""

from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa  # type: ignore[import-untyped]
from datasets.exceptions import DatasetGenerationError
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_igpt.bases import LightningDataModule
from lightning_igpt.config import plain
from lightning_igpt.data import loaders, readers, streams
from lightning_igpt.data.folders import DamagedDataError
from lightning_igpt.data.loaders import Loader, make_loader, matching_palette, place_of
from lightning_igpt.data.options import Cache, check
from lightning_igpt.data.order import EndlessOrder, EvalOrder
from lightning_igpt.data.readers import ImageBatches, OnBadImage
from lightning_igpt.data.sources import ImageSource, Source, name_of, open_source
from lightning_igpt.data.splits import Division, Part, divide, make_parts
from lightning_igpt.data.streams import StreamBatches, StreamPart
from lightning_igpt.data.tokens import TokenReader, cached_tokens
from lightning_igpt.data.transforms import Augment, CenterCrop, Resize
from lightning_igpt.files import counted, write_csv
from lightning_igpt.images import Filter

_OPENING = ("revision", "streaming", "image_column", "label_column", "train_split")
_DIVIDING = (*_OPENING, "source", "config_name", "val_split", "test_split", "seed", "val_fraction", "val_images")


class ImageDataModule(LightningDataModule):
    """Images from one source in train, validation and test parts.

    Every batch is ``{"image": uint8 (B, 3, S, S), "sample": int64 (B,), "label": int64 (B,)}``; ``sample`` numbers the
    draws of a run in training and the rows in evaluation; ``label`` is missing without labels in the source. Sources of
    tokens, and ``cache="disk"``, give ``tokens`` int16 (B, T) instead of ``image``. ``setup`` sets ``num_classes`` and
    ``class_names`` (None without labels), ``batches_per_epoch``, and ``bad_images``, left out.

    Options can be set later, as attributes; new loaders and ``hparams`` use them. After a change of source, splits,
    columns, ``seed`` or ``val_fraction``, call ``setup`` again, as ``fit`` does.

    Args:
        source: "digits" or "emoji" (embedded); a hub id "owner/name"; a folder of images, of Parquet or Arrow files, of
            WebDataset shards (.tar) or of downsampled ImageNet's .npz files, or one such file; a folder written by
            save_to_disk. In Python also a Dataset, DatasetDict, IterableDataset or IterableDatasetDict, such as
            interleave_datasets makes of several. Tokens made by ``lightning_igpt.tokenize`` are a source, too.
        image_size: Side S of the square images in pixels. Default: the network's, or 32 without a network.
        batch_size: Images per optimizer step, over all devices and accumulated micro-batches together.
        num_workers: Processes that read and decode; 0 reads in the main process.
        seed: Seed of the order, the hold-out, crops and augmentation. With another seed, of which ``RunRecord`` warns,
            a resumed run validates on images that it was trained on.
        val_fraction: Share of the training split held out where the source has no validation split; 0 holds out none.
        config_name: Configuration of a hub dataset that has several.
        revision: Branch, tag or commit of a hub dataset.
        image_column: Column of images. Default: the only column of type Image.
        label_column: Column of labels. Default: the only ClassLabel, or integers called label, labels or cls.
        train_split: Split to train on, or a slice such as train[:10%] or train+unlabeled. Default: train.
        val_split: Split or slice to validate on. Default: validation, valid, val or dev, else a hold-out of the
            training split.
        test_split: Split or slice to test on. Default: test.
        streaming: Read rows as they arrive, without copying all of them first; shuffled by shards and a buffer.
        shuffle_buffer: Streams: rows of the shuffle buffer; every worker holds one, undecoded.
        val_images: Streams: images to validate on, read once and held in memory undecoded.
        cache: disk keeps tokens of all images, 2 T bytes each, in the cache of datasets, for all runs with the same
            images, size and palette; none keeps nothing.
        palette: Palette of a token cache, as for the modules. Default: the network's.
        on_bad_image: What to do with an image that cannot be read: error stops the run and names it; skip lists it in
            bad_images.csv, and trains on another image instead.
        max_bad_share: Largest share of images to leave out; beyond it the run stops.
        resize: Pillow's filter: bilinear, bicubic, box or lanczos. Default: recorded with the pretrained network, else
            bilinear.
    """

    needs_labels: ClassVar[bool] = True
    n_crops = 1
    num_classes: int | None = None
    class_names: list[str] | None = None
    division: Division | None = None  # the splits of each role; None before ``setup``

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
        streaming: bool = False,
        shuffle_buffer: int = 1000,
        val_images: int = 1000,
        cache: Cache = "none",
        palette: str | None = None,
        on_bad_image: OnBadImage = "error",
        max_bad_share: float = 0.05,
        resize: Filter | None = None,
    ) -> None:
        super().__init__()
        self.image_size, self.batch_size, self.num_workers = image_size, batch_size, num_workers
        self.seed, self.val_fraction, self.cache, self.palette = seed, val_fraction, cache, palette
        self.shuffle_buffer, self.val_images, self.streaming = shuffle_buffer, val_images, streaming
        self.on_bad_image, self.max_bad_share, self.resize = on_bad_image, max_bad_share, resize
        self.config_name, self.revision = config_name, revision
        self.image_column, self.label_column = image_column, label_column
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.source = plain(source)
        check(self)
        self._begun_with = batch_size  # at the last ``setup``
        self.parts: dict[str, Part] = {}  # train and, where there are any, val and test; of a stream what is kept
        self.left_out: dict[str, readers.BadImages] = {}  # by part
        self._opened: Source | None = None
        self._order: EndlessOrder | None = None  # of the last loader, which without a trainer the next one continues
        self._stream: Loader | None = None
        self._stream_states: list[list[str]] = []  # of a checkpoint: of each process, of each worker
        # Not logged: Lightning stops where module and data module have different values of one name, such as seed.
        self.save_hyperparameters(ignore=["source", "palette"], logger=False)
        # A dataset itself would make checkpoints large, and unreadable with weights_only=True.
        self.hparams["source"] = name_of(self.source)

    def __setattr__(self, name: str, value: Any) -> None:
        before = getattr(self, name, None)
        super().__setattr__(name, value)
        if name in self.hparams and before != value:
            self.hparams[name] = name_of(value) if name == "source" else value
            if name in _DIVIDING:
                self._opened, self.division, self.parts = None, None, {}

    @property
    def opened(self) -> Source:
        """What ``source`` names, opened."""
        if self._opened is None:
            options = {name: getattr(self, name) for name in _OPENING} | {"need_labels": self.needs_labels}
            try:
                self._opened = open_source(self.source, name=self.config_name, **options)
            except (pa.ArrowException, OSError, DatasetGenerationError) as error:
                if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and error.errno):
                    raise
                where, reason = name_of(self.source), error.__cause__ or error  # pyarrow names no place
                raise DamagedDataError(f"{where} is damaged; restore it, or make it again. {reason}") from error
            self.class_names = self._opened.class_names
            self.num_classes = None if self.class_names is None else len(self.class_names)
        if self._opened.streaming and self.cache == "disk":
            raise ValueError("cache is 'disk', but a stream cannot be cached; use cache=none")
        return self._opened

    @property
    def n_train(self) -> int | None:
        """Training images; None before ``setup`` and for streams of unknown length."""
        if self.division is None or not self.opened.streaming:
            return len(self.parts["train"]) if self.parts else None
        name, held_out = self.division.splits["train"], 0 if "val" in self.division.splits else self.val_fraction
        split = (self.opened.splits[name].info.splits or {}).get(name)
        return int(split.num_examples * (1 - held_out)) if split and split.num_examples else None

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches of each device in one pass over the training part; None before ``setup`` and where it is unknown."""
        return None if self.n_train is None else self.n_train // self.batch_size * place_of(self.trainer).accumulate

    @property
    def bad_images(self) -> dict[str, str]:
        """Images that this process left out so far, and why."""
        return {place: reason for log in self.left_out.values() for place, reason in log.reasons.items()}

    @property
    def resize_filter(self) -> Filter:
        """The filter in use; runs and checkpoints record it."""
        return loaders.matching_filter(self.trainer, self.resize)

    def roles(self) -> list[str]:
        """Which of train, val and test there are; after ``setup``."""
        assert self.division is not None
        return [*self.division.splits, *(["val"] if "val" not in self.division.splits and self.val_fraction else [])]

    def prepare_data(self) -> None:
        """Download and convert once per node."""
        self.opened  # noqa: B018

    def setup(self, stage: str | None = None) -> None:
        """Open the source, divide it, and check the labels of all that is trained and validated on."""
        check(self)
        opened, self._begun_with = self.opened, self.batch_size
        if self.division is not None:
            return
        division = divide(opened, train_split=self.train_split, val_split=self.val_split, test_split=self.test_split)
        self._opened = division.source  # with the slices that are named
        if not self.opened.streaming:  # labels of a stream are checked as they come
            self.parts = make_parts(division, val_fraction=self.val_fraction, seed=self.seed)
            if self.needs_labels:
                if len(self.parts["train"].labels(self.opened).unique()) < 2:  # type: ignore[no-untyped-call]
                    where = f"{self.opened.name}, split {division.splits['train']!r}"
                    raise ValueError(f"{where} has images of a single class; a classifier needs two or more")
                if "val" in self.parts:
                    self.parts["val"].labels(self.opened)
        self.division = division

    def train_dataloader(self) -> Loader:
        """Shuffled batches; those of an optimizer step depend on its number and the seed alone.

        Under a trainer with ``max_steps`` and no ``max_epochs``, one Lightning epoch is the whole run; otherwise it is
        one pass over the data.
        """
        self._check_role("train")
        trainer, streaming = loaders.unfinished(self.trainer), self.opened.streaming
        place = place_of(trainer)
        if trainer is not None and not streaming and self.batch_size != self._begun_with:  # by a BatchSizeFinder
            self.batch_size = loaders.possible_batch_size(self.batch_size, len(self.parts["train"]), place)
        per_pass = None if self.n_train is None else max(1, self.n_train // self.batch_size)
        order = EndlessOrder(
            self.batch_size if streaming else len(self.parts["train"]),
            batch_size=self.batch_size,
            n_steps=loaders.n_steps(trainer, per_pass, self.opened.name),
            seed=self.seed,
            first_step=lambda: loaders.step_of(trainer, place),
            **place._asdict(),
        )
        order.set_epoch(0 if self._order is None else self._order.epoch)
        self._order = order
        resize, augment = self.training_resize(), self.augmentation()
        if not streaming:
            images = self._images("train", resize, self.needs_labels, replace=True, augment=augment)
            return make_loader(images, order, self._log("train"), order.at_once, self.num_workers)
        rows = self._stream_part("train", self.needs_labels, resize, augment)
        workers = streams.n_readers(rows, self.num_workers, place.world_size)
        states = streams.begin(self._stream_states, place.rank, place.world_size, max(1, workers))
        if (last := self._stream) and len(last.states) == len(states) and (not trainer or trainer.global_step):
            states = last.states  # another loader of the same run
        batches = StreamBatches(rows, place.rank, place.world_size, self.seed, self.shuffle_buffer, states)
        self._stream = make_loader(batches, order, self._log("train"), order.at_once, workers)
        return self._stream

    def val_dataloader(self) -> Loader | list[Loader]:
        return self.eval_loader("val") if self.division is None or "val" in self.roles() else []

    def test_dataloader(self) -> Loader:
        return self.eval_loader("test")

    def predict_dataloader(self) -> Loader:
        """Every image of the test split once, or of validation where there is no test split; labels may be absent."""
        role = "test" if self.division is not None and "test" in self.roles() else "val"
        return self.eval_loader(role, need_labels=False)

    def left_out_of_predictions(self) -> set[int]:
        """Rows of ``predict_dataloader`` that could not be read and so have no prediction."""
        log = self.left_out.get("test") or self.left_out.get("val")
        return log.numbers if log else set()

    def eval_loader(self, role: str, *, need_labels: bool | None = None) -> Loader:
        """Every image of a part once, in order, resized from its middle square."""
        self._check_role(role)
        need_labels = self.needs_labels if need_labels is None else need_labels
        place, resize = place_of(self.trainer), CenterCrop(self._size(), self.resize_filter)
        at_once = -(-self.batch_size // (place.world_size * place.accumulate))
        labels = None
        if self.opened.streaming:
            rows = self._stream_part(role, need_labels, resize)
            if role != "val":
                if place.world_size > 1:
                    text = f"{rows.where} is a stream; {place.world_size} devices cannot divide it without repeats"
                    raise ValueError(f"{text}. Use one device (--trainer.devices 1), or streaming=False")
                once = streams.StreamOnce(rows, at_once)
                return make_loader(once, None, self._log(role), None, min(self.num_workers, 1))
            if "val" not in self.parts:
                self.parts["val"] = streams.keep(rows, self.val_images)
            labels = rows.labels(self.parts["val"].dataset)
        images = self._images(role, resize, need_labels, labels=labels)
        order = EvalOrder(len(images), batch_size=at_once, rank=place.rank, world_size=place.world_size)
        return make_loader(images, order, self._log(role), None, self.num_workers)

    def state_dict(self) -> dict[str, Any]:
        # Of a stream, where every worker of every process is; otherwise the step alone decides the order.
        return {} if self._stream is None else {"stream_states": self._stream.all_states()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stream = None
        self._stream_states = state_dict.get("stream_states", [])  # not what versions before 0.2 saved

    def teardown(self, stage: str) -> None:
        """Say how many images were left out, and list them in ``bad_images.csv`` next to the logs."""
        if self.trainer is None or self.division is None:
            return
        # All processes ask for the folder, which they do together, also those that left nothing out.
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)
        if bad := self.bad_images:
            rank = self.trainer.global_rank
            path = folder / (f"bad_images_{rank}.csv" if rank else "bad_images.csv")
            write_csv(path, [("image", "reason"), *bad.items()])
            rank_zero_warn(f"left out {counted(len(bad), 'image')} that could not be read; listed in {path}")

    def training_resize(self) -> Resize:
        return CenterCrop(self._size(), self.resize_filter)

    def augmentation(self) -> Augment | None:
        return None

    def _images(self, role: str, resize: Resize, need_labels: bool, labels: Any = None, **options: Any) -> ImageBatches:
        """A stored part as batches; labels that are not needed may be absent or unusable."""
        part, source = self.parts[role], self.opened
        if labels is None and not source.streaming:
            try:
                labels = part.labels(source) if need_labels or source.class_names is not None else None
            except ValueError as error:
                if need_labels:
                    raise
                rank_zero_info(f"batches will carry no labels: {error}")
        palette = matching_palette(self.trainer, source, self.palette, cache=self.cache == "disk")
        if source.tokens is not None:
            column, each = source.image_column, source.tokens.tokens_per_pixel
            reader: readers.Reader = TokenReader(part, part.dataset, column, resize.size, 1, each)
        elif self.cache != "disk":
            reader = readers.ImageReader(part, source.image_column, resize)
        else:
            assert palette is not None
            kept, column = self.n_crops if role == "train" else 1, source.image_column
            made: dict[str, Any] = {"skip": self.on_bad_image == "skip", "n_crops": kept}
            made |= {"num_workers": self.num_workers}
            reader = cached_tokens(self.trainer, part, column, palette, resize, **made)
        return ImageBatches(reader, on_bad_image=self.on_bad_image, seed=self.seed, labels=labels, **options)

    def _stream_part(self, role: str, need_labels: bool, resize: Resize, augment: Augment | None = None) -> StreamPart:
        assert self.division is not None
        matching_palette(self.trainer, self.opened, self.palette, cache=False)
        splits = self.division.splits
        fraction = self.val_fraction if "val" not in splits and role != "test" else 0.0
        # Hidden labels of a test split do not concern a prediction.
        labels, split = need_labels or role != "test", splits.get(role, splits["train"])
        rows = streams.open_part(self.opened, split, need_labels, labels, fraction, held_out=role == "val")
        return StreamPart(*rows, need_labels, resize, augment, self.on_bad_image)

    def _log(self, role: str) -> readers.BadImages:
        n_images = None if role not in self.parts or self.opened.streaming else len(self.parts[role].dataset)
        self.left_out[role] = readers.BadImages(self.max_bad_share, n_images)
        return self.left_out[role]

    def _size(self) -> int:
        return loaders.matching_size(self.trainer, self.opened, self.image_size)

    def _check_role(self, role: str) -> None:
        check(self)
        if self.division is None:
            raise RuntimeError("call setup() before requesting a loader, and again after changing source or splits")
        if role not in self.roles():
            splits = ", ".join(self.opened.splits)
            raise ValueError(f"{self.opened.name} has no {role} split; set {role}_split to one of: {splits}")
