"""Images to pretrain on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from lightning_igpt.data.base import ImageDataModule
from lightning_igpt.data.sources import ImageSource
from lightning_igpt.data.transforms import RandomCrop, Resize


class PretrainDataModule(ImageDataModule):
    """Images for ``PretrainModule``; labels are not needed.

    Large images, whose shorter side is at least twice ``image_size``, are cropped at random as in the paper (section
    3.1: a square of 58% to 88% of the shorter side); smaller ones are only resized. Validation takes the centre.

    Args:
        source: "digits" (embedded); a hub id "owner/name"; a folder of images, of Parquet or Arrow files, or of
            WebDataset shards; a folder written by save_to_disk; in Python also the objects of datasets. A list is a
            mix. See ``ImageDataModule``.
        random_crop: Crop large training images at random. Off: the centre, as in evaluation.
        n_crops: With cache=disk: random squares kept of each training image, of which every pass takes the next. 1
            keeps the centre.
        **common: The other options of ``ImageDataModule``.
    """

    needs_labels: ClassVar[bool] = False

    def __init__(
        self, source: ImageSource = "digits", *, random_crop: bool = True, n_crops: int = 1, **common: Any
    ) -> None:
        super().__init__(source, **common)
        self.settings = replace(self.settings, n_crops=n_crops)
        if n_crops > 1 and not random_crop:
            raise ValueError(f"n_crops is {n_crops}, but random_crop is off: without it all crops would be the same")
        self.random_crop = random_crop

    def _train_resize(self) -> Resize:
        return RandomCrop(self._size(), self.seed) if self.random_crop else super()._train_resize()
