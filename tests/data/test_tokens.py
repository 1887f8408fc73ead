import os
import pickle
import zlib
from itertools import pairwise

import datasets
import numpy as np
import pytest
import torch

from lightning_igpt.data import FineTuneDataModule, PretrainDataModule
from lightning_igpt.data.columns import TokenMark, marked_palette
from lightning_igpt.data.splits import Part
from lightning_igpt.data.tokens import DamagedDataError, TokenReader, cached_tokens, tokenize
from lightning_igpt.data.transforms import CenterCrop, RandomCrop
from lightning_igpt.images import BadImageError
from lightning_igpt.palette import Palette
from tests.data.test_datamodule import Looker, column, ready, trainer
from tests.image_files import encoded, noise, picture, rows, save_images, tiny
from tests.test_tokenizing import CORNERS, PICTURES, TOKENS

MARK = TokenMark(CORNERS.sha256, 8)
LABELS = [0, 1, 1, 0, 1, 0]
INT16 = datasets.Value("int16")
IDS = TOKENS.tolist()


@pytest.fixture
def dataset():
    return rows(PICTURES, LABELS).add_column("text", list("abcdef"))


@pytest.fixture
def on_disk(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "images")
    return datasets.load_from_disk(tmp_path / "images")


@pytest.fixture
def tokenized(dataset):
    return tokenize(dataset, CORNERS, size=8)


def test_images_become_tokens(dataset, tokenized):
    assert tokenized.features == {
        "label": dataset.features["label"],
        "text": dataset.features["text"],
        "tokens": datasets.List(INT16, length=64),
        "palette": datasets.ClassLabel(names=[CORNERS.sha256]),
        "crc32": datasets.Value("uint32"),
    }
    assert tokenized["tokens"][:] == IDS
    assert tokenized["crc32"][:] == [zlib.crc32(np.array(row, "<i2").tobytes()) for row in IDS]
    assert tokenized["label"][:] == LABELS
    assert tokenized["text"][:] == list("abcdef")
    assert tokenized["palette"][:] == [0] * 6
    assert tokenized.data.schema.field("tokens").type.list_size == 64
    assert "8 x 8 pixels" in tokenized.info.description
    assert CORNERS.sha256 in tokenized.info.description
    assert dataset.info.description == ""
    assert marked_palette(tokenized) == MARK


def test_streams(dataset, tokenized):
    stream = tokenize(dataset.to_iterable_dataset(), CORNERS, size=8, batch_size=4)
    assert stream.features == tokenized.features
    assert [row["tokens"].tolist() for row in stream] == IDS
    kept = datasets.Dataset.from_generator(lambda: iter(stream), features=stream.features)
    assert kept[:] == tokenized[:]
    splits = tokenize(datasets.IterableDatasetDict(train=dataset.to_iterable_dataset()), CORNERS, size=8)
    assert next(iter(splits["train"]))["tokens"].tolist() == IDS[0]


def test_a_second_call_reads_the_cache(on_disk, monkeypatch):
    first = tokenize(on_disk, CORNERS, size=8)
    assert first.cache_files
    with monkeypatch.context() as patch:
        patch.setattr("lightning_igpt.data.tokens.decode", None)  # whatever decodes fails
        second = tokenize(on_disk, Palette(CORNERS.to_list()), size=8)
        assert tokenize(on_disk, CORNERS, size=8, num_proc=2).cache_files == first.cache_files
    assert second.cache_files == first.cache_files
    assert second._fingerprint == first._fingerprint
    assert second[:] == first[:]
    assert second.info.description == first.info.description
    others = [tokenize(on_disk, "gray:8", size=8), tokenize(on_disk, CORNERS, size=7)]
    assert len({part.cache_files[0]["filename"] for part in (first, *others)}) == 3


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_bad_image_is_named_by_its_row(num_proc):
    content = [encoded(noise()), encoded(noise()), encoded(noise()), b"junk"]
    images = [{"bytes": value, "path": f"{i}.png"} for i, value in enumerate(content)]
    features = datasets.Features({"image": datasets.Image()})
    dataset = datasets.Dataset.from_dict({"image": images}, features=features)
    with pytest.raises(BadImageError, match=r"row 3 \(3.png\): the file is not an image"):
        tokenize(dataset, CORNERS, batch_size=2, num_proc=num_proc)


def test_wrong_data_are_explained(dataset, tokenized):
    stream, unknown = dataset.to_iterable_dataset(), lambda: iter([{"image": None}])
    for data, options, message in (
        (datasets.DatasetDict(train=tokenized), {}, "split 'train' is tokenized already: .* label, text, tokens, pal"),
        (dataset.rename_column("text", "palette"), {}, "the dataset already has a column 'palette'"),
        (dataset.remove_columns("image"), {}, "the dataset has no column of type Image; set image_column"),
        (dataset, {"image_column": "img"}, "image_column is 'img',"),
        (dataset, {"size": 0}, "size is 0"),
        ("owner/name", {}, "not a str; datasets.load_dataset opens"),
        (stream, {"num_proc": 2}, "num_proc is 2, but the dataset is a stream"),
        (datasets.IterableDataset.from_generator(unknown), {}, "unknown columns"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            tokenize(data, CORNERS, **options)


def test_what_map_wrote_is_read_from_its_rows(dataset):
    mapped = dataset.map(CORNERS.transform(size=8), batched=True, remove_columns=["image"])
    assert marked_palette(mapped) == MARK
    assert marked_palette(mapped.select([4, 2])) == MARK
    with pytest.raises(ValueError, match=r"no column 'palette' that names .* lightning_igpt.tokenize, or by map"):
        marked_palette(mapped.remove_columns("palette"))


def test_several_palettes_are_refused(tokenized):
    one, other = CORNERS.sha256, Palette.load("gray:8").sha256
    both = tokenized.cast_column("palette", datasets.ClassLabel(names=[one, other]))
    strings = tokenized.remove_columns("palette").add_column("palette", [one, other, one, one, one, one])
    for data in (both, strings):
        with pytest.raises(ValueError, match=f"tokens of 2 palettes \\({one[:12]}, {other[:12]}\\)"):
            marked_palette(data)
    assert marked_palette(strings.select([0, 2])) == MARK


GRAY = Palette.load("gray:16")
UNDECODED = datasets.Image(decode=False)


def tokens_of(image):
    return GRAY.quantize(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]).numpy()[0]


def part_of(dataset, part_rows=None):
    return Part("some/source", "train", dataset.cast_column("image", UNDECODED), part_rows)


CENTER = CenterCrop(4)


def cached(dataset, resize=CENTER, part_rows=None, palette=GRAY, **options):
    return cached_tokens(None, part_of(dataset, part_rows), "image", palette, resize, **options)


def table(kind, n=60):
    """Rows of 9 random tokens in several chunks."""
    tokens = np.random.default_rng(0).integers(0, 300, (n, 9))
    column = datasets.List(datasets.Value(kind.removesuffix(", any")), length=-1 if "any" in kind else 9)
    features = datasets.Features({"tokens": column})
    edges = [0, 1, 17, 17, 40, n]
    pieces = [datasets.Dataset.from_dict({"tokens": tokens[a:b].tolist()}, features=features)
              for a, b in pairwise(edges) if b > a]  # fmt: skip
    return tokens, datasets.concatenate_datasets(pieces)


@pytest.mark.parametrize("kind", ["int16", "uint16", "int64", "int16, any", "int32, any"])
@pytest.mark.parametrize("select", [None, range(20, 50), [59, 3, 17, 16, 40, 0, 1]])
def test_rows_of_any_chunk_are_read_as_datasets_reads_them(kind, select):
    tokens, dataset = table(kind)
    if select is not None:
        tokens, dataset = tokens[list(select)], dataset.select(select)
    reader = TokenReader(Part("some/source", "train", dataset), dataset, "tokens", 3)
    assert kind != "int16" or not reader._views[0].flags.owndata
    places = np.random.default_rng(1).integers(0, len(dataset), 100).tolist()
    for copy in (reader, pickle.loads(pickle.dumps(reader))):
        grids, bad = copy.read(places, places)
        assert grids.dtype == np.int16 and grids.shape == (100, 1, 3, 3) and not bad
        assert np.array_equal(grids.reshape(100, 9), tokens[places])


def test_rows_of_another_length_are_named():
    for wrong, n in (([1, 2, 3], 3), (None, 0)):
        features = datasets.Features({"tokens": datasets.List(datasets.Value("int16"))})
        dataset = datasets.Dataset.from_dict({"tokens": [[1] * 4, [2] * 4, wrong]}, features=features)
        with pytest.raises(ValueError, match=rf"some/source, split 'train', row 2: there are {n} tokens, not 2\^2"):
            TokenReader(Part("some/source", "train", dataset), dataset, "tokens", 2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_crops_are_the_draws_of_their_numbers_and_every_pass_takes_the_next(num_workers):
    images, crop = [noise((20, 16), seed) for seed in range(9)] + [noise((6, 6))], RandomCrop(4, seed=5)
    reader = cached(rows(images), crop, np.array([1, 4, 5, 9]), n_crops=3, num_workers=num_workers)
    for number_of_pass in range(5):
        places = [2, 0, 3, 1]
        grids, _ = reader.read(places, [number_of_pass * 4 + place for place in range(4)])
        draws = [(row, row * 3 + number_of_pass % 3) for row in (5, 1, 9, 4)]
        wanted = [tokens_of(crop(images[row], draw)) for row, draw in draws]
        assert np.array_equal(grids.reshape(4, 16), wanted)


@pytest.mark.parametrize("cls, options", [(PretrainDataModule, {}), (FineTuneDataModule, {"pad": 2})])
def test_a_data_module_gives_the_tokens_of_its_pixels(cls, options):
    """Augmentation moves pixels about, so it may come after the colors are replaced by their numbers."""
    images = rows([noise((6, 5), seed) for seed in range(30)], [0, 1] * 15)
    splits = datasets.DatasetDict(train=images, test=images.select(range(7)))
    options |= {"batch_size": 4, "image_size": 4, "palette": "gray:16"}
    for more in ({}, {"train_split": "train[:70%]", "val_split": "train[70%:]"}):
        pixels, tokens = (ready(cls, splits, cache=cache, **options, **more) for cache in ("none", "disk"))
        for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
            pairs = list(zip(getattr(pixels, name)(), getattr(tokens, name)(), strict=True))
            for a, b in pairs:
                assert torch.equal(b["tokens"], GRAY.quantize(a["image"])) and b["tokens"].dtype == torch.int16
                assert torch.equal(a["sample"], b["sample"]) and torch.equal(a["label"], b["label"])
            assert pairs


def test_a_second_run_decodes_nothing_and_changed_files_are_read_again(tmp_path, monkeypatch):
    save_images(tmp_path / "set", [f"{i}.png" for i in range(6)])
    options = {"image_size": 4, "batch_size": 6, "val_fraction": 0, "cache": "disk", "palette": "gray:16"}

    def run():
        data = ready(PretrainDataModule, str(tmp_path / "set"), **options)
        return data.train_dataloader().dataset.reader.read([3], [0])[0].reshape(-1)

    for color in (10, 250):
        picture(color * 257).save(tmp_path / "set/3.png")
        assert np.array_equal(run(), tokens_of(picture(color * 257)))
        with monkeypatch.context() as patch:
            patch.setattr("lightning_igpt.data.tokens.decode", None)  # whatever decodes fails
            assert np.array_equal(run(), tokens_of(picture(color * 257)))
    os.utime(tmp_path / "set/0.png", ns=(1, 1))
    with monkeypatch.context() as patch, pytest.raises(TypeError, match="NoneType"):
        patch.setattr("lightning_igpt.data.tokens.decode", None)
        run()


@pytest.mark.parametrize("n", [40, 3000])  # of Arrow's record batches, one or several
@pytest.mark.parametrize("damage", ["first half", "second half", "cut"])
def test_damage_is_noticed(tmp_path, damage, n):
    def spoil(file):
        content = file.read_bytes()
        first, second = content[: len(content) // 2], content[len(content) // 2 :]
        file.unlink()  # the old one is still mapped
        zeroed = {"first half": bytes(len(first)) + second, "second half": first + bytes(len(second)), "cut": first}
        file.write_bytes(zeroed[damage])

    def seen(place, **options):
        data = ready(PretrainDataModule, str(tmp_path / place), batch_size=4, **options)
        return torch.cat([column(loader, "tokens") for loader in (data.train_dataloader(), data.val_dataloader())])

    images, cached = tiny(n), {"cache": "disk", "palette": "gray:16", "image_size": 4}
    tokenize(images, "gray:16", size=4).save_to_disk(tmp_path / "kept")
    images.save_to_disk(tmp_path / "images")
    whole = seen("images", **cached)
    assert torch.equal(seen("kept"), whole)
    spoil(tmp_path / "kept" / "data-00000-of-00001.arrow")
    for streaming in (False, True):
        with pytest.raises(DamagedDataError, match=r"kept.*(restore|tokenize)"):
            seen("kept", streaming=streaming)
    (file,) = (tmp_path / "images").glob("cache-*.arrow")
    spoil(file)
    with pytest.warns(UserWarning, match="rebuilding the token cache: "):
        assert torch.equal(seen("images", **cached), whole)
    assert torch.equal(seen("images", **cached), whole)


def test_whatever_distinguishes_tokens_has_a_cache_of_its_own():
    def files(**options):
        return cached(tiny(9), **options)._made_of[1].cache_files[0]["filename"]

    different = [{}, {"resize": CenterCrop(2)}, {"palette": Palette.load("gray:4")}, {"n_crops": 2},
                 {"resize": RandomCrop(4, 0)}, {"resize": RandomCrop(4, 1)}]  # fmt: skip
    assert len({files(**options) for options in different}) == 6 and files() == files()


def test_the_palette_is_the_networks():
    options = {"batch_size": 4, "image_size": 4, "cache": "disk"}
    with pytest.raises(ValueError, match=r"cache=disk keeps tokens: give palette, or use it with a trainer"):
        ready(PretrainDataModule, tiny(9), **options).train_dataloader()
    module = Looker(4)
    module.palette = GRAY
    trainer(max_steps=1).fit(module, PretrainDataModule(tiny(9), **options))
    assert module.seen["train"][0]["tokens"].shape == (4, 16)
    with pytest.raises(ValueError, match=r"several palettes \(\w{12} of palette, \w{12} of the network\): every token"):
        trainer(max_steps=1).fit(module, PretrainDataModule(tiny(9), palette="gray:8", **options))
    tokens = tokenize(tiny(9), "gray:8", size=4)
    with pytest.raises(ValueError, match=r"palettes \(\w{12} of its tokens, \w{12} of the network\): every"):
        trainer(max_steps=1).fit(module, PretrainDataModule(tokens, batch_size=4))
    with pytest.raises(ValueError, match=r"image_size is 5, but .* holds tokens of 4 x 4 images"):
        ready(PretrainDataModule, tokens, batch_size=4, image_size=5).train_dataloader()
