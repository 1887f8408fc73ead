import io
import shutil
import tarfile

import datasets
import pytest
from datasets import Features, Value

from lightning_igpt.data import PretrainDataModule, tokenize
from lightning_igpt.data.sources import open_source
from lightning_igpt.images import BadImageError
from lightning_igpt.palette import Palette
from tests.data.test_datamodule import ready
from tests.image_files import encoded, noise, picture, rows, save_images, tiny


def shape(source):
    return {name: len(split) for name, split in source.splits.items()}


def first_bytes(source, split="train"):
    return source.splits[split][0][source.image_column]["bytes"]


def test_in_memory():
    dataset = tiny(6)
    source = open_source(dataset)
    assert shape(source) == {"train": 6} and first_bytes(source) == encoded(picture(0))
    assert "6 rows" in source.name and source.labels("train").tolist() == [0, 1, 0, 1, 0, 1]
    both = open_source(datasets.DatasetDict(train=dataset, test=dataset.select([1])))
    assert shape(both) == {"train": 6, "test": 1} and first_bytes(both, "test") == encoded(picture(1))
    assert dataset.features["image"].decode  # the caller's dataset is as it was


def test_image_folder_with_metadata(tmp_path):
    save_images(tmp_path, ["1.png", "2.png"])
    (tmp_path / "metadata.csv").write_text("file_name,kind\n1.png,dog\n2.png,cat\n")
    source = open_source(str(tmp_path), label_column="kind")
    assert source.class_names == ["cat", "dog"] and sorted(source.labels("train").tolist()) == [0, 1]


@pytest.mark.parametrize("missing", ["./cifar", "../cifar", "a/b/c", "/no/such", "a/b.parquet", "two words"])
def test_missing_paths_are_called_paths(missing):
    with pytest.raises(FileNotFoundError, match=r"no file or folder") as caught:
        open_source(missing)
    assert missing in str(caught.value) and "hub" not in str(caught.value)


def written(path):
    path.parent.mkdir()
    path.write_bytes(b"x")
    return path


def test_other_sources_that_are_nothing(tmp_path):
    written(tmp_path / "notes" / "notes.txt")
    written(tmp_path / "one" / "a.JPG")
    written(tmp_path / "phone" / "b.HEIC")
    save_images(tmp_path / "both", ["1.png", "2.png"])
    tiny(1).to_parquet(tmp_path / "both/3.parquet")
    for source, error, message in (
        ("cifar10", ValueError, r"'cifar10'.* called 'owner/name'"),
        (tmp_path / "notes", ValueError, r"holds no images"),
        (tmp_path / "notes/notes.txt", ValueError, r"is no Parquet file, Arrow file or"),
        (tmp_path / "one/a.JPG", ValueError, r"a\.JPG is a single image; give the folder"),
        (tmp_path / "phone", ValueError, r"phone holds 1 image in formats that are not read \(\.heic\)"),
        (tmp_path / "both", ValueError, r"2 image files and 1 Parquet file"),
        ("/dev/null", ValueError, r"/dev/null is no Parquet file"),
        ("", ValueError, r"source is '': no file or folder of that name is here"),
        ([1, 2], TypeError, r"source is a list"),
        (datasets.DatasetDict(), ValueError, r"no splits"),
        (True, TypeError, r"source is True, .*quote it, as in source: '007'"),
        (2024, TypeError, r"source is 2024, .*quote it, as in source: '007'"),
    ):
        with pytest.raises(error, match=message):
            open_source(source)


def test_image_columns_of_other_types(tmp_path):
    noise().save(tmp_path / "a.png")
    content = encoded(noise())
    values = {
        "raw": (content, Value("binary")),
        "file": (str(tmp_path / "a.png"), Value("string")),
        "both": ({"bytes": content, "path": None}, {"bytes": Value("binary"), "path": Value("string")}),
    }
    dataset = datasets.Dataset.from_dict(
        {name: [value] for name, (value, _) in values.items()},
        features=Features({name: feature for name, (_, feature) in values.items()}),
    )
    with pytest.raises(ValueError, match=r"set image_column"):
        open_source(dataset)
    for name, key in (("raw", "bytes"), ("both", "bytes"), ("file", "path")):
        row = open_source(dataset, image_column=name).splits["train"][0][name]
        assert row[key] == (content if key == "bytes" else str(tmp_path / "a.png"))


def test_train_split_decides_the_classes():
    splits = datasets.DatasetDict(
        small=rows([picture()], [0], names=["bee"]), big=rows([picture()] * 2, [0, 1], names=["ant", "bee"])
    )
    assert open_source(splits, train_split="big").class_names == ["ant", "bee"]
    assert open_source(splits, train_split="big").labels("small").tolist() == [1]


def test_labels_are_optional_until_needed():
    bare = rows([picture()] * 2)
    assert open_source(bare).class_names is None
    with pytest.raises(ValueError, match=r"has no labels"):
        open_source(bare).labels("train")
    with pytest.raises(ValueError, match=r"has no labels: .*set label_column"):
        open_source(bare, need_labels=True)
    ids = bare.add_column("label", [7, 10**12])
    assert open_source(ids).label_column is None
    with pytest.raises(ValueError, match=r"numbers up to 1000000000000"):
        open_source(ids, need_labels=True)


def write_tar(path, numbers):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for number in numbers:
            for suffix, content in (("png", encoded(picture(number))), ("cls", str(number % 2).encode())):
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def test_labels_of_webdataset(tmp_path):
    write_tar(tmp_path / "shards" / "train-000.tar", range(6))
    source = open_source(tmp_path / "shards")
    assert source.label_column == "cls" and source.labels("train").tolist() == [0, 1, 0, 1, 0, 1]


def test_tokens_are_a_source(tmp_path):
    palette = Palette.load("gray:8")
    tokenize(tiny(6), palette, size=4).save_to_disk(tmp_path / "typed")
    mapped = tiny(6).map(palette.transform(size=4), batched=True, remove_columns=["image"])
    for given in (tmp_path / "typed", mapped):
        for streaming in (False, True):
            source = open_source(given, streaming=streaming, need_labels=True)
            assert source.tokens == (palette.sha256, 4) and source.image_column == "tokens"
            assert source.label_column == "label" and source.class_names == ["a", "b"]
    with pytest.raises(ValueError, match=r"no column .palette. that names the palette .*lightning_igpt.tokenize"):
        open_source(mapped.remove_columns("palette"))
    with pytest.raises(ValueError, match="has no labels"):
        open_source(mapped.remove_columns("label"), need_labels=True)  # the palette is none
    splits = datasets.DatasetDict(train=tokenize(tiny(4), palette, size=4), test=tokenize(tiny(4), palette, size=2))
    with pytest.raises(ValueError, match=r"different palettes or sizes .*train: .* at 4 pixels, test: .* at 2 pixels"):
        open_source(splits)


def test_streams_of_unknown_columns_are_asked_for_a_row():
    stream = tiny(4).to_iterable_dataset().map(lambda row: row)
    assert open_source(stream).image_column == "image"
    with pytest.raises(ValueError, match="has no rows"):
        open_source(tiny(4).select([]), streaming=True)


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["photos_train", "photos_more"], {"train": [1, 0]}),
        (["train-00000", "test-00000", "Validation_set-0"], {"test": [1], "train": [0], "validation": [2]}),
        (["data/train-00000-of-00001", "data/extra-00000-of-00001"], {"extra": [1], "train": [0]}),
        (["en/train/0", "en/train/1", "en/test/0"], {"test": [2], "train": [0, 1]}),
        (
            ["train-00000", "test-00000", "extra-00000"],
            r"named after splits \(test-0.*, train-0.*\) and others \(extra",
        ),
        (["photos_test", "photos"], r"named after splits \(photos_test\.\w+\) and others \(photos\.\w+\)"),
        (["train/test-0"], r"named after splits \(none\) and others \(train/test-0"),
        (["train/test-0", "train/1"], r"named after splits \(train/1\.\w+\) and others \(train/test-0"),
    ],
)
@pytest.mark.parametrize("kind, place", [("parquet", "set [1]"), ("PARQUET", "b"), ("arrow", "a*b"), ("tar", "a?b")])
def test_every_file_is_read_or_named(place, kind, names, splits, tmp_path):
    (tmp_path / "set 1").mkdir()
    tiny(9).to_parquet(tmp_path / "set 1/train.parquet")  # what the name of another folder means as a pattern
    for number, name in enumerate(names):
        file = tmp_path / place / f"{name}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "tar":
            write_tar(file, [number])
        elif kind.lower() == "parquet":
            tiny(4).select([number]).to_parquet(file)
        else:
            tiny(4).select([number]).save_to_disk(tmp_path / "saved")
            shutil.copy(tmp_path / "saved/data-00000-of-00001.arrow", file)
    if isinstance(splits, str):
        with pytest.raises(ValueError, match=splits):
            open_source(tmp_path / place)
        return
    for streaming in (False, True):
        source = open_source(tmp_path / place, streaming=streaming)
        found = {split: [row[source.image_column]["bytes"] for row in rows] for split, rows in source.splits.items()}
        assert found == {split: [encoded(picture(number)) for number in rows] for split, rows in splits.items()}
        single = open_source(tmp_path / place / f"{names[0]}.{kind}", streaming=streaming)
        assert len(list(single.splits["train"])) == 1 and single.streaming == streaming


def test_names_that_datasets_cannot_read(tmp_path, monkeypatch):
    monkeypatch.setenv("ELSEWHERE", str(tmp_path))
    for name in ("a::b", "$ELSEWHERE", "caf\udce9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.parquet").touch()
        with pytest.raises(ValueError, match=r"datasets cannot read .*rename it"):
            open_source(tmp_path / name)


def test_saved_data_sets_in_folders_of_splits(tmp_path):
    for split, n in (("train", 4), ("val", 2)):
        tiny(n).save_to_disk(tmp_path / "root" / split)
    assert shape(open_source(tmp_path / "root")) == {"train": 4, "val": 2}
    save_images(tmp_path / "root", ["train.png"])
    with pytest.warns(UserWarning, match=r"root holds datasets written by save_to_disk, and train\.png, left out"):
        assert open_source(tmp_path / "root", streaming=True).splits.keys() == {"train", "val"}
    tiny(1).save_to_disk(tmp_path / "root/more")
    with pytest.raises(ValueError, match=r"named after splits \(train, val\) and others \(more/\)"):
        open_source(tmp_path / "root")


def test_images_tables_and_tars_of_img2dataset(tmp_path):
    write_tar(tmp_path / "00000.tar", [0, 1])
    tiny(2).remove_columns("image").to_parquet(tmp_path / "00000.parquet")
    assert shape(open_source(tmp_path)) == {"train": 2}


def test_names_are_shown_with_escapes(tmp_path):
    """A name must not move the cursor, color the screen or end the line."""
    place = tmp_path / "a\x1b[31m\n"
    save_images(place, ["train/1.png", "b\x1b[2J/2.png"])
    for source, error in ((place, ValueError), (place / "no/file/here", FileNotFoundError)):
        with pytest.raises(error, match=r"a\\x1b\[31m\\n") as caught:
            open_source(source)
        assert str(caught.value).isprintable()
    written(tmp_path / "set\x1b" / "x\x1b.png")
    data = ready(PretrainDataModule, tmp_path / "set\x1b", val_fraction=0, batch_size=1)
    with pytest.raises(BadImageError, match=r"set\\x1b, split 'train', row 0 \(.*set\\x1b/x\\x1b\.png\)") as caught:
        list(data.train_dataloader())
    assert str(caught.value).isprintable()
