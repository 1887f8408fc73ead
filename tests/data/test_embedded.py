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
TRAIN = (138, 1794, 133, 105, 176, 70, 201, 183, 217)
TEST = (31, 467, 26, 26, 42, 15, 63, 41, 53)
NEAREST = 20.0  # root mean square difference of the nearest pair across the splits, of 255; it is 20.09


@pytest.fixture(scope="module")
def pixels():
    return {
        name: np.stack([np.asarray(row["image"]) for row in split]).astype(np.float32)
        for name, split in load_emoji().items()
    }


def test_emoji_are_of_all_groups_in_both_splits(pixels):
    for name, counts in (("train", TRAIN), ("test", TEST)):
        split = load_emoji()[name]
        assert split.features["label"].names == GROUPS.split(",")
        assert np.bincount(split["label"]).tolist() == list(counts)
        assert pixels[name].shape == (sum(counts), 32, 32, 3) and (pixels[name][:, 0, 0] == 255).mean() > 0.8
        assert len(set(split["label"][:16])) > 3, "the rows are in the order of the groups"
    split = load_emoji()["train"]
    row = split[list(split["emoji"]).index("\N{AVOCADO}")]
    assert (row["name"], row["label"], row["image"].size, row["image"].mode) == ("avocado", 3, (32, 32), "RGB")
    assert load_emoji()["train"] is split, "read once for each process"


def test_variants_of_an_emoji_are_in_one_split():
    """By the characters alone: without skin tone, gender, direction, hair; man, woman and person are the same."""
    drop = str.maketrans("\U0001f468\U0001f469", "\U0001f9d1\U0001f9d1", "\u200d\u2640\u2642\ufe0f\u27a1")
    drop |= {code: None for code in (*range(0x1F3FB, 0x1F400), *range(0x1F9B0, 0x1F9B4))}
    bases = {name: {text.translate(drop) or text for text in split["emoji"]} for name, split in load_emoji().items()}
    assert not bases["train"] & bases["test"] and len(bases["test"]) > 300
    assert not set(load_emoji()["train"]["variants_of"]) & set(load_emoji()["test"]["variants_of"])


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
    data = cls("emoji", seed=seed, image_size=16)
    data.setup("fit")
    rows = {role: part.rows for role, part in data.parts.items() if role != "test"}
    assert sorted(np.concatenate([*rows.values()])) == list(range(sum(TRAIN))) and 290 <= len(rows["val"]) <= 302
    groups = np.array(load_emoji()["train"]["variants_of"])
    assert not set(groups[rows["train"]]) & set(groups[rows["val"]])
    labels = data.parts["val"].labels(data.opened)
    assert len(labels.unique()) == 9


def test_a_stream_keeps_variants_together():
    data = PretrainDataModule("emoji", image_size=16, streaming=True, batch_size=64)
    data.setup("fit")
    parts = {role: data._stream_part(role, False).rows for role in ("train", "val")}
    groups = {role: {row["variants_of"] for row in rows} for role, rows in parts.items()}
    assert not groups["train"] & groups["val"] and len(groups["val"]) > 60
