import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_igpt.data.dataset import ImageBatches
from lightning_igpt.data.readers import CACHE_LIMIT, ImageReader, PixelCache, make_cache
from lightning_igpt.data.splits import Part
from lightning_igpt.data.transforms import CenterCrop, PadCropFlip, RandomCrop
from lightning_igpt.images import BadImageError
from tests.image_files import encoded, noise, rows, tiny

UNDECODED = datasets.Image(decode=False)


def batches(dataset, part_rows=None, size=4, resize=None, cache=None, **options):
    part = Part("some/source", "train", dataset.cast_column("image", UNDECODED), part_rows)
    reader = ImageReader(part, "image", resize or CenterCrop(size), cache=cache)
    return ImageBatches(reader, len(part), **options)


def by_hand(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_a_batch_holds_the_images_in_order():
    images = [noise((4, 4), seed) for seed in range(5)]
    labels = torch.tensor([3, 1, 4, 1, 5])
    batch = batches(rows(images), labels=labels)[[(4, 104), (0, 7)]]
    assert torch.equal(batch["image"], torch.stack([by_hand(images[4]), by_hand(images[0])]))
    assert batch["image"].dtype == torch.uint8 and batch["image"].is_contiguous()
    assert batch["sample"].tolist() == [104, 7] and batch["label"].tolist() == [5, 3]
    assert set(batches(rows(images))[[(0, 0)]]) == {"image", "sample"}


def test_rows_of_a_part():
    part = batches(tiny(9), np.array([2, 5, 8]))
    assert len(part) == 3
    assert part[[(2, 0), (0, 1)]]["image"][:, 0, 0, 0].tolist() == [8, 2]


@pytest.mark.parametrize("shared", [False, True])
def test_cache_gives_the_same_pixels_and_decodes_once(shared):
    decoded = []
    dataset = rows([noise((12, 9), seed) for seed in range(6)])
    plain, cached = batches(dataset), batches(dataset, cache=PixelCache(6, 4, shared=shared))
    original = cached.reader.decode
    cached.reader.decode = lambda place, value: decoded.append(place) or original(place, value)
    for draws in ([(0, 0), (3, 1)], [(3, 2), (1, 3), (0, 4)], [(1, 5), (3, 6)], [(5, 7), (4, 8), (2, 9), (0, 10)]):
        assert torch.equal(plain[draws]["image"], cached[draws]["image"])
    assert sorted(decoded) == [0, 1, 2, 3, 4, 5]


def test_a_batch_does_not_alias_the_cache():
    dataset = batches(tiny(3), cache=PixelCache(3, 4, shared=False))
    dataset[[(1, 0)]]["image"].zero_()
    dataset[[(1, 0)]]["image"].zero_()
    assert dataset[[(1, 0)]]["image"][0, 0, 0, 0] == 1


def test_random_crops_are_not_cached_and_others_are():
    dataset = rows([noise((40, 40), 0), noise((6, 6), 1)])
    cache = PixelCache(2, 4, shared=False)
    cropped = batches(dataset, resize=RandomCrop(4, seed=3), cache=cache)
    first, second = cropped[[(0, 0), (1, 1)]]["image"], cropped[[(0, 2), (1, 3)]]["image"]
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert cache.filled.tolist() == [False, True]
    assert torch.equal(cropped[[(0, 0)]]["image"][0], first[0])  # the draw decides, not the time


def test_augmentation_comes_after_the_cache():
    dataset, augment = rows([noise((4, 4), seed) for seed in range(3)]), PadCropFlip(2, True, seed=1)
    cached = batches(dataset, augment=augment, cache=PixelCache(3, 4, shared=False))
    for samples in ((10, 11), (12, 13)):
        draws = [(2, samples[0]), (0, samples[1])]
        plain = np.stack([by_hand(noise((4, 4), row)).numpy() for row, _ in draws])
        assert np.array_equal(cached[draws]["image"].numpy(), augment(plain, samples))


def test_workers_share_the_cache():
    cache = PixelCache(8, 4, shared=True)
    dataset = batches(tiny(8), cache=cache)
    order = [[(row, row), (row + 1, row + 1)] for row in range(0, 8, 2)]
    for _ in range(2):
        loader = DataLoader(dataset, batch_size=None, sampler=order, num_workers=2)
        assert torch.cat([batch["image"] for batch in loader])[:, 0, 0, 0].tolist() == list(range(8))
    assert cache.filled.all() and cache.pixels[:, 0, 0, 0].tolist() == list(range(8))


def test_when_there_is_a_cache():
    assert make_cache("auto", 100, 32, num_workers=0) is not None
    assert make_cache("auto", CACHE_LIMIT // (3 * 32 * 32) + 1, 32, num_workers=0) is None
    assert make_cache("auto", 100, 32, num_workers=2) is None
    assert make_cache("none", 100, 32, num_workers=0) is None
    assert make_cache("memory", 100, 32, num_workers=2).pixels.is_shared()


def test_a_bad_image_is_named(tmp_path):
    path = tmp_path / "bad.jpg"
    path.write_bytes(b"<html>")
    files = [{"bytes": encoded(noise()), "path": None}] * 4 + [{"bytes": None, "path": str(path)}]
    dataset = datasets.Dataset.from_dict({"image": files}, features=datasets.Features({"image": UNDECODED}))
    with pytest.raises(BadImageError, match=r"some/source, split 'train', row 4 \(.*bad\.jpg\): the file is no"):
        batches(dataset, np.array([1, 4]))[[(0, 0), (1, 1)]]
    missing = datasets.Dataset.from_dict({"image": [None]}, features=dataset.features)
    with pytest.raises(BadImageError, match=r"row 0: the image is missing"):
        batches(missing)[[(0, 0)]]


def test_another_sampler_is_refused():
    with pytest.raises(TypeError, match="overfit_batches"):
        batches(tiny(3))[0]
