"""From places in a part to whole batches: decoding, images that cannot be read, augmentation, labels."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lightning_igpt.data.columns import mode_of
from lightning_igpt.data.order import Draw
from lightning_igpt.data.splits import Part
from lightning_igpt.data.transforms import Augment, Resize, draw_generator
from lightning_igpt.images import BadImageError, decode

OnBadImage: TypeAlias = Literal["error", "skip"]

BAD = "bad_images"  # key of a batch: what was left out; the loader removes it
KEPT_BYTES = 2**26  # of decoded images, in each process; at 8 x 8 decoding takes 4 % of a training step
MAX_STAND_INS = 100  # tried for one image before the dataset itself is called bad
REPAIR = "Repair or remove it; on_bad_image=skip leaves such images out"
_SHOWN = 10  # warnings of single images; the list has them all


class BadImage(NamedTuple):
    """An image that could not be read."""

    place: str  # source, split, row and, where there is one, path
    reason: str
    number: int = -1  # its place in the part; -1 in a stream

    def error(self) -> BadImageError:
        """What stops the run where no image may be left out."""
        return BadImageError(f"{self.place}: {self.reason}. {REPAIR}")


class BadImages:
    """The images left out so far, each once: at most ``max_share`` of ``n_images``, or of those read where None."""

    def __init__(self, max_share: float, n_images: int | None = None) -> None:
        self.max_share, self.n_images = max_share, n_images
        self.reasons: dict[str, str] = {}  # by place
        self.numbers: set[int] = set()
        self.n_read = 0

    def note(self, bad: list[BadImage], n_read: int) -> None:
        """Record a batch of ``n_read`` images of which ``bad`` could not be read; too many raise BadImageError."""
        self.n_read += n_read
        for place, reason, number in bad:
            if place not in self.reasons:
                self.reasons[place] = reason
                self.numbers.add(number)
                if len(self.reasons) <= _SHOWN:
                    rank_zero_warn(f"left out {place}: {reason}")
        total, n_bad = self.n_images or self.n_read, len(self.reasons)
        if bad and n_bad > self.max_share * total and (self.n_images or self.n_read >= 1000):
            first, reason = next(iter(self.reasons.items()))
            text = f"{n_bad} of {total} images cannot be read, more than max_bad_share={self.max_share:g} allows"
            cure = "Repair or remove them, or set max_bad_share"
            raise BadImageError(f"{text}; the first is {first}: {reason}. {cure}")


class Reader(Protocol):
    """Reads places of a part."""

    part: Part

    def read(self, places: list[int], samples: list[int]) -> tuple[NDArray[Any], dict[int, BadImage]]:
        """Draws as uint8 (B, 3, S, S) pixels or int16 (B, tokens per pixel, S, S), and by index what cannot be read."""


class ImageReader:
    """Decodes and resizes image files; keeps the decoded images of a dataset that has few and small ones."""

    def __init__(self, part: Part, image_column: str, resize: Resize) -> None:
        self.part, self.image_column, self.resize = part, image_column, resize
        self._mode = mode_of(part.dataset, image_column)
        self._images = part.dataset.select_columns([image_column]).with_format("arrow")
        self._kept: dict[int, Image.Image] = {}  # by place

    def read(self, places: list[int], samples: list[int]) -> tuple[NDArray[Any], dict[int, BadImage]]:
        size = self.resize.size
        # One tall picture becomes an array once; an array of every image and a stack take twice as long.
        tall = Image.new("RGB", (size, size * len(places)))
        bad: dict[int, BadImage] = {}
        images = self._decode(places)
        for index, (place, sample) in enumerate(zip(places, samples, strict=True)):
            if isinstance(image := images[place], BadImage):
                bad[index] = image
            else:
                tall.paste(self.resize(image, sample), (0, index * size))
        return np.asarray(tall).reshape(-1, size, size, 3).transpose(0, 3, 1, 2).copy(), bad

    def _decode(self, places: list[int]) -> dict[int, Image.Image | BadImage]:
        images = dict[int, Image.Image | BadImage]()
        images.update((place, self._kept[place]) for place in places if place in self._kept)
        if not (missing := [place for place in dict.fromkeys(places) if place not in images]):
            return images
        rows = self.part.rows_of(missing)
        contents, paths = (column.to_pylist() for column in self._images[rows][self.image_column].flatten())
        for place, row, content, path in zip(missing, rows, contents, paths, strict=True):
            try:
                value = {"bytes": content, "path": path}  # both are None where an image is missing
                image = images[place] = decode(value, mode=self._mode, remote=self.part.remote)
                if 4 * image.width * image.height * len(self.part) <= KEPT_BYTES:
                    self._kept[place] = image
            except BadImageError as error:
                images[place] = BadImage(self.part.describe(row, path), str(error), place)
        return images


class ImageBatches(Dataset[dict[str, Any]]):
    """Batches by lists of (place, sample); with ``replace`` another image of the part replaces an unreadable image."""

    def __init__(
        self,
        reader: Reader,
        *,
        on_bad_image: OnBadImage = "error",
        replace: bool = False,
        seed: int = 0,
        labels: Tensor | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.reader, self.on_bad_image, self.replace, self.seed = reader, on_bad_image, replace, seed
        self.labels, self.augment = labels, augment

    def __len__(self) -> int:
        return len(self.reader.part)

    def __getitem__(self, draws: Sequence[Draw]) -> dict[str, Any]:
        """A batch as ``ImageDataModule`` describes it; BadImageError where an image may not be left out."""
        check_draws(draws)
        places, samples = [place for place, _ in draws], [sample for _, sample in draws]
        grids, bad = self.reader.read(places, samples)
        first = next(iter(bad.values()), None)
        if first is not None and self.on_bad_image == "error":
            raise first.error()
        if first is not None and not self.replace:
            good = [index for index in range(len(places)) if index not in bad]
            if not good:
                none = f"no image of a batch of {len(places)} can be read"
                raise BadImageError(f"{none}; the first is {first.place}: {first.reason}")
            grids, places, samples = grids[good], [places[i] for i in good], [samples[i] for i in good]
        elif first is not None:
            for index in bad:
                places[index], grids[index] = self._stand_in(places[index], samples[index])
        labels = None if self.labels is None else self.labels[places]
        return make_batch(grids, samples, labels, list(bad.values()), self.augment)

    __getitems__ = __getitem__  # what torch calls with the draws of a batch

    def _stand_in(self, place: int, sample: int) -> tuple[int, NDArray[Any]]:
        generator, part = draw_generator(self.seed, place), self.reader.part
        for _ in range(MAX_STAND_INS):
            other = int(generator.integers(len(part)))
            grids, bad = self.reader.read([other], [sample])
            if not bad:
                return other, grids[0]
        raise BadImageError(f"no image of {part.source}, split {part.split!r}, could be read in {MAX_STAND_INS} tries")


def check_draws(draws: Any) -> None:
    """Raise TypeError unless these are draws of one of this package's orders."""
    if not isinstance(draws, list) or not isinstance(draws[0], tuple):
        text = "this dataset is read in its own order; overfit_batches and other samplers do not work with it"
        raise TypeError(f"{text}. To overfit, give a small source and limit_train_batches")


def as_grids(tokens: NDArray[Any], size: int) -> NDArray[Any]:
    """Tokens (B, T) as (B, tokens per pixel, S, S), which crops and mirrors apply to."""
    grids: NDArray[Any] = tokens.reshape(len(tokens), size, size, -1).transpose(0, 3, 1, 2)
    return grids


def make_batch(
    grids: NDArray[Any], samples: Sequence[int], labels: Tensor | None, bad: list[BadImage], augment: Augment | None
) -> dict[str, Any]:
    """Augment what was read and give it the keys that modules read."""
    if augment is not None:
        grids = augment(grids, samples)
    if grids.dtype == np.uint8:
        batch: dict[str, Any] = {"image": torch.from_numpy(np.ascontiguousarray(grids))}
    else:
        batch = {"tokens": torch.from_numpy(np.ascontiguousarray(grids.transpose(0, 2, 3, 1))).flatten(1)}
    batch["sample"] = torch.tensor(samples, dtype=torch.int64, device="cpu")
    if labels is not None:
        batch["label"] = labels
    return batch | {BAD: bad} if bad else batch
