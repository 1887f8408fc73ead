"""The embedded default data: scikit-learn's 8x8 handwritten digits (UCI Optdigits, test part).

It needs no network and no disk, so that every example and test can run anywhere.
"""

import datasets
import numpy as np
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
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list("0123456789"))})
    splits = datasets.DatasetDict()
    for name, rows in (("train", train), ("test", test)):
        columns = {"image": [Image.fromarray(image) for image in gray[rows]], "label": digits.target[rows].tolist()}
        splits[name] = datasets.Dataset.from_dict(columns, features=features)
    return splits
