from collections import Counter

import numpy as np
from sklearn.datasets import load_digits as load_from_sklearn

from lightning_igpt.data.embedded import load_digits


def as_rows(split):
    return [(np.asarray(row["image"]).tobytes(), row["label"]) for row in split]


def test_digits_are_scikit_learns_in_bytes():
    digits = load_digits()
    assert {name: len(split) for name, split in digits.items()} == {"train": 1437, "test": 360}
    assert digits["train"].features["label"].names == [str(i) for i in range(10)]
    assert digits["train"][0]["image"].mode == "L"
    original = load_from_sklearn()
    as_bytes = np.array([0, 16, 32, 48, 64, 80, 96, 112, 128, 143, 159, 175, 191, 207, 223, 239, 255], dtype=np.uint8)
    wanted = Counter(
        (as_bytes[image.astype(int)].tobytes(), int(label))
        for image, label in zip(original.images, original.target, strict=True)
    )
    assert Counter(as_rows(digits["train"]) + as_rows(digits["test"])) == wanted
