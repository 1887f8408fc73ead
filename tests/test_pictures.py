from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_igpt.palette import Palette
from lightning_igpt.pictures import (
    color_bar,
    contact_sheet,
    heading,
    heat_map,
    image_grid,
    save_png,
    stack,
    swatch,
    to_pil,
)


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


COLORS = torch.stack([torch.arange(4) * 60, torch.arange(4), torch.arange(4) + 100], 1).to(torch.uint8)


def test_heat_map_is_even_from_zero_to_high_and_clips():
    values = torch.tensor([[0.0, 0.99, 1.0, 1.99], [2.0, 3.0, 3.99, 4.0], [5.0, torch.inf, -1.0, 2.5]])
    expected = COLORS[torch.tensor([[0, 0, 1, 1], [2, 3, 3, 3], [3, 3, 0, 2]])]  # (3, 4, 3)
    found = heat_map(values, COLORS, high=4.0)
    assert found.dtype == torch.uint8
    assert torch.equal(found, expected.permute(2, 0, 1))
    assert torch.equal(heat_map(values.expand(2, 5, 3, 4) * 10, COLORS, high=40.0), found.expand(2, 5, 3, 3, 4))


def test_color_bar_has_its_colors_in_order_and_its_ticks_in_place():
    ticks = {"0": 0.0, "half": 0.5, "all": 1.0}
    bar = color_bar(COLORS, ticks, width=200)
    margin = (bar.shape[2] - 200) // 2
    assert torch.equal(bar[:, 0, margin : margin + 200], COLORS.T.repeat_interleave(50, 1))
    assert (bar[:, :, 0] == 255).all()
    below = bar[:, 10]  # where the marks begin
    marks = (below == 0).all(0).nonzero().flatten() - margin
    assert marks.tolist() == [0, round(0.5 * 199), 199]


def test_contact_sheet_puts_each_picture_below_its_own_lines():
    cells = torch.stack([torch.full((3, 20, 90), 40 * i, dtype=torch.uint8) for i in range(1, 6)])
    names = ["a", "", "a very long name that ends in 1.png", "a very long name that ends in 2.png", "e"]
    sheet = contact_sheet(cells, [(name, "") for name in names], columns=2)
    pitch, lines = sheet.shape[1] // 3, 36
    assert sheet.shape == (3, 3 * (lines + 20 + 10), 2 * 90)
    text = {}
    for i, name in enumerate(names):
        top, left = (i // 2) * pitch, (i % 2) * 90
        assert (sheet[:, top + lines : top + lines + 20, left : left + 90] == 40 * (i + 1)).all()
        text[i] = sheet[:, top : top + lines // 2, left : left + 90]
        assert (text[i] < 128).any() == bool(name)
        assert (sheet[:, top + lines // 2 : top + lines, left : left + 90] == 255).all()
    assert (sheet[:, 2 * pitch :, 90:] == 255).all()  # nothing beside the last
    assert not torch.equal(text[2], text[3])  # the end of a long name is what shows


def test_stacked_parts_are_flush_left_on_white():
    one, two = torch.zeros(3, 2, 4, dtype=torch.uint8), torch.full((3, 1, 6), 9, dtype=torch.uint8)
    found = stack([one, two])
    assert found.shape == (3, 3, 6)
    assert torch.equal(found[:, :2, :4], one) and torch.equal(found[:, 2:], two)
    assert (found[:, :2, 4:] == 255).all()


def test_a_heading_is_as_wide_as_its_text():
    short, long = heading("nats"), heading("nats per pixel")
    assert short.shape[2] < long.shape[2]
    for image in (short, long):
        assert (image[:, :, [0, -1]] == 255).all() and (image < 128).any()
