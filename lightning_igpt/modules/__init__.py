"""The three LightningModules. They know nothing of where images come from."""

from lightning_igpt.modules.finetune import FineTuneModule
from lightning_igpt.modules.pretrain import PretrainModule
from lightning_igpt.modules.probe import ProbeModule

__all__ = ["FineTuneModule", "PretrainModule", "ProbeModule"]
