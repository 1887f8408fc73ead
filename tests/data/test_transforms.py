import pickle

import numpy as np
import pytest
from PIL import Image

from lightning_igpt.data.transforms import CenterCrop, PadCropFlip, RandomCrop, resize_center_crop
from tests.image_files import noise


@pytest.mark.parametrize("size", [(20, 12), (12, 20), (12, 12), (21, 12)])
def test_center_crop_is_the_middle_square_resized(size):
    image = noise(size)
    left, top = (size[0] - 12) / 2, (size[1] - 12) / 2
    wanted = image.resize((6, 6), Image.Resampling.BILINEAR, box=(left, top, left + 12, top + 12))
    assert resize_center_crop(image, 6).tobytes() == wanted.tobytes()


def test_random_crop_bounds():
    """Every crop lies inside the image and spans 224/384 to 224/256 of the shorter side."""
    width, height = 1000, 800
    x, y = np.meshgrid(np.arange(width) / width * 255, np.arange(height) / height * 255)
    ramp = Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))
    sides = []
    for sample in range(200):
        crop = np.asarray(RandomCrop(16)(ramp, sample)).astype(float)
        middle = crop[8, :, 0]
        sides.append((middle[15] - middle[0]) * 16 / 15 / 255 * width / height)
    assert min(sides) > 224 / 384 - 0.02 and max(sides) < 224 / 256 + 0.02
    assert min(sides) < 0.62 and max(sides) > 0.83  # and uses the whole range


def test_which_images_are_cropped_at_random():
    crop = RandomCrop(8, seed=1)
    small, large = noise((40, 15)), noise((16, 40))
    assert crop(small, 5).tobytes() == CenterCrop(8)(small, 5).tobytes()
    assert crop(large, 5).tobytes() != crop(large, 6).tobytes()
    assert crop(large, 5).tobytes() == pickle.loads(pickle.dumps(crop))(large, 5).tobytes()
    assert crop(large, 5).tobytes() != RandomCrop(8, seed=2)(large, 5).tobytes()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("pad", [0, 1, 4, 7])
def test_pad_crop_flip_against_numpy(pad, channels):
    pixels = np.asarray(noise((8, 8))).transpose(2, 0, 1)[:channels]
    padded = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad)), mode="reflect")
    possible = {
        padded[:, top : top + 8, left : left + 8][:, :, ::step].tobytes()
        for top in range(2 * pad + 1)
        for left in range(2 * pad + 1)
        for step in (1, -1)
    }
    found = {grid.tobytes() for grid in PadCropFlip(pad, seed=3)(np.stack([pixels] * 5000), range(5000))}
    assert found == possible  # 450 outcomes at most, 5000 draws: each is seen
    tokens = pixels.astype(np.int16) + 256
    assert np.array_equal(
        PadCropFlip(pad)(tokens[None], [7]), PadCropFlip(pad)(pixels[None], [7]).astype(np.int16) + 256
    )


def test_a_draw_is_the_same_in_any_batch():
    grids = np.stack([np.asarray(noise((8, 8), seed)).transpose(2, 0, 1) for seed in range(6)])
    augment, samples = PadCropFlip(3, seed=5), [7, 2**40, 0, 3, 9, 1]
    whole = augment(grids, samples)
    for i, sample in enumerate(samples):
        assert np.array_equal(augment(grids[i : i + 1], [sample])[0], whole[i])
    assert not np.array_equal(PadCropFlip(3, seed=6)(grids, samples), whole)
