"""Images that cannot be read: who is told, what stands in for them, and what is left of them in evaluation."""

import csv

import datasets
import pytest
import torch

from lightning_igpt.data import PretrainDataModule, ProbeDataModule
from lightning_igpt.data.order import EndlessOrder
from lightning_igpt.data.readers import BadImage, BadImages, ImageBatches, ImageReader
from lightning_igpt.data.splits import Part
from lightning_igpt.data.transforms import CenterCrop, draw_generator
from lightning_igpt.images import BadImageError
from lightning_igpt.palette import Palette
from tests.data.test_datamodule import Looker, column, ready, trainer
from tests.image_files import encoded, noise, picture, save_images, tiny
from tests.test_images import png_header

GRAY = Palette.load("gray:16")
CURE = "on_bad_image=skip leaves such images out"


DAMAGE = {
    "truncated.jpg": (encoded(noise((40, 40)), "JPEG")[:900], "cannot be decoded"),
    "empty.png": (b"", "0 bytes"),
    "page.jpg": (b"<!DOCTYPE html><html>404 not found</html>", "not an image of a known format"),
    "bomb.png": (png_header(60_000, 60_000), "far too large"),
    "missing.png": (None, "there is no file"),
}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("cache", ["none", "disk"])
@pytest.mark.parametrize("name", DAMAGE)
def test_an_error_is_one_line_that_names_the_image(tmp_path, name, cache, num_workers):
    content, reason = DAMAGE[name]
    save_images(tmp_path / "set", ["a.png", name, "z.png"])
    (tmp_path / "set" / name).write_bytes(content or b"")
    data = ready(
        PretrainDataModule, str(tmp_path / "set"), batch_size=3, image_size=4, val_fraction=0, num_workers=num_workers,
        cache=cache, palette="gray:16",
    )  # fmt: skip
    if content is None:
        (tmp_path / "set" / name).unlink()
    place = rf"{tmp_path}/set, split 'train', row 1 \({tmp_path}/set/{name}\): "
    with pytest.raises(BadImageError, match=rf"^{place}[^\n]*{reason}[^\n]*\. Repair or remove it; {CURE}$"):
        list(data.train_dataloader())


N, BAD = 26, (3, 11, 20)


def spoiled(bad=BAD, named=False):
    """Image i has i in its first channel and the label i % 2."""
    images = [
        {"bytes": b"<html>" if i in bad else encoded(picture(i)), "path": f"x{i}.png" if named else None}
        for i in range(N)
    ]
    return datasets.Dataset.from_dict({"image": images, "label": tiny(N)["label"]}, features=tiny(1).features)


def skipping(source, cls=PretrainDataModule, **options):
    options = {"batch_size": 4, "image_size": 4, "val_fraction": 0, "max_bad_share": 0.5} | options
    return ready(cls, source, on_bad_image="skip", **options)


def in_place_of(place, n, bad, seed):
    generator = draw_generator(seed, place)
    while place in bad:
        place = int(generator.integers(n))
    return place


def batches(seed=5):
    dataset = spoiled().cast_column("image", datasets.Image(decode=False))
    reader = ImageReader(Part("some/source", "train", dataset), "image", CenterCrop(4))
    order = EndlessOrder(N, batch_size=8, n_steps=9, seed=seed)
    images = ImageBatches(reader, on_bad_image="skip", replace=True, seed=seed, labels=torch.arange(N) % 2)
    draws, size = list(order), order.at_once
    return [images[draws[i : i + size]] for i in range(0, len(draws), size)]


def test_training_reads_another_image_instead():
    order = EndlessOrder(N, batch_size=8, n_steps=9, seed=5)
    wanted = [(in_place_of(row, N, BAD, 5), sample) for row, sample in order]
    found = batches()
    assert torch.cat([batch["image"][:, 0, 0, 0] for batch in found]).tolist() == [row for row, _ in wanted]
    assert torch.cat([batch["sample"] for batch in found]).tolist() == [sample for _, sample in wanted]
    assert torch.cat([batch["label"] for batch in found]).tolist() == [row % 2 for row, _ in wanted]


def test_workers_and_caches_change_nothing(tmp_path):
    def run(**options):
        data = skipping(spoiled(), batch_size=13, palette="gray:16", **options)
        loader = data.train_dataloader()
        return [batch for _ in range(2) for batch in loader], data.bad_images

    plain, named = run(cache="none")
    assert len(named) == 3
    for cache, num_workers in (("none", 1), ("disk", 0), ("disk", 1)):
        found, bad = run(cache=cache, num_workers=num_workers)
        assert bad == named
        for mine, wanted in zip(found, plain, strict=True):
            assert set(mine) == {"tokens" if cache == "disk" else "image", "sample", "label"}
            assert torch.equal(mine["sample"], wanted["sample"]) and torch.equal(mine["label"], wanted["label"])
            if cache == "disk":
                assert torch.equal(mine["tokens"], GRAY.quantize(wanted["image"]))
            else:
                assert torch.equal(mine["image"], wanted["image"])


@pytest.mark.parametrize("cache", ["none", "disk"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_evaluation_leaves_them_out_and_says_which(tmp_path, cache, num_workers):
    good = [i for i in range(N) if i not in BAD]
    options = {"num_workers": num_workers, "cache": cache, "palette": "gray:16"}
    data = skipping(spoiled(named=True), ProbeDataModule, **options)
    loader = data.train_dataloader()
    for _ in range(2):
        assert column(loader).tolist() == good and column(loader, "label").tolist() == [i % 2 for i in good]
    where = "the Dataset of 26 rows, split 'train', row"
    assert list(data.bad_images) == [f"{where} {i} (x{i}.png)" for i in BAD]
    assert all("not an image of a known format" in reason for reason in data.bad_images.values())


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_a_batch_of_nothing_stops_evaluation(tmp_path, cache):
    data = skipping(spoiled((2, 3)), ProbeDataModule, batch_size=2, cache=cache, palette="gray:16")
    with pytest.raises(BadImageError, match=r"^no image of a batch of 2 can be read; the first is .*row 2: the"):
        list(data.train_dataloader())


@pytest.mark.parametrize("cache", ["none", "disk"])
def test_too_many_stop_the_run(tmp_path, cache):
    options = {"cache": cache, "palette": "gray:16"}
    message = r"^3 of 26 images cannot be read, more than max_bad_share=0\.1 allows; the first is the Dataset of 26"
    with pytest.raises(BadImageError, match=message):
        list(skipping(spoiled(), max_bad_share=0.1, **options).train_dataloader())
    list(skipping(spoiled(), max_bad_share=3 / 26, **options).train_dataloader())


def test_of_streams_a_share_counts_after_a_thousand_images():
    log = BadImages(0.01)
    log.note([BadImage(f"row {i}", "html") for i in range(12)], 999)
    log.note([], 200)
    log.note([BadImage("row 3", "html")], 1)  # known already
    assert len(log.reasons) == 12
    with pytest.raises(BadImageError, match=r"13 of 1201 images cannot be read, more than max_bad_share=0\.01"):
        log.note([BadImage("row 13", "html")], 1)


def test_a_cache_made_while_skipping_does_not_hide_them_later(tmp_path):
    options = {"cache": "disk", "palette": "gray:16"}
    skipping(spoiled(), **options).train_dataloader()
    strict = ready(PretrainDataModule, spoiled(), batch_size=4, image_size=4, val_fraction=0, **options)
    with pytest.raises(BadImageError, match=rf"^the Dataset of 26 rows, split 'train', row 3: .*{CURE}$"):
        strict.train_dataloader()


def test_the_list_is_written_next_to_the_logs(tmp_path):
    data = PretrainDataModule(spoiled(), batch_size=4, on_bad_image="skip", max_bad_share=0.5)
    trainer(max_epochs=1, default_root_dir=tmp_path).fit(Looker(4), data)
    with (tmp_path / "bad_images.csv").open(newline="") as file:
        head, *lines = csv.reader(file)
    assert head == ["image", "reason"] and dict(lines) == data.bad_images and len(lines) == 3
    clean = PretrainDataModule(spoiled(()), batch_size=4, on_bad_image="skip")
    trainer(max_epochs=1, default_root_dir=tmp_path / "clean").fit(Looker(4), clean)
    assert not clean.bad_images and not list(tmp_path.glob("clean/**/bad_images*"))
