"""Labelled images to extract features from."""

from __future__ import annotations

from lightning_igpt.data.base import ImageDataModule
from lightning_igpt.data.loaders import Loader


class ProbeDataModule(ImageDataModule):
    """Images and labels for ``ProbeModule``, which reads the features of every image once.

    The training loader is neither shuffled nor augmented and leaves nothing out: each image comes exactly once.
    """

    def train_dataloader(self) -> Loader:
        """Every training image once, in order."""
        return self._eval_loader(self._part("train"))
