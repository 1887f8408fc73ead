"""Labelled images to extract features from."""

from typing import Any

from lightning_igpt.data.datamodule import ImageDataModule
from lightning_igpt.data.loaders import Loader
from lightning_igpt.data.sources import ImageSource


class ProbeDataModule(ImageDataModule):
    """Images and labels for ``ProbeModule``, never augmented.

    Args:
        source: "digits" or "emoji" (embedded), a hub id "owner/name", or a file or folder; see ``ImageDataModule``.
        shuffle: For ``solver=sgd``: shuffled batches in an endless order. The default, for L-BFGS, reads
            every image exactly once, in order.
        **common: The other options of ``ImageDataModule``.
    """

    def __init__(self, source: ImageSource = "digits", *, shuffle: bool = False, **common: Any) -> None:
        super().__init__(source, **common)
        self.shuffle = shuffle

    def train_dataloader(self) -> Loader:
        return super().train_dataloader() if self.shuffle else self.eval_loader("train")
