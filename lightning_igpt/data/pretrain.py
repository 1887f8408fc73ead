"""Images to pretrain on."""

from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info

from lightning_igpt.data.datamodule import ImageDataModule
from lightning_igpt.data.options import check
from lightning_igpt.data.sources import ImageSource
from lightning_igpt.data.transforms import RandomCrop, Resize


class PretrainDataModule(ImageDataModule):
    """Images for ``PretrainModule``; labels are not needed.

    Large images, whose shorter side is at least twice ``image_size``, are cropped at random as in the paper (section
    3.1: a square of 58% to 88% of the shorter side); smaller ones are only resized. Validation takes the center.

    Args:
        source: "digits" or "emoji" (embedded), a hub id "owner/name", or a file or folder; see ``ImageDataModule``.
        random_crop: Crop large training images at random; false takes the center, as in evaluation.
        n_crops: With cache=disk: random squares kept of each training image, one for each pass in turn; 1 keeps the
            center.
        **common: The other options of ``ImageDataModule``.
    """

    needs_labels: ClassVar[bool] = False
    random_crop = True

    def __init__(
        self, source: ImageSource = "digits", *, random_crop: bool = True, n_crops: int = 1, **common: Any
    ) -> None:
        super().__init__(source, **common)
        self.random_crop, self.n_crops = random_crop, n_crops
        check(self)

    def training_resize(self) -> Resize:
        crops = self.random_crop and (self.cache != "disk" or self.n_crops > 1)
        if self.random_crop and not crops:
            rank_zero_info("cache=disk keeps the center of large images; n_crops=10 keeps ten random squares of each")
        return RandomCrop(self._size(), self.seed, self.resize_filter) if crops else super().training_resize()
