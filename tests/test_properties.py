"""Laws that hold for every input: palettes, colors of images, configs."""

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.images import to_rgb
from lightning_igpt.lookup import _SPLIT, _Cells, _fill, _prune, _split
from lightning_igpt.palette import Palette

LEVELS = np.arange(256) / 127.5 - 1
law = settings(max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


# Palettes

exact = st.integers(0, 255).map(lambda byte: np.float32(byte / 127.5 - 1))  # bytes themselves: ties between them
halves = st.integers(0, 509).map(lambda half: np.float32(half / 255 - 1))  # and halfway between two bytes
anywhere = st.floats(-1, 1, width=32).map(np.float32)
near = st.tuples(exact, st.integers(-2, 2)).map(
    lambda pair: np.float32(np.clip(pair[0] + pair[1] * 6e-8, -1, 1))  # a rounding away from a byte: nearly a tie
)
channels = st.one_of(exact, halves, anywhere, near)


def clusters(size=12):
    """Colors, some of them a few roundings from each other."""
    colors = st.lists(st.tuples(channels, channels, channels), min_size=2, max_size=size)
    return colors.map(lambda rows: np.unique(np.array(rows, dtype=np.float32) + np.float32(0), axis=0))


def shuffled(rows):
    return st.permutations(range(len(rows))).map(lambda order: rows[list(order)])


palettes = clusters().filter(lambda rows: len(rows) >= 2).flatmap(shuffled)


def part_of_table(colors, corner):
    """What build_table does for one of its 64 large cells, (64, 64, 64)."""
    centers, all_ids = np.ascontiguousarray(colors.T, dtype=np.float64), np.arange(len(colors))
    table = np.empty(1 << 24, dtype=np.int16)
    leaves = table.reshape(64, 4, 64, 4, 64, 4).transpose(0, 2, 4, 1, 3, 5)
    corner = _SPLIT[:, corner] * 64
    cells = _prune(_Cells(corner[:, None], np.array([all_ids.size]), all_ids), centers, 64)
    for edge in (16, 4):
        cells = _prune(_split(cells, edge), centers, edge)
    _fill(leaves, cells, centers)
    part = tuple(slice(low, low + 64) for low in corner)
    return table.reshape(256, 256, 256)[part], part


@law
@given(palettes, st.integers(0, 63))
def test_the_nearest_color_is_that_of_brute_force(colors, corner):
    found, part = part_of_table(colors, corner)
    red, green, blue = (
        (LEVELS[channel][:, None] - colors[:, i].astype(np.float64)) ** 2 for i, channel in enumerate(part)
    )
    best, winner = np.full((64, 64, 64), np.inf), np.empty((64, 64, 64), np.int16)
    for number in range(len(colors)):
        distance = (red[:, None, None, number] + green[None, :, None, number]) + blue[None, None, :, number]
        winner[distance < best] = number  # strictly: the lowest number keeps a tie
        np.minimum(best, distance, out=best)
    assert np.array_equal(found, winner)


@law
@given(palettes)
def test_palettes_survive_every_way_of_writing_them(tmp_path_factory, colors):
    palette, folder = Palette(colors), tmp_path_factory.mktemp("palettes")
    palette.save(folder / "p.npy")
    (folder / "preprocessor_config.json").write_text(json.dumps({"clusters": palette.to_list()}))
    ways = [palette.spec, json.loads(json.dumps(palette.spec)), palette.colors, folder / "p.npy", str(folder)]
    assert all(Palette.load(way) == palette for way in ways)


# Colors of images

MODES = [
    *("1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "RGBX", "RGBa", "La"),
    *("I", "I;16", "I;16L", "I;16B", "I;16N"),
]


@st.composite
def images(draw, modes=tuple(MODES)):
    mode = draw(st.sampled_from(modes))
    width, height = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    image = Image.new(mode, (width, height))
    if mode == "I":
        values = draw(hnp.arrays(np.uint16, (height, width)))
        image = Image.fromarray(values.astype(np.int32), "I")
    else:
        size = len(image.tobytes())
        image.frombytes(draw(st.binary(min_size=size, max_size=size)))
    if mode in ("P", "PA"):
        colors = draw(st.integers(1, 256))
        image.putpalette(draw(st.binary(min_size=3 * colors, max_size=3 * colors)))
    key = {"P": st.integers(0, 255) | st.binary(max_size=256), "L": st.integers(0, 255), "1": st.sampled_from([0, 255])}
    key["RGB"] = st.tuples(*[st.integers(0, 255)] * 3)
    if mode in key and draw(st.booleans()):
        image.info["transparency"] = draw(key[mode])
    return image


@settings(law, max_examples=200)
@given(images(), st.tuples(*[st.integers(0, 255)] * 3))
def test_every_image_becomes_rgb_of_its_size(image, background):
    before = image.tobytes()
    result = to_rgb(image, background=background)
    assert result.mode == "RGB" and result.size == image.size and image.tobytes() == before
    assert np.asarray(result).shape == (image.height, image.width, 3) and np.asarray(result).dtype == np.uint8


@settings(law, max_examples=100)
@given(images(["RGBA", "LA"]), st.tuples(*[st.integers(0, 255)] * 3))
def test_transparency_is_the_formula(image, background):
    found = np.asarray(to_rgb(image, background=background)).astype(float)
    values = np.asarray(image).astype(float)
    colors, alpha = values[..., :-1], values[..., -1:] / 255
    expected = colors * alpha + np.array(background) * (1 - alpha)
    assert np.abs(found - expected).max() <= 1
    assert (found == expected)[np.broadcast_to((alpha == 0) | (alpha == 1), found.shape)].all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_large_images_are_those_of_their_parts(mode, monkeypatch):
    """They are converted in strips."""
    pixels = np.random.default_rng(0).bytes(97 * 89 * 4)
    image = Image.frombytes(mode, (97, 89), pixels[: len(Image.new(mode, (97, 89)).tobytes())])
    if mode == "P":
        image.putpalette(pixels[:768])
        image.info["transparency"] = pixels[1000:1256]
    whole = to_rgb(image).tobytes()
    monkeypatch.setattr("lightning_igpt.images._STRIP", 97 * 10)
    assert to_rgb(image).tobytes() == whole


# Configs

FIELDS = list(ImageGPTConfig().to_dict())
plain = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.floats(), st.text(max_size=5), st.sampled_from(["bert", "igpt"]),
    st.integers(10**3, 10**9), st.integers(5000, 9000).map(lambda digits: 10**digits), st.binary(max_size=3),
)  # fmt: skip
anything = st.recursive(plain, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner))
sound = st.fixed_dictionaries({}, optional={
    "n_layer": st.integers(1, 1000), "n_head": st.sampled_from([1, 2, 4]), "n_embd": st.sampled_from([4, 64, 4096]),
    "vocab_size": st.integers(1, 32768), "image_size": st.integers(1, 1024), "n_inner": st.none() | st.integers(1, 999),
    "objective": st.sampled_from(["autoregressive", "bert"]), "bias": st.booleans(), "dropout": st.floats(0, 0.99),
})  # fmt: skip


@settings(law, max_examples=50)
@given(sound, st.dictionaries(st.sampled_from(FIELDS), anything, max_size=3))
@example({}, {"n_inner": "64"})
@example({}, {"dropout": "0.1"})
@example({}, {"dropout": math.nan})
@example({}, {"objective": ["bert"]})
def test_a_config_is_sound_or_names_the_field(good, changes):
    try:
        config = ImageGPTConfig.resolve(good | changes)
    except ValueError as error:
        assert any(name in str(error) for name in changes) or "n_head" in str(error)
        assert len(str(error)) < 500
        return
    again = json.loads(json.dumps(config.to_dict()))
    assert ImageGPTConfig.resolve(again) == config and ImageGPTConfig.resolve(config) is config
    assert config.n_embd % config.n_head == 0 and config.n_positions == config.image_size**2
