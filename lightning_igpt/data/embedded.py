"""The datasets that come with the package, by the name that ``source`` takes; they need neither network nor cache."""

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from PIL import Image

from lightning_igpt.data.columns import VARIANTS_COLUMN

_EMOJI = Path(__file__).parents[1] / "assets" / "emoji_data.parquet"


@cache
def load_digits() -> datasets.DatasetDict:
    """Scikit-learn's 8x8 handwritten digits (UCI Optdigits, test part).

    The split is stratified, seeded and fixed. A gray level v of 0..16 becomes the byte ``rint(v * 255 / 16)``.

    Returns:
        Splits ``train`` (1,437 rows) and ``test`` (360 rows) with the features ``image`` (8x8 PNG, mode L) and
        ``label`` (ClassLabel "0" to "9").
    """
    from sklearn.datasets import load_digits as load_from_sklearn
    from sklearn.model_selection import train_test_split

    digits = load_from_sklearn()
    gray = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    train, test = train_test_split(np.arange(len(gray)), test_size=360, stratify=digits.target, random_state=0)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    splits = datasets.DatasetDict()
    for name, rows in (("train", train), ("test", test)):
        columns = {"image": [Image.fromarray(image) for image in gray[rows]], "label": digits.target[rows].tolist()}
        splits[name] = datasets.Dataset.from_dict(columns, features=features)
    return splits


@cache
def load_emoji() -> datasets.DatasetDict:
    """Noto Color Emoji (Google, Apache License 2.0) over white; ``docs/make_emoji.py`` writes the file.

    A hash assigns near-copies together to training or test: variants of an emoji (skin tone, gender, hair, direction,
    color) and images that nearly agree, turned or mirrored. 2,263 of 3,781 images are such variants, most of them of
    people, so they have splits of their own.

    Returns:
        Splits ``train`` (one image of each group), ``train_variants`` (the other images of these groups), ``test`` and
        ``test_variants``, with the features ``image`` (32x32, RGB), ``label`` (ClassLabel of Unicode's nine groups),
        ``name``, ``emoji`` (the characters) and ``variants_of`` (the name of the group's image in ``train`` or
        ``test``).
    """
    table = pq.read_table(_EMOJI)
    names = table.schema.metadata[b"classes"].decode().split("\n")
    text = {name: datasets.Value("string") for name in ("name", "emoji", VARIANTS_COLUMN)}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names), **text})
    splits = datasets.DatasetDict()
    first = pc.equal(table["name"], table[VARIANTS_COLUMN])
    for role, ending in itertools.product(("train", "test"), ("", "_variants")):
        chosen = pc.and_(pc.equal(table["test"], role == "test"), pc.equal(first, not ending))
        columns = table.filter(chosen).select(list(features)).to_pydict()
        columns["image"] = [{"bytes": content, "path": None} for content in columns["image"]]
        splits[role + ending] = datasets.Dataset.from_dict(columns, features=features)
    return splits


EMBEDDED: dict[str, Callable[[], datasets.DatasetDict]] = {"digits": load_digits, "emoji": load_emoji}
