from pathlib import Path

import pytest

from lightning_igpt.data.folders import list_files, open_image_folder
from lightning_igpt.data.images import SUFFIXES

from .helpers import save_images


def opened(folder):
    """{split: [(path below the folder, class name or None)]}"""
    result = {}
    for split, dataset in open_image_folder(folder).items():
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


def test_classes_only(tmp_path):
    save_images(tmp_path, ["b/1.png", "a/2.png"])
    assert opened(tmp_path) == {"train": [("a/2.png", "a"), ("b/1.png", "b")]}


def test_a_class_may_be_called_train(tmp_path):
    """datasets' own loader takes it for a split and drops the cars."""
    save_images(tmp_path, ["train/1.png", "car/2.png"])
    assert opened(tmp_path) == {"train": [("car/2.png", "car"), ("train/1.png", "train")]}


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


def test_one_folder_around_everything(tmp_path):
    save_images(tmp_path, ["set/v1/train/a/1.png", "set/v1/test/a/2.png"])
    assert set(opened(tmp_path)) == {"train", "test"}


def test_splits_beside_other_images(tmp_path):
    save_images(tmp_path, ["train/1.png", "test/2.png", "extra/3.png"])
    with pytest.raises(ValueError, match=r"named after splits \(test, train\) and other images beside them"):
        open_image_folder(tmp_path)


def test_which_files_count(tmp_path):
    save_images(tmp_path, ["1.PNG", "2.jpeg", "3.webp", ".hidden.png", ".cache/4.png"])
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in list_files(tmp_path, SUFFIXES)] == ["1.PNG", "2.jpeg", "3.webp"]


def test_special_characters_in_paths(tmp_path):
    folder = tmp_path / "my [images] *"
    save_images(folder, ["a b/1.png", "[c]/2.png"])
    assert opened(folder) == {"train": [("[c]/2.png", "[c]"), ("a b/1.png", "a b")]}
