"""Labelled images to fine-tune on."""

from typing import Any

from lightning_igpt.data.datamodule import ImageDataModule
from lightning_igpt.data.options import check
from lightning_igpt.data.sources import ImageSource
from lightning_igpt.data.transforms import Augment, PadCropFlip


class FineTuneDataModule(ImageDataModule):
    """Images and labels for ``FineTuneModule``.

    Training images are augmented as the paper does for CIFAR: padded by reflection, cut at random, mirrored with
    probability 1/2. ``pad=0, flip=False`` turns augmentation off. Do not mirror where left and right matter, as in
    digits and text.

    Args:
        source: "digits" or "emoji" (embedded), a hub id "owner/name", or a file or folder; see ``ImageDataModule``.
        pad: Pixels of reflected padding on every side before the random cut; below image_size.
        flip: Mirror left to right at random.
        **common: The other options of ``ImageDataModule``.
    """

    def __init__(self, source: ImageSource = "digits", *, pad: int = 4, flip: bool = True, **common: Any) -> None:
        super().__init__(source, **common)
        self.pad, self.flip = pad, flip
        check(self)

    def augmentation(self) -> Augment | None:
        size = self._size()
        if self.pad >= size:
            raise ValueError(f"pad is {self.pad}, but reflection needs fewer pixels than the image has ({size})")
        return PadCropFlip(self.pad, self.flip, self.seed) if self.pad or self.flip else None
