import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_igpt.report import (
    DARK,
    LIGHT,
    drawing,
    facts,
    legend,
    picture,
    pixels,
    plot_layers,
    plot_loss,
    section,
    table,
    write_page,
)
from tests.browser import check_page

LOSS = {"training": (list(range(30)), [3 - step / 15 for step in range(30)]), "validation": ([9, 29], [2.5, 1.2])}


def contrast(one, other):
    """WCAG 2's ratio of two colours as #rrggbb."""

    def luminance(color):
        parts = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        parts = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return parts @ (0.2126, 0.7152, 0.0722)

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colors", [LIGHT, DARK])
def test_text_and_lines_stand_out(colors):
    assert contrast(colors.ink, colors.paper) >= 4.5
    for line in (colors.first, colors.second, colors.level, *colors.others):
        assert contrast(line, colors.paper) >= 3


def svgs(markup):
    """The texts of all SVG pictures."""
    return [base64.b64decode(data).decode() for data in re.findall(r"svg\+xml;base64,([^\"]*)", markup)]


def test_a_plot_is_a_file_and_two_drawings_in_the_page(tmp_path):
    plot = plot_loss(LOSS, {"uniform": 2.77}, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as image:
        assert image.size == (960, 640) and image.convert("RGB").getpixel((0, 0)) == (255, 255, 255)
    markup = drawing(plot, 'a "plot"', "caption & more")
    assert 'alt="a &quot;plot&quot;"' in markup and "caption &amp; more" in markup
    assert re.search(r'<source media="\(prefers-color-scheme: dark\)" srcset="data:', markup)
    dark, light = svgs(markup)
    for text, colors in ((dark, DARK), (light, LIGHT)):
        assert all(word in text for word in ("uniform (2.77)", "optimiser steps", "nats per pixel", "validation"))
        assert colors.first in text and colors.level in text and colors.ink in text
        assert not re.search(r'(?:href|src)="http', text)
    assert LIGHT.first not in dark and DARK.first not in light
    assert drawing(plot_loss(LOSS, {"uniform": 2.77}, tmp_path / "loss.png"), 'a "plot"', "caption & more") == markup


def test_long_curves_stay_small(tmp_path):
    noise = torch.rand(30_000, generator=torch.manual_seed(0)).tolist()
    noise[12_345], noise[23_456] = 7.0, -7.0
    plot = plot_loss({"training": (range(30_000), noise)}, {}, tmp_path / "long.png")
    points = plot.light.axes[0].get_lines()[0].get_xydata().tolist()
    assert len(points) <= 1002 and [12_345, 7] in points and [23_456, -7] in points  # no peak is lost
    assert points[0] == [0, noise[0]] and points[-1] == [29_999, noise[-1]]
    assert points == sorted(points) and all(noise[int(step)] == value for step, value in points)
    assert len(drawing(plot, "alt", "caption")) < 150_000


def test_layers_have_ticks_that_can_be_read(tmp_path):
    plot = plot_layers({"test": {layer: layer / 48 for layer in range(49)}}, {}, tmp_path / "layers.png")
    for figure in plot:
        assert list(figure.axes[0].get_xticks()) == list(range(0, 49, 5))


def test_small_images_are_one_transparent_picture():
    rows = torch.arange(2 * 3, dtype=torch.uint8).view(2, 3, 1, 1, 1).expand(2, 3, 3, 4, 4)
    markup = pixels(rows, "alt", "caption", headings=["a", "<b>", "c"], scale=5)
    assert "<span>&lt;b&gt;</span>" in markup and 'style="width: 80px"' in markup
    data = base64.b64decode(re.search(r"png;base64,([^\"]*)", markup)[1])
    image = np.array(Image.open(io.BytesIO(data)))
    assert image.shape == (11, 16, 4)
    assert [image[1 + 5 * row, 1 + 5 * column].tolist() for row in range(2) for column in range(3)] == [
        [value, value, value, 255] for value in range(6)
    ]
    assert (image[0, :, 3] == 0).all() and (image[:, 5, 3] == 0).all()
    assert (image[..., 3] == 255).sum() == 6 * 16


def everything(folder):
    """A page with all there is, with long words and wide tables."""
    plot = plot_loss(LOSS, {"uniform": 2.77}, folder / "loss.png")
    Image.effect_noise((900, 300), 50).convert("RGB").save(folder / "wide.png")
    rows = torch.zeros(1, 10, 3, 8, 8, dtype=torch.uint8)
    heat = torch.zeros(256, 3, dtype=torch.uint8)
    wide = [[f"a cell of many words {column}" for column in range(12)]] * 2
    sections = [
        section("A" * 80, "A paragraph, and a path: " + "/folder" * 40),
        section("Curve", drawing(plot, "a curve", "caption")),
        section("Wide", picture(folder / "wide.png", "noise", "caption " + "c" * 99), table(wide, ["head"] * 12)),
        section("Small", pixels(rows, "black", "caption", headings=["1.234"] * 10, below=legend(heat, "low", "high"))),
        section("Made", facts("how", [("command", "x" * 300)])),
    ]
    write_page(folder / "page.html", "Title " + "t" * 60, "subtitle", sections)
    return folder / "page.html"


@pytest.mark.slow
def test_a_real_browser_finds_nothing_wrong(tmp_path):
    shown = check_page(everything(tmp_path))
    assert shown["light"][0] != shown["dark"][0] and shown["light"][1:] == shown["dark"][1:]
