import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_igpt.pictures import DARK, LIGHT, plot_curves
from lightning_igpt.report import drawing, facts, picture, pixels, section, table, write_page
from tests.browser import check_page

LOSS = {"training": (list(range(30)), [3 - step / 15 for step in range(30)]), "validation": ([9, 29], [2.5, 1.2])}


def svgs(markup):
    """The texts of all SVG pictures."""
    return [base64.b64decode(data).decode() for data in re.findall(r"svg\+xml;base64,([^\"]*)", markup)]


def test_a_plot_is_two_drawings_in_the_page():
    markup = drawing(plot_curves(LOSS, {"uniform": 2.77}), 'a "plot"', "caption & more")
    assert 'alt="a &quot;plot&quot;"' in markup and "caption &amp; more" in markup
    assert re.search(r'<source media="\(prefers-color-scheme: dark\)" srcset="data:', markup)
    dark, light = svgs(markup)
    for text, colors in ((dark, DARK), (light, LIGHT)):
        assert all(word in text for word in ("uniform (2.77)", "optimizer steps", "nats per pixel", "validation"))
        assert colors.first in text and colors.level in text and colors.ink in text
        assert not re.search(r'(?:href|src)="http', text)
    assert LIGHT.first not in dark and DARK.first not in light
    assert drawing(plot_curves(LOSS, {"uniform": 2.77}), 'a "plot"', "caption & more") == markup


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
    plot = plot_curves(LOSS, {"uniform": 2.77})
    Image.effect_noise((900, 300), 50).convert("RGB").save(folder / "wide.png")
    rows = torch.zeros(1, 10, 3, 8, 8, dtype=torch.uint8)
    wide = [[f"a cell of many words {column}" for column in range(12)]] * 2
    sections = [
        section("A" * 80, "A paragraph, and a path: " + "/folder" * 40),
        section("Curve", drawing(plot, "a curve", "caption")),
        section("Wide", picture(folder / "wide.png", "caption " + "c" * 99), table(wide, ["head"] * 12)),
        section("Small", pixels(rows, "black", "caption", headings=["1.234"] * 10)),
        section("Made", facts("how", [("command", "x" * 300)])),
    ]
    write_page(folder / "page.html", "Title " + "t" * 60, "subtitle", sections)
    return folder / "page.html"


@pytest.mark.slow
def test_a_real_browser_finds_nothing_wrong(tmp_path):
    shown = check_page(everything(tmp_path))
    assert shown["light"][0] != shown["dark"][0] and shown["light"][1:] == shown["dark"][1:]
