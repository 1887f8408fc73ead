"""The embedded default data: scikit-learn's 8x8 handwritten digits (UCI Optdigits, test part).

It needs no network and no disk, so that every example and test can run anywhere.
"""

from __future__ import annotations

import io

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image


def load_digits() -> datasets.DatasetDict:
    """Build the digits in memory.

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
    return datasets.DatasetDict(
        {name: _to_dataset(gray[rows], digits.target[rows]) for name, rows in (("train", train), ("test", test))}
    )


def _to_dataset(gray: NDArray[np.uint8], labels: NDArray[np.int64]) -> datasets.Dataset:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(digit) for digit in range(10)])}
    )
    rows = {"image": [{"bytes": _png(image), "path": None} for image in gray], "label": labels.tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def _png(gray: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(gray).save(buffer, format="PNG")
    return buffer.getvalue()
