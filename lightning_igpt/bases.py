"""Base classes for both Trainers, ``lightning``'s and ``pytorch_lightning``'s: each refuses the other's classes."""

import sys
from typing import Any

from lightning import pytorch


class _Both:
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        _inherit(cls)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "trainer":
            _inherit(type(self), value)
        super().__setattr__(name, value)


class LightningModule(_Both, pytorch.LightningModule):
    """A module of ``lightning``, and of ``pytorch_lightning`` where that was imported before."""


class LightningDataModule(_Both, pytorch.LightningDataModule):
    """A data module of ``lightning``, and of ``pytorch_lightning`` where that was imported before."""


def _inherit(cls: type, trainer: Any = None) -> None:
    """Add pytorch_lightning's base class, and put that of the trainer's package first: hooks are compared with its."""
    ours = LightningModule if issubclass(cls, LightningModule) else LightningDataModule
    packages: list[Any] = [pytorch, sys.modules.get("pytorch_lightning")]
    trainers = {getattr(package, ours.__name__): package.Trainer for package in packages if hasattr(package, "Trainer")}
    bases = sorted(trainers, key=[*ours.__bases__, *trainers].index)
    bases.sort(key=lambda base: not isinstance(trainer, trainers[base]))
    if (_Both, *bases) != ours.__bases__:  # a class that changes loses its caches
        ours.__bases__ = (_Both, *bases)


for _kind in (LightningModule, LightningDataModule):
    _inherit(_kind)  # for LightningCLI, which looks at classes


def is_model_parallel(strategy: Any) -> bool:
    """Whether a strategy is the ModelParallelStrategy of one of the packages."""
    return "ModelParallelStrategy" in [kind.__name__ for kind in type(strategy).__mro__]
