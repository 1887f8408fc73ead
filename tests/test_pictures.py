import math
from collections import Counter

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_igpt.palette import Palette
from lightning_igpt.pictures import (
    DARK,
    LIGHT,
    image_grid,
    plot_curves,
    save_png,
    surprise_bar,
    surprise_colors,
    surprise_limit,
    surprise_map,
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


def test_captions_stand_above_their_columns():
    rows = [torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
    plain, headed = image_grid(rows), image_grid(rows, captions=["", "truth"])
    extra = headed.shape[1] - plain.shape[1]
    assert torch.equal(headed[:, extra:], plain)
    assert (headed[:, :extra, :130] == 255).all() and (headed[:, :extra, 130:] < 128).any()
    with pytest.raises(ValueError, match="1 captions for 2 columns"):
        image_grid(rows, captions=["one"])


def test_grid_refuses_what_it_cannot_draw():
    row = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for rows in ([row, row[:1]], [row.float()], row):  # ragged, floats, no rows
        with pytest.raises(ValueError, match=r"uint8 \(C, 3, H, W\)"):
            image_grid(rows)


@pytest.mark.parametrize("spec", ["openai", "gray:2", "gray:5", "gray:256"])
def test_swatch_shows_every_color_once(spec):
    rgb = Palette.load(spec).rgb
    side = 5
    sheet = swatch(rgb, side=side)
    squares = sheet[:, 1 + side // 2 :: side + 1, 1 + side // 2 :: side + 1].flatten(1).T
    shown, expected = (Counter(tuple(color) for color in colors.tolist()) for colors in (squares, rgb))
    assert expected <= shown
    assert set(shown - expected) <= {(112, 112, 112)}  # the bare sheet behind the last row


def test_grays_form_a_ramp():
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


def test_surprise_is_even_from_zero_to_the_limit_and_clips():
    values = torch.tensor([[0.0, 0.99 / 64, 1.0, 2.0], [3.99, 4.0, torch.inf, -1.0]])
    expected = surprise_colors()[torch.tensor([[0, 0, 64, 128], [255, 255, 255, 0]])]  # (2, 4, 3)
    colors = surprise_map(values, limit=4.0)
    assert colors.dtype == torch.uint8 and torch.equal(colors, expected.permute(2, 0, 1))
    assert torch.equal(surprise_map(values.expand(2, 5, 2, 4) * 10, limit=40.0), colors.expand(2, 5, 3, 2, 4))
    assert np.array_equal(surprise_colors(), matplotlib.colormaps["magma"](np.arange(256), bytes=True)[:, :3])


def test_the_scale_of_surprise_passes_a_uniform_guess():
    assert surprise_limit(torch.ones(10, 64), 16) == pytest.approx(1.25 * math.log(16))
    nats = torch.arange(1000.0)
    assert (nats > surprise_limit(nats, 16)).float().mean() == pytest.approx(0.01, abs=0.001)


def test_the_legend_of_surprise_has_its_marks_in_place():
    bar = surprise_bar(2 * math.log(16), 16, width=256)
    margin = (bar.shape[2] - 256) // 2
    assert torch.equal(bar[:, 0, margin : margin + 256], surprise_colors().T)
    marks = (bar[:, 10] == 0).all(0).nonzero().flatten() - margin
    assert marks.tolist() == [0, round(0.5 * 255), 255]


def contrast(one, other):
    """WCAG 2's ratio of two colors as #rrggbb."""

    def luminance(color):
        parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        parts = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return parts @ (0.2126, 0.7152, 0.0722)

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_text_and_lines_stand_out(theme):
    assert contrast(theme.ink, theme.paper) >= 4.5
    for line in (theme.first, theme.second, theme.level, *theme.others):
        assert contrast(line, theme.paper) >= 3


def test_long_curves_keep_their_peaks():
    noise = torch.rand(30_000, generator=torch.manual_seed(0)).tolist()
    noise[12_345], noise[23_456] = 7.0, -7.0
    plot = plot_curves({"training": (range(30_000), noise)})
    points = plot.light.axes[0].get_lines()[0].get_xydata().tolist()
    assert len(points) <= 1002 and [12_345, 7] in points and [23_456, -7] in points
    assert points[0] == [0, noise[0]] and points[-1] == [29_999, noise[-1]]
    assert points == sorted(points) and all(noise[int(step)] == value for step, value in points)


def test_a_plot_has_every_curve_and_level_in_both_themes():
    plot = plot_curves({"test": ([0, 1], [0.2, 0.4]), "validation": ([0, 1], [0.3, 0.5])}, {"chance": 0.1}, ylabel="y")
    for figure, theme in zip(plot, (LIGHT, DARK), strict=True):
        (axes,) = figure.axes
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert lines.keys() == {"test", "validation", "chance (0.10)"}
        assert lines["test"].get_color() == theme.first
        assert lines["test"].get_zorder() > lines["validation"].get_zorder()
        assert lines["validation"].get_ydata().tolist() == [0.3, 0.5] and axes.get_ylabel() == "y"
        assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)
