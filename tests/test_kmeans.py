import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from lightning_igpt import kmeans
from lightning_igpt.kmeans import fit_palette

KNOWN = np.array([[250, 240, 230], [0, 0, 0], [200, 10, 20], [20, 180, 30], [10, 20, 220]], dtype=np.uint8)
SORTED = KNOWN[[1, 4, 2, 3, 0]]  # by luminance


@pytest.fixture(scope="module")
def photo():
    """uint8 (N, 3, 32, 32) tiles of a photograph."""
    image = torch.from_numpy(load_sample_image("flower.jpg")[:192:2, :192:2].copy()).permute(2, 0, 1)
    return image.unfold(1, 32, 32).unfold(2, 32, 32).permute(1, 2, 0, 3, 4).reshape(-1, 3, 32, 32).contiguous()


@pytest.fixture(scope="module")
def fitted(photo):
    return fit_palette(photo, 16)


def arrays(tensor):
    return [image.permute(1, 2, 0).contiguous().numpy() for image in tensor]


KINDS = {
    "array": lambda tensor: tensor.numpy(),
    "tensors": iter,
    "batches": lambda tensor: [tensor[:4], tensor[4:]],
    "arrays": arrays,
    "pictures": lambda tensor: [Image.fromarray(array) for array in arrays(tensor)],
    "rows": lambda tensor: [{"label": 3, "img": Image.fromarray(array)} for array in arrays(tensor)],
    "named rows": lambda tensor: [{"label": 3, "img": array, "other": array} for array in arrays(tensor)],
    "backwards": lambda tensor: tensor.flip(0),
}


def test_known_colors_are_found():
    pixels = KNOWN[np.random.default_rng(0).integers(0, 5, 1000)]
    images = torch.from_numpy(pixels).T.reshape(1, 3, 25, 40)
    palette = fit_palette(images, 5)
    assert np.allclose(palette.colors, SORTED / 127.5 - 1, atol=1e-6)
    assert np.array_equal(palette.rgb, SORTED)
    assert palette.rmse(images) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_pixels_give_the_same_bytes(photo, fitted, kind):
    column = "img" if kind == "named rows" else None
    assert fit_palette(KINDS[kind](photo), 16, image_column=column) == fitted


def test_merged_colors_lose_little(photo, fitted, monkeypatch):
    monkeypatch.setattr(kmeans, "_MAX_POINTS", 1000)
    merged = fit_palette(photo, 16)
    assert merged != fitted
    assert merged.rmse(photo) < 1.05 * fitted.rmse(photo)
