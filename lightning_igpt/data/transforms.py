"""Resizing, cropping and augmentation (paper, sections 3.1, 3.2 and appendix A), one small class per protocol.

Randomness is counter-based: a draw is decided by (seed, sample) alone, never by workers, ranks or global state.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from lightning_igpt.images import BILINEAR, Filter, cut, resize_center_crop
from lightning_igpt.objectives import counter_uniform

# The paper resizes the shorter side to 256..384 and crops 224. In units of the crop this fits any size.
_SHORTER_SIDE = (256 / 224, 384 / 224)
_AUGMENTATION = 0x5EED_0F_A96  # far from the seeds that people choose


# Maps pixels or tokens (B, C, S, S) and the numbers of their draws to the same shape, at random.
Augment: TypeAlias = Callable[[NDArray[Any], Sequence[int]], NDArray[Any]]


def draw_generator(seed: int, sample: int) -> np.random.Generator:
    """The random numbers of one draw: a pure function of ``seed`` and ``sample``, both 0 or larger."""
    return np.random.Generator(np.random.Philox(key=np.array([seed, sample], dtype=np.uint64)))


@dataclass(frozen=True)
class CenterCrop:
    """Evaluation, probing, fine-tuning: the largest centered square."""

    size: int
    filter: Filter = BILINEAR

    def __call__(self, image: Image.Image, sample: int) -> Image.Image:
        return resize_center_crop(image, self.size, self.filter)


@dataclass(frozen=True)
class RandomCrop:
    """Pretraining: the paper's random crops of large images, the center of small ones.

    A crop is a square of 224/384 to 224/256 of the shorter side, anywhere in the image: the paper resizes that side to
    256..384, crops 224 and resizes again; here the same square is resampled once. Large means that the shorter side is
    at least twice ``size``: even the smallest crop (58%) is then not enlarged.
    """

    size: int
    seed: int = 0
    filter: Filter = BILINEAR

    def __call__(self, image: Image.Image, sample: int) -> Image.Image:
        if min(image.size) < 2 * self.size:
            return resize_center_crop(image, self.size, self.filter)
        generator, (width, height) = draw_generator(self.seed, sample), image.size
        side = min(width, height) / generator.uniform(*_SHORTER_SIDE)
        left, top = generator.random(2) * (width - side, height - side)
        return cut(image, (float(left), float(top)), side=side, size=self.size, resize=self.filter)


# Maps an image and the number of its draw to a size x size image.
Resize: TypeAlias = CenterCrop | RandomCrop


def square(resize: Resize, image: Image.Image, sample: int) -> NDArray[np.uint8]:
    """The pixels of a resized image, uint8 (3, S, S)."""
    pixels: NDArray[np.uint8] = np.asarray(resize(image, sample)).transpose(2, 0, 1)
    return pixels


@dataclass(frozen=True)
class PadCropFlip:
    """The paper's fine-tuning augmentation for CIFAR: pad by reflection, cut anywhere, mirror half of the images.

    ``pad`` pixels, below S, are added on every side. The draws differ from those of masks with the same seed.
    """

    pad: int = 4
    flip: bool = True
    seed: int = 0

    def __call__(self, grids: NDArray[Any], samples: Sequence[int]) -> NDArray[Any]:
        numbers = torch.tensor(samples, device="cpu")
        draws = counter_uniform(numbers, 3, seed=self.seed + _AUGMENTATION).numpy()  # (B, 3)
        starts = (draws[:, :2].T * (2 * self.pad + 1)).astype(np.int64)  # of the cuts, in the padded grid
        n, channels, size, _ = grids.shape
        # Where each row and column of the padded grid comes from; np.pad on the pixels is five times slower.
        last = size - 1
        origin = last - np.abs(last - np.abs(np.arange(-self.pad, size + self.pad)))
        rows, columns = origin[starts[:, :, None] + np.arange(size)]  # (B, S) each
        columns = np.where(self.flip & (draws[:, 2:] < 0.5), columns[:, ::-1], columns)
        places = (rows[:, :, None] * size + columns[:, None, :]).reshape(n, 1, -1)  # (B, 1, S * S)
        return np.take_along_axis(grids.reshape(n, channels, -1), places, axis=2).reshape(grids.shape)
