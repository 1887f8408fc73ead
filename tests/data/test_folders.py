from pathlib import Path

import pytest

from lightning_igpt.data.folders import list_files, open_image_folder, open_path
from lightning_igpt.images import SUFFIXES
from tests.image_files import save_images


def opened(folder):
    """{split: [(path below the folder, class name or None)]}"""
    result = {}
    for split, dataset in open_image_folder(folder, list_files(folder, SUFFIXES)).items():
        names = dataset.features["label"].names if "label" in dataset.features else None
        result[split] = [
            (Path(row["image"]["path"]).relative_to(folder).as_posix(), names and names[row["label"]])
            for row in dataset
        ]
    return result


def test_splits_and_classes(tmp_path):
    save_images(tmp_path, ["train/b/1.png", "train/a/2.png", "test/b/3.png", "Val/a/deep/4.png"])
    assert opened(tmp_path) == {
        "train": [("train/a/2.png", "a"), ("train/b/1.png", "b")],
        "test": [("test/b/3.png", "b")],
        "val": [("Val/a/deep/4.png", "a")],
    }


@pytest.mark.parametrize(
    ("folder", "split"),
    [("Training", "train"), ("TESTING", "test"), ("eval", "validation"), ("Evaluation", "validation"), ("dev", "dev")],
)
def test_names_of_splits(tmp_path, folder, split):
    other = "Testing" if split == "train" else "Training"
    save_images(tmp_path, [f"tt/{name}/{kind}/1.png" for name in (folder, other) for kind in ("cat", "dog")])
    found = opened(tmp_path)
    assert set(found) == {split, "test" if split == "train" else "train"}
    assert found[split] == [(f"tt/{folder}/{kind}/1.png", kind) for kind in ("cat", "dog")]


def test_two_folders_for_one_split(tmp_path):
    save_images(tmp_path, ["train/1.png", "training/2.png", "test/3.png"])
    with pytest.raises(ValueError, match=r"several folders for one split \(test, train, training\); merge them"):
        open_image_folder(tmp_path, list_files(tmp_path, SUFFIXES))


@pytest.mark.parametrize(
    "names", [["1.png", "2.png"], ["only/1.png"], ["1.png", "a/2.png", "b/3.png"], ["train/1.png", "test/2.png"]]
)
def test_no_labels(tmp_path, names):
    found = opened(save_images(tmp_path, names))
    assert sorted(path for rows in found.values() for path, _ in rows) == sorted(names)
    assert {label for rows in found.values() for _, label in rows} == {None}
    assert set(found) == ({"train", "test"} if "test/2.png" in names else {"train"})


def test_loose_test_images_do_not_take_the_labels_away(tmp_path):
    save_images(tmp_path, ["train/a/1.png", "train/b/2.png", "test/3.png"])
    assert opened(tmp_path) == {
        "train": [("train/a/1.png", "a"), ("train/b/2.png", "b")],
        "test": [("test/3.png", None)],
    }


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/1.png", "test/2.png", "extra/3.png"], r"\(test, train\) and other images next to them \(extra/\)"),
        (["1.png", "2.png", "test/3.png"], r"\(test\) and .* \(1.png, 2.png\).*move the other images into train/"),
        (["Eval/1.png", "car/2.png", "dog/3.png"], r"\(car/, dog/\). Where Eval .*class, rename it or give a Dataset"),
        (["set/val/1.png", *(f"set/{i}/1.png" for i in range(8))], r"set has .*\(0/, 1/, 2/, 3/, 4/ and 3 more\)"),
    ],
)
def test_splits_beside_other_images(tmp_path, names, message):
    save_images(tmp_path, names)
    with pytest.raises(ValueError, match=message):
        open_image_folder(tmp_path, list_files(tmp_path, SUFFIXES))


def test_splits_inside_classes(tmp_path):
    """The test images of such a layout would be trained on."""
    save_images(tmp_path, ["cat/train/1.png", "cat/test/2.png", "dog/train/3.png", "dog/test/4.png"])
    with pytest.raises(ValueError, match=r"splits inside other folders.*outermost"):
        open_image_folder(tmp_path, list_files(tmp_path, SUFFIXES))


def test_links(tmp_path):
    """Folders elsewhere count; a link to a folder already there adds nothing, and takes nothing from it."""
    save_images(tmp_path, ["set/a/1.png", "set/z/2.png", "elsewhere/3.png"])
    (tmp_path / "set/a/up").symlink_to(tmp_path / "set", target_is_directory=True)
    (tmp_path / "set/a/beside").symlink_to(tmp_path / "set/z", target_is_directory=True)
    (tmp_path / "set/b").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert [path.as_posix() for path in list_files(tmp_path / "set", SUFFIXES)] == ["a/1.png", "b/3.png", "z/2.png"]


def test_formats_that_are_not_read(tmp_path):
    save_images(tmp_path, ["set/a/1.png", "set/b/2.png"])
    for name in ("set/a/3.HEIC", "set/b/4.heic", "5.cr2", ".6.svg"):
        (tmp_path / name).touch()
    with pytest.warns(UserWarning, match=r"3 images in formats that are not read \(.cr2, .heic\).*Convert"):
        assert len(open_path(tmp_path)["train"]) == 2
