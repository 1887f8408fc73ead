"""Pictures in the documentation are there, small and described in words; those for dark pages have a light twin."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

DOCS = Path(__file__).parents[1] / "docs"
PAGES = {path: path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md") if "_build" not in path.parts}
FILES = sorted((DOCS / "pictures").glob("*.png"))
DIRECTIVE = re.compile(r"^```\{image\} (\S+)\n((?::\w+: .*\n)*)```$", re.MULTILINE)


def shown():
    """(page, file, its words, its options) of every picture."""
    for page, text in PAGES.items():
        for target, options in DIRECTIVE.findall(text):
            found = dict(re.findall(r"^:(\w+): (.*)$", options, re.MULTILINE))
            yield page, (page.parent / target).resolve(), found.pop("alt", ""), found
        for words, target in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", text):
            yield page, (page.parent / target).resolve(), words, {}


def test_every_picture_is_there_and_has_words():
    pictures = list(shown())
    assert len(pictures) > 20
    for page, path, words, _ in pictures:
        assert path.exists(), (page, path)
        assert len(words) > 60, (page, path)


def test_light_and_dark_come_in_pairs_with_the_same_words():
    pictures = list(shown())
    light = [entry for entry in pictures if entry[3].get("class") == "only-light"]
    dark = [entry for entry in pictures if entry[3].get("class") == "only-dark"]
    assert [(page, f"{path.stem}-dark", words) for page, path, words, _ in light] == [
        (page, path.stem, words) for page, path, words, _ in dark
    ]
    assert len(light) + len(dark) == len([entry for entry in pictures if entry[3]])


def test_no_picture_lies_unused():
    assert {path for _, path, _, _ in shown()} >= set(FILES)


def test_they_are_small():
    assert max(path.stat().st_size for path in FILES) < 120_000
    assert sum(path.stat().st_size for path in FILES) < 1_200_000


@pytest.mark.parametrize("path", [path for path in FILES if path.stem.endswith("-dark")], ids=lambda path: path.stem)
def test_twins_have_one_size_and_another_ground(path):
    with Image.open(path) as dark, Image.open(path.with_name(f"{path.stem.removesuffix('-dark')}.png")) as light:
        assert dark.size == light.size
        corners = [np.array(image.convert("RGB"))[0, 0].tolist() for image in (light, dark)]
    assert corners == [[255, 255, 255], [0x13, 0x14, 0x16]]
