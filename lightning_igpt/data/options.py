"""Ranges of the options of a data module."""

from numbers import Integral
from typing import Any, Literal, get_args

from lightning_igpt.data.readers import OnBadImage
from lightning_igpt.images import Filter

Cache = Literal["none", "disk", "auto", "memory"]
_LEAST = dict.fromkeys(("batch_size", "image_size", "n_crops", "shuffle_buffer", "val_images"), 1)
_LEAST |= dict.fromkeys(("num_workers", "pad", "seed"), 0)


def check(data: Any) -> None:
    """Raise ValueError where an option of a data module is out of range."""
    for name, least in _LEAST.items():
        integer = isinstance(value := getattr(data, name, least), Integral)
        if (value is not None or name != "image_size") and (not integer or value < least):
            raise ValueError(f"{name} is {value!r}; it must be {'' if integer else 'an integer and '}at least {least}")
        if integer and type(value) is not int:  # NumPy's, which torch refuses
            setattr(data, name, int(value))
    if not 0 <= data.val_fraction < 1:
        raise ValueError(f"val_fraction is {data.val_fraction}; it must be at least 0 and below 1")
    if not 0 <= data.max_bad_share <= 1:
        raise ValueError(f"max_bad_share is {data.max_bad_share}; it must lie from 0 to 1")
    for name, kind in {"cache": Cache, "on_bad_image": OnBadImage, "resize": Filter}.items():
        if (value := getattr(data, name)) not in get_args(kind) and not (name == "resize" and value is None):
            raise ValueError(f"{name} is {value!r}; it must be one of: {', '.join(get_args(kind))}")
    if data.n_crops > 1 and not (data.random_crop and data.cache == "disk"):
        text = f"n_crops is {data.n_crops}, but random_crop is {data.random_crop} and cache is {data.cache!r}"
        raise ValueError(f"{text}; set random_crop=True and cache=disk, or n_crops=1")
