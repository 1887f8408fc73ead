"""Images for every protocol, as LightningDataModules over Hugging Face ``datasets``."""

from lightning_igpt.data.finetune import FineTuneDataModule
from lightning_igpt.data.pretrain import PretrainDataModule
from lightning_igpt.data.probe import ProbeDataModule
from lightning_igpt.data.tokens import tokenize

__all__ = ["FineTuneDataModule", "PretrainDataModule", "ProbeDataModule", "tokenize"]
