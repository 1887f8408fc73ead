"""Images for every protocol, as LightningDataModules over Hugging Face ``datasets``.

A batch is ``{"image": uint8 (B, 3, H, W), "sample": int64 (B,), "label": int64 (B,)}``; ``label`` is there when the
source has labels. The modules know these keys and nothing else of this package.
"""

from lightning_igpt.data.finetune import FineTuneDataModule
from lightning_igpt.data.pretrain import PretrainDataModule
from lightning_igpt.data.probe import ProbeDataModule
from lightning_igpt.data.tokens import tokenize

__all__ = ["FineTuneDataModule", "PretrainDataModule", "ProbeDataModule", "tokenize"]
