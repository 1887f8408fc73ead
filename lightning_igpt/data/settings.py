"""How images are read, checked once: what the loaders of every kind of source share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from lightning_igpt.data.bad_images import OnBadImage
from lightning_igpt.lookup import cache_folder

CACHES = ("auto", "memory", "none", "disk")
_LEAST = {"batch_size": 1, "num_workers": 0, "seed": 0, "shuffle_buffer": 1, "val_images": 1, "n_crops": 1}


@dataclass(frozen=True)
class Settings:
    """Options of ``ImageDataModule``, which documents each.

    Raises:
        ValueError: A number is out of its range, or a word is none of the choices.
    """

    batch_size: int
    num_workers: int
    seed: int
    val_fraction: float
    cache: str
    cache_dir: str | None
    on_bad_image: OnBadImage
    max_bad_share: float
    shuffle_buffer: int
    val_images: int
    n_crops: int = 1

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction is {self.val_fraction}; it must be at least 0 and below 1")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"max_bad_share is {self.max_bad_share}; it must lie from 0 to 1")
        for name, choices in (("cache", CACHES), ("on_bad_image", get_args(OnBadImage))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of: {', '.join(choices)}")
        if self.n_crops > 1 and self.cache != "disk":
            raise ValueError(
                f"n_crops is {self.n_crops}, but cache is {self.cache!r}: only cache=disk keeps crops; without it "
                "every pass draws new ones"
            )

    @property
    def token_folder(self) -> Path:
        """Where token caches are kept."""
        return Path(self.cache_dir).expanduser() if self.cache_dir else cache_folder() / "tokens"
