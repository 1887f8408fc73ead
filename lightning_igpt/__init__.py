"""Image GPT as a component for PyTorch Lightning and Hugging Face datasets.

Public names are loaded when they are first used, so that ``import lightning_igpt`` costs milliseconds.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "config": ["ImageGPTConfig", "PRESETS"],
    "palette": ["Palette"],
    "kmeans": ["fit_palette"],
    "model": ["ImageGPT", "KVCache"],
    "sampling": ["complete", "inpaint", "score"],
    "weights": ["ModelCard", "load_pretrained", "push_to_hub", "save_pretrained"],
    "modules": ["PretrainModule", "ProbeModule", "FineTuneModule"],
    "data": ["PretrainDataModule", "ProbeDataModule", "FineTuneDataModule", "tokenize"],
    "checkpointing": ["find_checkpoint"],
    "trainer": ["make_trainer"],
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]

if TYPE_CHECKING:
    from lightning_igpt.checkpointing import find_checkpoint as find_checkpoint
    from lightning_igpt.config import PRESETS as PRESETS
    from lightning_igpt.config import ImageGPTConfig as ImageGPTConfig
    from lightning_igpt.data import FineTuneDataModule as FineTuneDataModule
    from lightning_igpt.data import PretrainDataModule as PretrainDataModule
    from lightning_igpt.data import ProbeDataModule as ProbeDataModule
    from lightning_igpt.data import tokenize as tokenize
    from lightning_igpt.kmeans import fit_palette as fit_palette
    from lightning_igpt.model import ImageGPT as ImageGPT
    from lightning_igpt.model import KVCache as KVCache
    from lightning_igpt.modules import FineTuneModule as FineTuneModule
    from lightning_igpt.modules import PretrainModule as PretrainModule
    from lightning_igpt.modules import ProbeModule as ProbeModule
    from lightning_igpt.palette import Palette as Palette
    from lightning_igpt.sampling import complete as complete
    from lightning_igpt.sampling import inpaint as inpaint
    from lightning_igpt.sampling import score as score
    from lightning_igpt.trainer import make_trainer as make_trainer
    from lightning_igpt.weights import ModelCard as ModelCard
    from lightning_igpt.weights import load_pretrained as load_pretrained
    from lightning_igpt.weights import push_to_hub as push_to_hub
    from lightning_igpt.weights import save_pretrained as save_pretrained


def _name_classes() -> None:
    """Import the classes that options of LightningCLI name, if it is there: it knows short names of these alone."""
    if "lightning.pytorch.cli" in sys.modules:
        for home in ("callbacks", "data", "modules"):
            importlib.import_module(f"lightning_igpt.{home}")


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lightning_igpt' has no attribute {name!r}")
    _name_classes()
    value = getattr(importlib.import_module(f"lightning_igpt.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME_OF])


_name_classes()
