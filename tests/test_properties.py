"""Laws that hold for every input: palettes, orders, colours of images, configs."""

import json
import math
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.data.order import EndlessOrder, EvalOrder
from lightning_igpt.lookup import _SPLIT, _Cells, _fill, _prune, _split
from lightning_igpt.palette import Palette
from lightning_igpt.rgb import to_rgb

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
    """Colours, some of them a few roundings from each other."""
    colors = st.lists(st.tuples(channels, channels, channels), min_size=2, max_size=size)
    return colors.map(lambda rows: np.unique(np.array(rows, dtype=np.float32) + np.float32(0), axis=0))


def shuffled(rows):
    return st.permutations(range(len(rows))).map(lambda order: rows[list(order)])


palettes = clusters().filter(lambda rows: len(rows) >= 2).flatmap(shuffled)


def part_of_table(colors, corner):
    """What build_table does for one of its 64 large cells, (64, 64, 64)."""
    centres, everyone = np.ascontiguousarray(colors.T, dtype=np.float64), np.arange(len(colors))
    table = np.empty(1 << 24, dtype=np.int16)
    leaves = table.reshape(64, 4, 64, 4, 64, 4).transpose(0, 2, 4, 1, 3, 5)
    corner = _SPLIT[:, corner] * 64
    cells = _prune(_Cells(corner[:, None], np.array([everyone.size]), everyone), centres, 64)
    for edge in (16, 4):
        cells = _prune(_split(cells, edge), centres, edge)
    _fill(leaves, cells, centres)
    part = tuple(slice(low, low + 64) for low in corner)
    return table.reshape(256, 256, 256)[part], part


@law
@given(palettes, st.integers(0, 63))
def test_the_nearest_colour_is_that_of_brute_force(colors, corner):
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


@settings(law, max_examples=2)  # a table takes a second and 32 MB
@given(palettes.filter(lambda rows: len(rows) >= 4))
def test_tokens_are_those_of_brute_force(colors):
    palette = Palette(colors)
    own = palette.rgb.numpy()
    others = np.random.default_rng(len(colors)).integers(0, 256, (500, 3), dtype=np.uint8)
    pixels = np.concatenate([own, np.clip(own.astype(int) + 1, 0, 255).astype(np.uint8), others])
    red, green, blue = ((LEVELS[pixels][:, None] - colors.astype(np.float64)) ** 2).transpose(2, 0, 1)
    distances = (red + green) + blue
    tokens = palette.quantize(torch.from_numpy(pixels.T.copy())[None, :, None])
    assert tokens[0].tolist() == np.argmin(distances, axis=1).tolist()


@settings(law, max_examples=2)  # a table takes a second and 32 MB
@given(hnp.arrays(np.uint8, st.tuples(st.integers(2, 40), st.just(3)), elements=st.integers(0, 255)))
def test_colours_that_are_bytes_come_back(rgb):
    rgb = np.unique(rgb, axis=0)
    assume(len(rgb) >= 2)
    palette = Palette(LEVELS[rgb])
    tokens = torch.arange(len(rgb))
    images = torch.from_numpy(rgb).T[None, :, None]
    assert torch.equal(palette.rgb, torch.from_numpy(rgb)) and torch.equal(palette.quantize(images)[0], tokens)


@law
@given(palettes, st.randoms(use_true_random=False))
def test_another_colour_or_order_is_another_palette(colors, random):
    palette = Palette(colors)
    row, channel = random.randrange(len(colors)), random.randrange(3)
    changed = colors.copy()
    changed[row, channel] = np.nextafter(changed[row, channel], np.float32(-changed[row, channel] or 0.5))
    moved = np.roll(colors, 1, axis=0)
    for other in (changed, moved):
        if len(np.unique(other, axis=0)) == len(other) and np.abs(other).max() <= 1:
            assert Palette(other) != palette and Palette(other).sha256 != palette.sha256
    assert Palette(colors.copy()).sha256 == palette.sha256 and hash(Palette(colors.copy())) == hash(palette)


@law
@given(palettes)
def test_palettes_survive_every_way_of_writing_them(tmp_path_factory, colors):
    palette, folder = Palette(colors), tmp_path_factory.mktemp("palettes")
    palette.save(folder / "p.npy")
    (folder / "preprocessor_config.json").write_text(json.dumps({"clusters": palette.to_list()}))
    ways = [palette.spec, json.loads(json.dumps(palette.spec)), palette.colors, folder / "p.npy", str(folder)]
    assert all(Palette.load(way) == palette for way in ways)


@law
@given(palettes)
def test_a_colour_twice_is_refused(colors):
    with pytest.raises(ValueError, match=f"colours 0 and {len(colors)} are the same"):
        Palette(np.concatenate([colors, colors[:1]]))


# Orders

sizes = st.integers(1, 60)


@st.composite
def orders(draw):
    """(options of an order, devices, accumulated batches): all of them valid."""
    world, accumulate = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 4))
    batch_size = world * accumulate * draw(st.integers(1, 5))
    rows = batch_size + draw(st.integers(0, 60))
    options = {"n_images": rows, "batch_size": batch_size, "seed": draw(st.integers(0, 2**31)), "n_steps": 1}
    return options, world, accumulate


@law
@given(orders(), st.integers(0, 3))
def test_a_pass_takes_each_row_once_but_for_the_rest(drawn, number_of_pass):
    options, *_ = drawn
    order, n_images = EndlessOrder(**options), options["n_images"]
    per_pass = n_images // options["batch_size"]
    steps = range(number_of_pass * per_pass, (number_of_pass + 1) * per_pass)
    draws = [draw for step in steps for draw in order.draws(step)]
    rows = [row for row, _ in draws]
    assert len(set(rows)) == len(rows) == per_pass * options["batch_size"] and set(rows) <= set(range(n_images))
    assert len({sample for _, sample in draws}) == len(draws)
    assert all(sample // n_images == number_of_pass for _, sample in draws)


@law
@given(orders(), st.lists(st.integers(0, 500), min_size=1, max_size=6))
def test_any_step_is_the_same_for_any_history_devices_and_accumulation(drawn, numbers):
    options, world, accumulate = drawn
    ranks = [EndlessOrder(**options, rank=rank, world_size=world, accumulate=accumulate) for rank in range(world)]
    for number in numbers:
        whole, at_once = list(EndlessOrder(**options).draws(number)), ranks[0].at_once
        shares = [list(rank.draws(number)) for rank in ranks]
        slices = [share[m * at_once : (m + 1) * at_once] for m in range(accumulate) for share in shares]
        assert list(chain(*slices)) == whole


@law
@given(orders(), st.integers(0, 200), st.integers(1, 9))
def test_a_run_continues_from_any_step(drawn, step, n_steps):
    options = drawn[0] | {"n_steps": n_steps}
    resumed = EndlessOrder(**options, first_step=lambda: step)
    fresh = EndlessOrder(**options | {"n_steps": step + n_steps})
    assert list(resumed) == list(fresh)[step * options["batch_size"] :]
    assert len(resumed) == n_steps * options["batch_size"]


@law
@given(sizes, st.integers(1, 70), st.integers(1, 5))
def test_evaluation_takes_each_row_once(rows, batch_size, world):
    assume(rows >= world)
    ranks = [EvalOrder(rows, batch_size=batch_size, rank=rank, world_size=world) for rank in range(world)]
    batches = [list(rank) for rank in ranks]
    assert [row for row, _ in chain(*chain(*batches))] == list(range(rows))
    assert {len(found) for found in batches} == {len(ranks[0])} and all(chain(*batches))


# Colours of images

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


@law
@given(images(["RGB"]))
def test_opaque_rgb_stays(image):
    image.info.clear()
    assert to_rgb(image) is image
    opaque = image.convert("RGBA")
    assert to_rgb(opaque, background=(1, 2, 3)).tobytes() == image.tobytes()


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
    monkeypatch.setattr("lightning_igpt.rgb._STRIP", 97 * 10)
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


@law
@given(st.dictionaries(st.one_of(st.text(max_size=8), st.integers(), st.none()), plain, min_size=1, max_size=3))
def test_unknown_fields_are_named(fields):
    assume(not set(fields) & set(FIELDS))
    with pytest.raises(ValueError, match="unknown network fields"):
        ImageGPTConfig.resolve(fields)


@law
@given(anything)
def test_what_is_no_config_says_so(value):
    assume(value not in list(PRESETS) and value != {})
    with pytest.raises(ValueError, match="network"):
        ImageGPTConfig.resolve(value if not isinstance(value, str) else [value])
