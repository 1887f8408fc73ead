"""Tokens on disk are those of the pixels, are made once, and are never taken for those of other images."""

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections import namedtuple
from dataclasses import dataclass

import datasets
import numpy as np
import pytest
import torch

from lightning_igpt.data import FineTuneDataModule, PretrainDataModule
from lightning_igpt.data import token_cache as under_test
from lightning_igpt.data.readers import STOP, ImageReader
from lightning_igpt.data.splits import Part
from lightning_igpt.data.token_cache import TokenFileReader, fingerprint, open_token_cache
from lightning_igpt.data.transforms import CenterCrop, RandomCrop
from lightning_igpt.images import resize_center_crop
from lightning_igpt.palette import Palette
from tests.data.test_base import Looker, ready, trainer
from tests.image_files import noise, picture, rows, save_images, tiny

GRAY = Palette.load("gray:16")
UNDECODED = datasets.Image(decode=False)
HOOK = [lambda sample: None]  # called for every crop that is made


@dataclass(frozen=True)
class Watched(CenterCrop):
    """The centre, and a word about every crop."""

    def __call__(self, image, sample):
        HOOK[0](sample)
        return super().__call__(image, sample)


def reader(dataset, resize=None, part_rows=None, source="some/source"):
    part = Part(source, "train", dataset.cast_column("image", UNDECODED), part_rows)
    return ImageReader(part, "image", resize or Watched(4))


def tokens_of(image):
    return GRAY.quantize(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]).numpy()[0]


def folders(path):
    return sorted(found for found in path.iterdir() if found.is_dir())


@pytest.fixture
def said(monkeypatch):
    """What is said of caches that are made."""
    said = []
    monkeypatch.setattr(under_test, "rank_zero_info", said.append)
    monkeypatch.setattr(under_test.log, "warning", said.append)
    return said


@pytest.fixture
def made(monkeypatch):
    """Draws of the crops that are made."""
    made = []
    monkeypatch.setattr(f"{__name__}.HOOK", [made.append])
    return made


SIZES = [(4, 4), (12, 9), (1, 1), (9, 30), (2, 7), (5, 5)]


def test_tokens_are_those_of_the_middle_of_every_image(tmp_path):
    images = [noise(SIZES[seed % 6], seed) for seed in range(60)]
    tokens = open_token_cache(tmp_path, reader(rows(images)), GRAY).tokens()
    assert tokens.shape == (60, 1, 16) and tokens.dtype == np.int16
    for image, found in zip(images, tokens[:, 0], strict=True):
        assert np.array_equal(found, tokens_of(resize_center_crop(image, 4)))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_crops_are_the_draws_of_their_numbers(tmp_path, num_workers):
    images, crop = [noise((20, 16), seed) for seed in range(9)] + [noise((6, 6))], RandomCrop(4, seed=5)
    tokens = open_token_cache(tmp_path, reader(rows(images), crop), GRAY, n_crops=3, num_workers=num_workers).tokens()
    wanted = [[tokens_of(crop(image, row * 3 + c)) for c in range(3)] for row, image in enumerate(images)]
    assert np.array_equal(tokens, wanted) and len(np.unique(tokens[0], axis=0)) == 3


def test_every_pass_takes_the_next_crop(tmp_path):
    whole = reader(rows([noise((20, 16), seed) for seed in range(9)]), RandomCrop(4))
    file = open_token_cache(tmp_path, whole, GRAY, n_crops=3)
    part = Part("some/source", "train", whole.part.dataset, np.array([1, 4, 5, 8]))
    for number_of_pass in range(5):
        places = [2, 0, 3, 1]
        found = TokenFileReader(part, file, STOP).read(places, [number_of_pass * 4 + place for place in range(4)])
        assert found.grids.dtype == np.int16 and found.grids.shape == (4, 1, 4, 4)
        assert np.array_equal(found.grids.reshape(4, 16), file.tokens()[[5, 1, 8, 4], number_of_pass % 3])
        assert found.places == places and not found.bad


def same_as_pixels(cls, source, cache_dir, loaders, **options):
    options = {"batch_size": 4, "image_size": 4, "palette": "gray:16"} | options
    pixels = ready(cls, source, cache="none", **options)
    tokens = ready(cls, source, cache="disk", cache_dir=str(cache_dir), **options)
    for name in loaders:
        pairs = list(zip(getattr(pixels, name)(), getattr(tokens, name)(), strict=True))
        for one, other in pairs:
            assert torch.equal(other["tokens"], GRAY.quantize(one["image"])) and other["tokens"].dtype == torch.int16
            assert torch.equal(one["sample"], other["sample"]) and torch.equal(one["label"], other["label"])
        assert pairs


LOADERS = ["train_dataloader", "val_dataloader", "test_dataloader"]


@pytest.mark.parametrize("cls, options", [(PretrainDataModule, {}), (FineTuneDataModule, {"pad": 2})])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_module_gives_the_tokens_of_its_pixels(tmp_path, cls, options, num_workers):
    """Augmentation moves pixels about, so it may come after the colours are replaced by their numbers."""
    images = rows([noise((6, 5), seed) for seed in range(30)], [0, 1] * 15)
    splits = datasets.DatasetDict(train=images, test=images.select(range(7)))
    same_as_pixels(cls, splits, tmp_path, LOADERS, num_workers=num_workers, **options)  # with a hold-out
    splits["validation"] = images.select(range(5, 16))
    same_as_pixels(cls, splits, tmp_path, LOADERS, num_workers=num_workers, train_split="train[:70%]", **options)


def test_training_and_held_out_rows_share_a_cache(tmp_path, said):
    options = {"batch_size": 4, "image_size": 4, "cache": "disk", "cache_dir": str(tmp_path), "palette": "gray:16"}
    for n_crops in (1, 2):
        data = ready(PretrainDataModule, tiny(20), n_crops=n_crops, **options)
        assert [len(data.train_dataloader()), len(data.val_dataloader())] == [4, 1]
        assert len(said) == n_crops and f"20 images, {n_crops} crop(s)" in said[-1]


def test_a_second_run_decodes_nothing_and_says_nothing(tmp_path, said, made):
    first = open_token_cache(tmp_path, reader(tiny(30)), GRAY)
    assert made == list(range(30)) and len(said) == 1 and "30 images" in said[0]
    again = open_token_cache(tmp_path, reader(tiny(30)), GRAY)
    assert len(made) == 30 and len(said) == 1 and again.path == first.path
    assert np.array_equal(again.tokens(), first.tokens()) and again.manifest == first.manifest


def test_changed_files_are_read_anew(tmp_path, said):
    """Also in a mix with a data set that holds its images."""
    save_images(tmp_path / "set", [f"{i}.png" for i in range(6)])
    options = {"image_size": 4, "batch_size": 6, "val_fraction": 0, "cache": "disk", "palette": "gray:16"}
    for number, source in enumerate([str(tmp_path / "set"), [tiny(5), tmp_path / "set"]]):
        for n_times, color in enumerate([10, 250]):
            picture(color * 257).save(tmp_path / "set/3.png")
            data = ready(PretrainDataModule, source, cache_dir=str(tmp_path / "cache"), **options)
            file = data.train_dataloader().dataset.reader.file
            assert np.array_equal(file.tokens()[5 * number + 3, 0], tokens_of(picture(color * 257)))
            assert len(said) == 1 + 2 * number + n_times
        assert "the images have changed since (fingerprint was" in said[-1]
    os.utime(tmp_path / "set/0.png", ns=(1, 1))
    ready(PretrainDataModule, source, cache_dir=str(tmp_path / "cache"), **options).train_dataloader()
    assert len(said) == 5


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda path: (path / "manifest.json").write_bytes(b'{"format": 1'), "cannot be read"),
        (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text("[]"), "cannot be read"),
        (lambda path: (path / "manifest.json").write_text("{}"), "cannot be read"),
        (lambda path: (path / "manifest.json").unlink(), "30 images"),
        (lambda path: (path / "tokens.bin").unlink(), "30 images"),
        (lambda path: os.truncate(path / "tokens.bin", 100), "has 100 bytes of tokens instead of 960"),
        (
            lambda path: (path / "manifest.json").write_text(
                json.dumps(json.loads((path / "manifest.json").read_text()) | {"n_images": 29})
            ),
            r"n_images was 29, is 30",
        ),
    ],
)
def test_a_damaged_cache_is_made_anew_with_a_word(tmp_path, said, made, spoil, message):
    first = open_token_cache(tmp_path, reader(tiny(30)), GRAY)
    wanted = first.tokens().copy()
    spoil(first.path)
    again = open_token_cache(tmp_path, reader(tiny(30)), GRAY)
    assert len(said) == 2 and message in said[1] and len(made) == 60
    assert np.array_equal(again.tokens(), wanted) and folders(tmp_path) == [first.path]


def test_more_rows_under_the_same_name(tmp_path, said):
    open_token_cache(tmp_path, reader(tiny(9)), GRAY)
    assert len(open_token_cache(tmp_path, reader(tiny(12)), GRAY).tokens()) == 12
    assert len(said) == 2 and "the images have changed" in said[1] and len(folders(tmp_path)) == 1


def test_whatever_tells_tokens_apart_has_a_folder_of_its_own(tmp_path, said):
    def open_all():
        plain = [
            reader(tiny(9)),
            reader(tiny(9), CenterCrop(4)),
            reader(tiny(9), Watched(2)),
            reader(tiny(9), source="b"),
        ]
        return [
            *(open_token_cache(tmp_path, one, GRAY).path for one in plain),
            open_token_cache(tmp_path, plain[0], Palette.load("gray:4")).path,
            open_token_cache(tmp_path, plain[0], GRAY, n_crops=2).path,
            *(open_token_cache(tmp_path, reader(tiny(9), RandomCrop(4, seed)), GRAY).path for seed in (0, 1)),
        ]

    assert len(set(open_all())) == 8 == len(said) and open_all() == open_all() and len(said) == 8


def test_an_error_midway_leaves_nothing(tmp_path, monkeypatch):
    def fail(sample):
        if sample == 20:
            raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.HOOK", [fail])
        with pytest.raises(RuntimeError, match="power cut"):
            open_token_cache(tmp_path, reader(tiny(30)), GRAY)
    assert not folders(tmp_path)
    assert np.array_equal(open_token_cache(tmp_path, reader(tiny(30)), GRAY).tokens()[29, 0], tokens_of(picture(29)))


def in_a_process(function, *arguments):
    def run():
        torch.set_num_threads(1)  # the threads of this process are not there in a fork
        function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(tmp_path):
    reached = multiprocessing.get_context("fork").Event()

    def build():
        HOOK[0] = lambda sample: (reached.set(), signal.pause()) if sample == 25 else None
        open_token_cache(tmp_path, reader(tiny(30)), GRAY)

    process = in_a_process(build)
    assert reached.wait(30)
    process.kill()
    process.join()
    (stale,) = folders(tmp_path)
    assert stale.name.startswith(".") and stale.name.endswith(".tmp")
    file = open_token_cache(tmp_path, reader(tiny(30)), GRAY)
    assert folders(tmp_path) == [file.path]
    assert np.array_equal(file.tokens()[:, 0], [tokens_of(picture(i)) for i in range(30)])


def test_of_several_processes_one_makes_it(tmp_path):
    barrier, done = (getattr(multiprocessing.get_context("fork"), name) for name in ("Barrier", "SimpleQueue"))
    barrier, done = barrier(3), done()

    def build():
        crops, words = [], logging.StreamHandler()
        words.emit = lambda record: crops.append(record.getMessage())
        logging.getLogger("lightning.pytorch.utilities.rank_zero").addHandler(words)
        HOOK[0] = lambda sample: time.sleep(0.005)
        barrier.wait()
        tokens = open_token_cache(tmp_path, reader(tiny(40)), GRAY).tokens()
        done.put((len([word for word in crops if "making the token cache" in word]), tokens.tobytes()))

    processes = [in_a_process(build) for _ in range(3)]
    found = [done.get() for _ in processes]
    for process in processes:
        process.join()
    assert sorted(count for count, _ in found) == [0, 0, 1] and len({tokens for _, tokens in found}) == 1


def test_a_reader_travels_without_its_tokens(tmp_path):
    whole = reader(tiny(60))
    sent = TokenFileReader(whole.part, open_token_cache(tmp_path, whole, GRAY), STOP)
    received = pickle.loads(pickle.dumps(sent))
    assert "_tokens" not in sent.__getstate__()
    assert np.array_equal(received.read([3, 59], [0, 1]).grids, sent.read([3, 59], [0, 1]).grids)


def test_a_full_disk_names_both_numbers(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 2**29))
    monkeypatch.setattr(under_test, "n_bytes", lambda manifest: 3 * 2**30)
    with pytest.raises(OSError, match=r"needs 3\.00 GiB, but .* has 0\.50 GiB free; set cache_dir"):
        open_token_cache(tmp_path, reader(tiny(30)), GRAY)
    assert not folders(tmp_path)


def test_large_data_sets_are_not_copied_to_be_recognised():
    """Joined, pieces beyond 2 GiB fail, and any would be copied."""
    features = datasets.Features({"image": UNDECODED})
    piece = datasets.Dataset.from_dict({"image": [{"bytes": bytes(2**24), "path": None}] * 2}, features=features)
    assert fingerprint(Part("some/source", "train", datasets.concatenate_datasets([piece] * 70)), "image")


def test_a_relative_path_is_the_same_source(tmp_path, monkeypatch, said):
    save_images(tmp_path / "one", ["1.png", "2.png"])
    save_images(tmp_path / "two", ["3.png", "4.png"])
    monkeypatch.chdir(tmp_path)
    options = {"image_size": 4, "batch_size": 2, "val_fraction": 0, "cache": "disk", "cache_dir": "c"}
    for source in ("one", ["one", "./two"]):
        file = ready(PretrainDataModule, source, palette="gray:16", **options).train_dataloader().dataset.reader.file
        names = [source] if isinstance(source, str) else source
        assert file.manifest["source"] == " + ".join(str((tmp_path / name).resolve()) for name in names)
    assert len(folders(tmp_path / "c")) == 2


def test_the_palette_is_the_networks(tmp_path):
    options = {"batch_size": 4, "image_size": 4, "cache": "disk", "cache_dir": str(tmp_path)}
    with pytest.raises(ValueError, match=r"cache=disk keeps tokens: give palette, or use it with a trainer"):
        ready(PretrainDataModule, tiny(9), **options).train_dataloader()
    module = Looker(4)
    with pytest.raises(ValueError, match=r"cache=disk keeps tokens"):
        trainer(max_steps=1).fit(module, PretrainDataModule(tiny(9), **options))
    module.palette = GRAY
    trainer(max_steps=1).fit(module, PretrainDataModule(tiny(9), **options))
    assert module.seen["train"][0]["tokens"].shape == (4, 16)
    with pytest.raises(ValueError, match=r"palette \w{12}, but the network has \w{12}: every token"):
        trainer(max_steps=1).fit(module, PretrainDataModule(tiny(9), palette="gray:8", **options))


def test_crops_that_nobody_would_keep():
    with pytest.raises(ValueError, match=r"n_crops is 2, but random_crop is off"):
        PretrainDataModule(cache="disk", n_crops=2, random_crop=False)
    for cache in ("none", "memory", "auto"):
        with pytest.raises(ValueError, match=rf"n_crops is 2, but cache is '{cache}'"):
            PretrainDataModule(cache=cache, n_crops=2)
    with pytest.raises(ValueError, match=r"n_crops is 0; it must be at least 1"):
        PretrainDataModule(n_crops=0)
