import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

import lightning_igpt
from lightning_igpt.data.tokenize import TokenMark, is_tokenised, marked_palette, tokenize
from lightning_igpt.images import BadImageError, decode, resize_center_crop
from lightning_igpt.palette import Palette
from tests.image_files import encoded, noise, rows

CORNERS = Palette([[r, g, b] for r in (-1, 1) for g in (-1, 1) for b in (-1, 1)])
MARK = TokenMark(CORNERS.sha256, 8)
SIZES = [(8, 8), (12, 9), (5, 30), (40, 40), (8, 8), (33, 8)]
PICTURES = [noise(size, seed) for seed, size in enumerate(SIZES)]
LABELS = [0, 1, 1, 0, 1, 0]
UINT16 = datasets.Value("uint16")


def by_hand(images, size=8, palette=CORNERS):
    """Tokens of PIL images, one at a time."""
    tokens = []
    for image in images:
        pixels = torch.from_numpy(np.array(resize_center_crop(decode(image), size)))  # (S, S, 3)
        tokens += palette.quantize(pixels.permute(2, 0, 1)[None]).tolist()
    return tokens


TOKENS = by_hand(PICTURES)


@pytest.fixture
def dataset():
    return rows(PICTURES, LABELS).add_column("text", list("abcdef"))


@pytest.fixture
def on_disk(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "images")
    return datasets.load_from_disk(tmp_path / "images")


@pytest.fixture
def tokenised(dataset):
    return tokenize(dataset, CORNERS, size=8)


def with_palette_column(values, feature=None):
    features = {"tokens": datasets.List(UINT16, length=4), "palette": feature or datasets.Value("string")}
    columns = {"tokens": [[0, 1, 2, 3]] * len(values), "palette": values}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


# Tokenising


def test_images_become_tokens(dataset, tokenised):
    assert tokenised.features == {
        "label": dataset.features["label"],
        "text": dataset.features["text"],
        "tokens": datasets.List(UINT16, length=64),
        "palette": datasets.ClassLabel(names=[CORNERS.sha256]),
    }
    assert tokenised["tokens"][:] == TOKENS
    assert tokenised["label"][:] == LABELS
    assert tokenised["text"][:] == list("abcdef")
    assert tokenised["palette"][:] == [0] * 6
    assert tokenised.data.schema.field("tokens").type.list_size == 64
    assert "8 x 8 pixels" in tokenised.info.description
    assert CORNERS.sha256 in tokenised.info.description
    assert dataset.info.description == ""
    assert marked_palette(tokenised) == marked_palette(tokenised.features) == MARK


def test_it_is_public_and_has_defaults(dataset):
    assert lightning_igpt.tokenize is tokenize
    tokenised = lightning_igpt.tokenize(dataset.select([1]))
    assert tokenised["tokens"][:] == by_hand(PICTURES[1:2], 32, Palette.load("openai"))
    assert marked_palette(tokenised) == (Palette.load("openai").sha256, 32)


def test_several_splits(dataset):
    splits = datasets.DatasetDict(train=dataset.select([0, 1, 2, 3]), test=dataset.select([4, 5]))
    tokenised = tokenize(splits, "gray:8", size=4)
    assert isinstance(tokenised, datasets.DatasetDict)
    for split, pictures in [("train", PICTURES[:4]), ("test", PICTURES[4:])]:
        assert tokenised[split]["tokens"][:] == by_hand(pictures, 4, Palette.load("gray:8"))
        assert tokenised[split]["label"][:] == splits[split]["label"][:]


def test_an_empty_split_has_the_same_columns(dataset, tokenised):
    splits = tokenize(datasets.DatasetDict(train=dataset, test=dataset.select([])), CORNERS, size=8)
    assert splits["test"].features == splits["train"].features == tokenised.features
    assert len(splits["test"]) == 0


def test_our_own_rules_decode(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = Image.fromarray(np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8))
    files = [encoded(deep), encoded(noise((8, 8)), "PNG", exif=exif), encoded(Image.new("RGBA", (8, 8)))]
    features = datasets.Features({"image": datasets.Image()})
    columns = {"image": [{"bytes": content, "path": None} for content in files]}
    tokens = tokenize(datasets.Dataset.from_dict(columns, features=features), CORNERS, size=8)["tokens"][:]
    white = Image.new("RGB", (8, 8), "white")
    assert tokens == by_hand([deep, noise((8, 8)).transpose(Image.Transpose.ROTATE_270), white])
    assert len({*tokens[0]}) == 2


def test_paths_and_bytes_in_a_named_column(tmp_path):
    noise().save(tmp_path / "a.png")
    for value in (str(tmp_path / "a.png"), encoded(noise())):
        tokenised = tokenize(datasets.Dataset.from_dict({"file": [value]}), CORNERS, size=8, image_column="file")
        assert tokenised.column_names == ["tokens", "palette"]
        assert tokenised["tokens"][:] == by_hand([noise()])


def test_formats_do_not_matter(dataset, tokenised):
    for formatted in (dataset.with_format("torch"), dataset.with_transform(CORNERS.transform(size=3))):
        assert tokenize(formatted, CORNERS, size=8)[:] == tokenised[:]


def test_streams(dataset, tokenised):
    stream = tokenize(dataset.to_iterable_dataset(), CORNERS, size=8, batch_size=4)
    assert stream.features == tokenised.features
    assert [row["tokens"].tolist() for row in stream] == TOKENS
    assert marked_palette(stream) == MARK
    kept = datasets.Dataset.from_generator(lambda: iter(stream), features=stream.features)
    assert kept[:] == tokenised[:]
    splits = tokenize(datasets.IterableDatasetDict(train=dataset.to_iterable_dataset()), CORNERS, size=8)
    assert next(iter(splits["train"]))["tokens"].tolist() == TOKENS[0]


# Files and the cache


def test_files_keep_everything(tokenised, tmp_path):
    tokenised.save_to_disk(tmp_path / "saved")
    tokenised.to_parquet(tmp_path / "a.parquet")
    saved = datasets.load_from_disk(tmp_path / "saved")
    parquet = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train")
    for loaded in (saved, parquet):
        assert loaded.features == tokenised.features
        assert loaded[:] == tokenised[:]
        assert marked_palette(loaded) == MARK
    assert saved.info.description == tokenised.info.description


def test_splits_on_disk(dataset, tmp_path):
    splits = tokenize(datasets.DatasetDict(train=dataset, test=dataset.select([2])), CORNERS, size=8)
    splits.save_to_disk(tmp_path / "saved")
    loaded = datasets.load_from_disk(tmp_path / "saved")
    assert {split: marked_palette(part) for split, part in loaded.items()} == {"train": MARK, "test": MARK}


def test_parts_can_be_joined_when_their_palette_is_one(dataset, tokenised):
    joined = datasets.concatenate_datasets([tokenised, tokenize(dataset.select([3, 1]), CORNERS, size=8)])
    assert joined["tokens"][:] == [*TOKENS, TOKENS[3], TOKENS[1]]
    assert marked_palette(joined) == MARK
    for other in (tokenize(dataset, "gray:8", size=8), tokenize(dataset, CORNERS, size=7)):
        with pytest.raises(ValueError, match="can't be aligned"):
            datasets.concatenate_datasets([tokenised, other])


def test_a_second_call_reads_the_cache(on_disk, monkeypatch):
    first = tokenize(on_disk, CORNERS, size=8)
    assert first.cache_files
    with monkeypatch.context() as patch:
        patch.setattr("lightning_igpt.images.decode", None)  # whatever decodes fails
        second = tokenize(on_disk, Palette(CORNERS.to_list()), size=8)
        assert tokenize(on_disk, CORNERS, size=8, num_proc=2).cache_files == first.cache_files
    assert second.cache_files == first.cache_files
    assert second._fingerprint == first._fingerprint
    assert second[:] == first[:]
    assert second.info.description == first.info.description
    others = [tokenize(on_disk, "gray:8", size=8), tokenize(on_disk, CORNERS, size=7)]
    assert len({part.cache_files[0]["filename"] for part in (first, *others)}) == 3


@pytest.mark.slow
def test_another_process_reads_the_cache(on_disk, tmp_path):
    first = tokenize(on_disk, "gray:8", size=8)
    program = (
        "import datasets, lightning_igpt; import lightning_igpt.images as t; t.decode = None\n"
        f"print(lightning_igpt.tokenize(datasets.load_from_disk({str(tmp_path / 'images')!r}), 'gray:8', size=8)"
        ".cache_files)"
    )
    root = Path(__file__).parents[2]
    told = subprocess.run([sys.executable, "-c", program], cwd=root, check=True, capture_output=True, text=True)
    assert told.stdout.strip() == str(first.cache_files)


def test_several_processes(on_disk, tokenised):
    several = tokenize(on_disk, CORNERS, size=8, num_proc=2)
    assert len(several.cache_files) == 2
    assert several.features == tokenised.features
    assert several[:] == tokenised[:]
    assert several.info.description == tokenised.info.description


# Errors


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_bad_image_is_named_by_its_row(num_proc):
    content = [encoded(noise()), encoded(noise()), encoded(noise()), b"junk"]
    images = [{"bytes": value, "path": f"{i}.png"} for i, value in enumerate(content)]
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": images}, features=features)
    with pytest.raises(BadImageError, match=r"the image in row 3 \(3.png\): the file is not an image"):
        tokenize(dataset, CORNERS, batch_size=2, num_proc=num_proc)


def test_wrong_data_are_explained(dataset, tokenised):
    with pytest.raises(ValueError, match=r"the split 'train' is tokenised already: .* label, text, tokens, palette"):
        tokenize(datasets.DatasetDict(train=tokenised), CORNERS)
    with pytest.raises(ValueError, match="the data set has a column 'palette' of its own"):
        tokenize(dataset.rename_column("text", "palette"), CORNERS)
    with pytest.raises(ValueError, match="the data set has no column of type Image; set image_column"):
        tokenize(dataset.remove_columns("image"), CORNERS)
    with pytest.raises(ValueError, match=r"image_column is 'img', .* Did you mean 'image'\?"):
        tokenize(dataset, CORNERS, image_column="img")
    with pytest.raises(ValueError, match="size is 0"):
        tokenize(dataset, CORNERS, size=0)
    with pytest.raises(TypeError, match=r"not a str; datasets.load_dataset opens"):
        tokenize("owner/name", CORNERS)
    with pytest.raises(ValueError, match="num_proc is 2, but the data set is a stream"):
        tokenize(dataset.to_iterable_dataset(), CORNERS, num_proc=2)
    with pytest.raises(ValueError, match="unknown columns"):
        tokenize(datasets.IterableDataset.from_generator(lambda: iter([{"image": None}])), CORNERS)


# What the ids mean


def test_what_map_wrote_is_read_from_its_rows(dataset):
    mapped = dataset.map(CORNERS.transform(size=8), batched=True, remove_columns=["image"])
    assert marked_palette(mapped) == MARK
    assert marked_palette(mapped.select([4, 2])) == MARK
    with pytest.raises(ValueError, match=r"no column 'palette' that names it.* lightning_igpt.tokenize, or by map"):
        marked_palette(mapped.remove_columns("palette"))
    with pytest.raises(ValueError, match="only the rows of the column 'palette' name the palette"):
        marked_palette(mapped.features)
    with pytest.raises(ValueError, match="no fixed length and no rows"):
        features = datasets.Features({**mapped.features, "palette": datasets.ClassLabel(names=[CORNERS.sha256])})
        marked_palette(features)


def test_several_palettes_are_refused():
    one, other = CORNERS.sha256, Palette.load("gray:8").sha256
    assert marked_palette(with_palette_column([one, one])) == (one, 2)
    mixed = [
        with_palette_column([one, other, one]),
        with_palette_column([0, 1], datasets.ClassLabel(names=[one, other])),
    ]
    for data in mixed:
        with pytest.raises(ValueError, match=f"tokens of 2 palettes \\({one[:12]}, {other[:12]}\\)"):
            marked_palette(data)
    assert marked_palette(mixed[0].select([0, 2])) == (one, 2)


@pytest.mark.parametrize("values", [["warm", "cold"], [None, None]])
def test_other_columns_of_that_name_are_no_mark(values):
    with pytest.raises(ValueError, match=f"should hold the SHA-256 of a palette; it holds {values[0]!r}"):
        marked_palette(with_palette_column(values))


@pytest.mark.parametrize("length", [0, 5])
def test_tokens_fill_a_square(length):
    columns = {"tokens": [[1] * length], "palette": [CORNERS.sha256]}
    features = datasets.Features({"tokens": datasets.List(UINT16), "palette": datasets.Value("string")})
    with pytest.raises(ValueError, match=f"rows of {length} tokens fill no square"):
        marked_palette(datasets.Dataset.from_dict(columns, features=features))


def test_which_data_are_tokenised(dataset, tokenised):
    assert is_tokenised(tokenised.features)
    assert not is_tokenised(dataset.features)
    for feature, expected in [
        (datasets.List(datasets.Value("int64")), True),
        (datasets.LargeList(datasets.Value("int32")), True),
        (datasets.List(datasets.Value("string")), False),
        (datasets.List(datasets.List(UINT16)), False),
        (UINT16, False),
    ]:
        assert is_tokenised(datasets.Features({"tokens": feature})) is expected
    with pytest.raises(ValueError, match="no column 'tokens' of integers; the columns are image, label, text"):
        marked_palette(dataset)
