"""Pictures in the documentation are there, small and described in words; those for dark pages have a light twin."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {path: path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md") if "_build" not in path.parts}
FILES = sorted((DOCS / "pictures").glob("*.png"))


def shown():
    """(page, file, its words) of every picture."""
    for page, text in PAGES.items():
        for words, target in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", text):
            yield page, (page.parent / target).resolve(), words


def test_every_picture_is_there_and_has_words():
    pictures = list(shown())
    assert len(pictures) > 15
    for page, path, words in pictures:
        assert path.exists(), (page, path)
        assert len(words) > 60, (page, path)


def test_no_picture_lies_unused():
    light = {path for _, path, _ in shown()}
    assert light | {path.with_name(f"{path.stem}-dark.png") for path in light} >= set(FILES)


def test_they_are_small():
    assert max(path.stat().st_size for path in FILES) < 120_000
    assert sum(path.stat().st_size for path in FILES) < 1_200_000


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.endswith("-dark")], ids=lambda path: path.stem)
def test_twins_have_one_size_and_another_ground(path):
    with Image.open(path) as dark, Image.open(path.with_name(f"{path.stem.removesuffix('-dark')}.png")) as light:
        assert dark.size == light.size
        corners = [np.array(image.convert("RGB"))[0, 0].tolist() for image in (light, dark)]
    assert corners == [[255, 255, 255], [0x13, 0x14, 0x16]]
