from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_igpt.palette import Palette
from lightning_igpt.pictures import image_grid, save_png, swatch, to_pil


def test_grid_puts_every_pixel_where_it_belongs():
    rows = torch.randint(1, 256, (2, 3, 3, 4, 5), dtype=torch.uint8)
    scale, gap = 3, 2
    grid = image_grid(rows, scale=scale, gap=gap, background=(0, 0, 0))
    assert grid.dtype == torch.uint8
    assert grid.shape == (3, 2 * (4 * scale + gap) + gap, 3 * (5 * scale + gap) + gap)
    covered = torch.zeros_like(grid)
    for r, c, y, x in np.ndindex(2, 3, 4, 5):
        top, left = gap + r * (4 * scale + gap) + y * scale, gap + c * (5 * scale + gap) + x * scale
        square = grid[:, top : top + scale, left : left + scale]
        assert (square == rows[r, c, :, y, x].view(3, 1, 1)).all()
        covered[:, top : top + scale, left : left + scale] = 1
    assert (grid[covered == 0] == 0).all()


def test_small_images_become_visible():
    assert image_grid(torch.zeros(1, 1, 3, 8, 8, dtype=torch.uint8), gap=0).shape == (3, 128, 128)
    assert image_grid(torch.zeros(1, 1, 3, 200, 200, dtype=torch.uint8), gap=0).shape == (3, 200, 200)


def test_captions_stand_above_their_columns():
    rows = [torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
    plain, headed = image_grid(rows), image_grid(rows, captions=["", "truth"])
    extra = headed.shape[1] - plain.shape[1]
    assert torch.equal(headed[:, extra:], plain)
    left, right = headed[:, :extra, : 128 + 2], headed[:, :extra, 128 + 2 :]
    assert (left == 255).all()
    assert (right < 128).any()
    with pytest.raises(ValueError, match="1 captions for 2 columns"):
        image_grid(rows, captions=["one"])


@pytest.mark.parametrize(
    "rows",
    [
        [torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)],
        [torch.zeros(2, 3, 8, 8)],
        torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
    ],
    ids=["ragged", "floats", "no rows"],
)
def test_grid_refuses_what_it_cannot_draw(rows):
    with pytest.raises(ValueError, match=r"uint8 \(C, 3, H, W\)"):
        image_grid(rows)


@pytest.mark.parametrize("spec", ["openai", "gray:2", "gray:5", "gray:256"])
def test_swatch_shows_every_colour_once(spec):
    rgb = Palette.load(spec).rgb
    side = 5
    sheet = swatch(rgb, side=side)
    squares = sheet[:, 1 + side // 2 :: side + 1, 1 + side // 2 :: side + 1].flatten(1).T
    shown, expected = (Counter(tuple(color) for color in colors.tolist()) for colors in (squares, rgb))
    assert expected <= shown
    assert set(shown - expected) <= {(112, 112, 112)}  # the bare sheet behind the last row


def test_greys_form_a_ramp():
    rgb = Palette.load("gray:16").rgb
    shuffled = rgb[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    sheet = swatch(shuffled, side=1, columns=4)
    assert torch.equal(sheet[:, 1::2, 1::2].flatten(1).T, rgb)


def test_png_keeps_the_bytes(tmp_path):
    image = torch.randint(0, 256, (3, 7, 9), dtype=torch.uint8)
    save_png(image, tmp_path / "new" / "folder" / "image.png")
    with Image.open(tmp_path / "new" / "folder" / "image.png") as saved:
        assert np.array_equal(np.asarray(saved).transpose(2, 0, 1), image.numpy())
    assert to_pil(image).size == (9, 7)
