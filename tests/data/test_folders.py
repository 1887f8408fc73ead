import os
from pathlib import Path

import pytest

from lightning_igpt.data import PretrainDataModule
from lightning_igpt.data.folders import list_files, open_image_folder, open_path
from lightning_igpt.data.readers import ImageReader
from lightning_igpt.data.sources import open_source
from lightning_igpt.data.splits import Part
from lightning_igpt.data.transforms import CenterCrop
from lightning_igpt.images import SUFFIXES, BadImageError
from tests.data.test_datamodule import ready
from tests.image_files import picture, save_images, tiny


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
    with pytest.warns(UserWarning, match=r"3 images in formats that are not read \(.cr2, .heic\).*convert"):
        assert len(open_path(tmp_path)["train"]) == 2


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["training_set/a/1.png", "training_set/b/2.png", "test_set/a/3.png"], {"train": "ab", "test": "a"}),
        (["train2017/1.png", "val2017/2.png"], {"train": "", "val": ""}),
        (["Training Data/1.png", "Test Data/2.png"], {"train": "", "test": ""}),
        (["TrainImages/1.png", "valset/2.png", "test-1/3.png"], {"train": "", "val": "", "test": ""}),
        ([f"tt_{split}/tt_{split}/{name}" for split in ("train", "test") for name in ("a/1.png", "b/2.png")],
         {"train": "ab", "test": "ab"}),
        (["tt/Training/1.png", "tt/TESTING/2.png", "tt/Evaluation/3.png", "tt/dev/4.png"],
         {"train": "", "test": "", "validation": "", "dev": ""}),
        (["trn/1.png", "validate/2.png", "tst/3.png"], {"train": "", "validation": "", "test": ""}),
        (["my_training_photos/a/1.png", "my_training_photos/b/2.png"], {"train": "ab"}),
        (["crash test/1.png", "car/2.png"], {"train": ["car", "crash test"]}),
        (["bullet train/1.png", "test tube/1.png", "car/2.png"], {"train": ["bullet train", "car", "test tube"]}),
    ],
)  # fmt: skip
def test_words_in_the_names_of_folders(tmp_path, names, splits):
    found = open_image_folder(save_images(tmp_path, names), list_files(tmp_path, SUFFIXES))
    classes = {split: part.features["label"].names if "label" in part.features else [] for split, part in found.items()}
    assert classes == {split: list(names) for split, names in splits.items()}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bullet train/1.png", "test tube/2.png"], r"\(bullet train, test tube\) may be splits or classes"),
        (["crash test/1.png", "road test/2.png"], r"may be splits or classes; name splits train"),
        (["seg_train/1.png", "seg_test/2.png", "seg_pred/3.png"], r"\(seg_test, seg_train\) and .* \(seg_pred/\)"),
        (["train/1.png", "training/2.png", "test/3.png"], r"folders for one split \(test, train, training\); merge"),
        (["train2014/1.png", "train2017/2.png", "val2017/3.png"], r"several folders for one split"),
        (["cat/train/1.png", "cat/test/2.png", "dog/train/3.png"], r"inside other folders \(cat, dog\).*outermost"),
        (["train/1.png", "test/2.png", "extra/3.png"], r"\(test, train\) and others \(extra/\)"),
        (["1.png", "2.png", "test/3.png"], r"\(test\) and .* \(1.png, 2.png\).*move the others into train/"),
        (["Eval/1.png", "car/2.png", "dog/3.png"], r"\(car/, dog/\); if Eval .*class, rename it"),
        (["set/val/1.png", *(f"set/{i}/1.png" for i in range(8))], r"set has .*\(0/, 1/, 2/, 3/, 4/ and 3 more\)"),
        (["cat/train_images/1.png", "cat/test_images/2.png", "dog/train_images/3.png"], "splits inside other folders"),
    ],
)
def test_folders_with_two_readings(tmp_path, names, message):
    save_images(tmp_path, names)
    with pytest.raises(ValueError, match=message):
        open_path(tmp_path)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())


def test_metadata(tmp_path):
    """It adds columns, and says which images there are; class folders keep their labels."""
    save_images(tmp_path, ["train/cat/1.png", "train/dog/test-2.png", "train/dog/3.png", "test/cat/4.png"])
    write(tmp_path / "train/metadata.csv", "\ufefffile_name,text,kind\ncat/1.png,née,None\ndog/test-2.png,,a\n")
    with pytest.warns(UserWarning, match=r"left out 1 image without metadata, such as .*train/dog/3\.png"):
        found = open_path(tmp_path)
    train = found["train"].remove_columns("image").to_dict()
    assert train == {"text": ["née", None], "kind": ["None", "a"], "label": [0, 1]} and len(found["test"]) == 1
    write(tmp_path / "train/metadata.jsonl", '{"file_name": "dog/3.png", "label": 7, "text": "x"}\n')
    assert open_path(tmp_path)["train"]["label"] == [None, 7, None]
    write(tmp_path / "test/metadata.csv", "file_name,a\nno.png,1\n")
    with pytest.raises(ValueError, match=r"names .*test/no\.png, but there is no such image"):
        open_path(tmp_path)
    write(tmp_path / "test/metadata.csv", b"file_name,a\n\xe9.png,1\n")
    with pytest.raises(ValueError, match=r"test/metadata\.csv cannot be read: .*utf-8.*; repair or rename it"):
        open_path(tmp_path)


def test_foreign_metadata_and_tables_of_img2dataset_say_nothing(tmp_path):
    save_images(tmp_path / "set", ["00000/1.png", "00000/2.png"])
    write(tmp_path / "set/metadata.csv", "camera,year\nx,2024\n")
    tiny(2).to_parquet(tmp_path / "set/00000.parquet")
    with pytest.warns(UserWarning, match=r"set/metadata\.csv is left out: its columns camera, year have no file_name"):
        assert len(open_path(tmp_path / "set")["train"]) == 2


def test_names_that_are_not_utf8_and_pipes(tmp_path):
    folder = os.fsencode(tmp_path / "set/caf") + b"\xe9"
    os.makedirs(folder)
    for number, name in enumerate((b"\xff 1%.png", b"2.png")):
        picture(number).save(os.fsdecode(os.path.join(folder, name)))
    save_images(tmp_path, ["set/b/3.png"])
    source = open_source(tmp_path / "set")
    assert source.class_names == ["b", "caf\\udce9"]
    part = Part("S", "train", source.splits["train"])
    pixels, bad = ImageReader(part, "image", CenterCrop(4)).read([0, 1, 2], [0, 1, 2])
    assert sorted(pixels[:, 0, 0, 0].tolist()) == [0, 0, 1] and not bad
    os.mkfifo(tmp_path / "set/b/4.png")
    with pytest.raises(BadImageError, match=r"row 1 \(.*b/4\.png\): this is a folder, a pipe or a device"):
        list(ready(PretrainDataModule, tmp_path / "set", val_fraction=0, batch_size=4).train_dataloader())
