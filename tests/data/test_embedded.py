from collections import Counter
from itertools import product

import numpy as np
import pytest
from sklearn.datasets import load_digits as load_from_sklearn

from lightning_igpt import FineTuneDataModule, PretrainDataModule, ProbeDataModule
from lightning_igpt.data.embedded import load_digits, load_emoji


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


GROUPS = (
    "Smileys & Emotion,People & Body,Animals & Nature,Food & Drink,Travel & Places,Activities,Objects,Symbols,Flags"
)
COUNTS = {
    "train": (118, 115, 133, 103, 146, 68, 197, 127, 201),
    "train_variants": (20, 1679, 0, 2, 30, 2, 4, 56, 16),
    "test": (29, 35, 26, 25, 38, 15, 60, 27, 47),
    "test_variants": (2, 432, 0, 1, 4, 0, 3, 14, 6),
}
ALL = {"train_split": "train+train_variants", "test_split": "test+test_variants"}
NEAREST = 20.0  # root mean square difference of the nearest pair across the splits, of 255; it is 20.09


@pytest.fixture(scope="module")
def pixels():
    """All images of training and of test, float32 (N, 32, 32, 3)."""
    rows = {name: [np.asarray(row["image"]) for row in split] for name, split in load_emoji().items()}
    return {part: np.stack(rows[part] + rows[f"{part}_variants"]).astype(np.float32) for part in ("train", "test")}


def test_the_groups_of_emoji(pixels):
    assert list(load_emoji()) == list(COUNTS)
    for name, counts in COUNTS.items():
        split = load_emoji()[name]
        assert split.features["label"].names == GROUPS.split(",")
        assert np.bincount(split["label"], minlength=9).tolist() == list(counts)
        assert (np.equal(split["name"], split["variants_of"]) == ("_variants" not in name)).all()
    assert len(set(load_emoji()["train"]["label"][:16])) > 3, "the rows are in the order of the groups"
    assert pixels["test"].shape == (764, 32, 32, 3) and (pixels["test"][:, 0, 0] == 255).mean() > 0.8
    split = load_emoji()["train"]
    row = split[list(split["emoji"]).index("\N{AVOCADO}")]
    assert (row["name"], row["label"], row["image"].size, row["image"].mode) == ("avocado", 3, (32, 32), "RGB")
    assert load_emoji()["train"] is split, "read once for each process"


def test_variants_of_an_emoji_are_in_one_split():
    """By the characters alone: without skin tone, gender, direction, hair; man, woman and person are the same."""
    drop = str.maketrans("\U0001f468\U0001f469", "\U0001f9d1\U0001f9d1", "\u200d\u2640\u2642\ufe0f\u27a1")
    drop |= {code: None for code in (*range(0x1F3FB, 0x1F400), *range(0x1F9B0, 0x1F9B4))}
    bases = {name: {text.translate(drop) or text for text in split["emoji"]} for name, split in load_emoji().items()}
    train, test = (bases[part] | bases[f"{part}_variants"] for part in ("train", "test"))
    assert not train & test and len(test) > 300
    for part in ("train", "test"):
        assert set(load_emoji()[f"{part}_variants"]["variants_of"]) <= set(load_emoji()[part]["name"])


def test_no_near_copies_across_the_splits(pixels):
    train = pixels["train"].reshape(len(pixels["train"]), -1)
    for k, mirrored in product(range(4), (1, -1)):
        test = np.rot90(pixels["test"], k, (1, 2))[:, :, ::mirrored].reshape(len(pixels["test"]), -1)
        squares = (test**2).sum(1)[:, None] + (train**2).sum(1) - 2 * test @ train.T
        assert np.sqrt(squares.min() / train.shape[1]) > NEAREST
    within = np.unique(pixels["train"].round(), axis=0)
    assert len(train) - len(within) >= 15, "flags and families that look alike, which the split keeps together"


@pytest.mark.parametrize("cls", [PretrainDataModule, ProbeDataModule, FineTuneDataModule])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_hold_out_keeps_variants_together(cls, seed):
    data = cls("emoji", seed=seed, image_size=16, **ALL)
    data.setup("fit")
    rows = {role: part.rows for role, part in data.parts.items() if role != "test"}
    assert sorted(np.concatenate([*rows.values()])) == list(range(3017)) and 290 <= len(rows["val"]) <= 302
    groups = np.array([name for split in ("train", "train_variants") for name in load_emoji()[split]["variants_of"]])
    assert not set(groups[rows["train"]]) & set(groups[rows["val"]])
    labels = data.parts["val"].labels(data.opened)
    assert len(labels.unique()) == 9


def test_a_stream_keeps_variants_together():
    data = PretrainDataModule("emoji", image_size=16, streaming=True, batch_size=64, train_split="train_variants")
    data.setup("fit")
    parts = {role: data._stream_part(role, False, data.training_resize()).rows for role in ("train", "val")}
    groups = {role: {row["variants_of"] for row in rows} for role, rows in parts.items()}
    assert not groups["train"] & groups["val"] and len(groups["val"]) >= 10
