import io

import numpy as np
import pytest
from PIL import Image

from lightning_igpt.rgb import to_rgb

PALETTE = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120]
COLORS = [[(10, 20, 30), (40, 50, 60)], [(70, 80, 90), (100, 110, 120)]]


def image_of(mode, values, size=(2, 2)):
    image = Image.new(mode, size)
    image.putdata(values)
    return image


def indexed(mode="P"):
    image = image_of(mode, [0, 1, 2, 3] if mode == "P" else [(0, 255), (1, 255), (2, 0), (3, 255)])
    image.putpalette(PALETTE)
    return image


def through_png(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return Image.open(file)


def grey(rows):
    return [[(value,) * 3 for value in row] for row in rows]


def word(order):
    return np.array([0, 257, 128, 65535], dtype=f"{order}u2").tobytes()


WHITE = (255, 255, 255)
GOLDEN = {
    "RGB": (image_of("RGB", COLORS[0] + COLORS[1]), COLORS),
    "L": (image_of("L", [0, 1, 128, 255]), grey([[0, 1], [128, 255]])),
    "1": (image_of("1", [0, 255, 255, 0]), grey([[0, 255], [255, 0]])),
    "P": (indexed(), COLORS),
    "PA": (indexed("PA"), [COLORS[0], [WHITE, COLORS[1][1]]]),
    "LA": (image_of("LA", [(0, 255), (0, 0), (0, 128), (200, 128)]), grey([[0, 255], [127, 227]])),
    "RGBA": (
        image_of("RGBA", [(200, 100, 0, 128), (1, 2, 3, 0), (1, 2, 3, 255), (0, 0, 0, 51)]),
        [[(227, 177, 127), WHITE], [(1, 2, 3), (204, 204, 204)]],
    ),
    "RGBa": (image_of("RGBa", [(100, 50, 0, 128)] * 4), [[(227, 177, 127)] * 2] * 2),
    "CMYK": (
        image_of("CMYK", [(0, 0, 0, 0), (0, 255, 255, 0), (51, 0, 102, 127), (0, 0, 0, 255)]),
        [[WHITE, (255, 0, 0)], [(102, 128, 77), (0, 0, 0)]],
    ),
    "YCbCr": (image_of("YCbCr", [(76, 85, 255), (0, 128, 128), (255, 128, 128), (100, 128, 128)]),
              [[(254, 0, 0), (0, 0, 0)], [WHITE, (100, 100, 100)]]),
    "HSV": (image_of("HSV", [(0, 255, 255), (0, 0, 7), (85, 255, 255), (0, 0, 255)]),
            [[(255, 0, 0), (7, 7, 7)], [(0, 255, 0), WHITE]]),
    "I": (image_of("I", [0, 257, 128, 65535]), grey([[0, 1], [0, 255]])),
    "I;16": (Image.frombytes("I;16", (2, 2), word("<")), grey([[0, 1], [0, 255]])),
    "I;16L": (Image.frombytes("I;16L", (2, 2), word("<")), grey([[0, 1], [0, 255]])),
    "I;16B": (Image.frombytes("I;16B", (2, 2), word(">")), grey([[0, 1], [0, 255]])),
    "I;16N": (Image.frombytes("I;16N", (2, 2), word("=")), grey([[0, 1], [0, 255]])),
}  # fmt: skip


@pytest.mark.parametrize("mode", GOLDEN)
def test_every_mode_has_its_rule(mode):
    image, expected = GOLDEN[mode]
    before = image.tobytes()
    result = to_rgb(image)
    assert image.mode == mode
    assert result.mode == "RGB"
    assert np.asarray(result).tolist() == [[list(pixel) for pixel in row] for row in expected]
    assert image.tobytes() == before


def test_16_bits_round_to_the_nearest_of_8():
    values = np.arange(65536, dtype="<u2")
    result = np.asarray(to_rgb(Image.frombytes("I;16", (256, 256), values.tobytes())))[..., 0].reshape(-1)
    assert (result == np.rint(values / 257)).all()


def test_a_16_bit_png_does_not_clip():
    image = through_png(Image.fromarray(np.array([[0, 32896], [514, 65535]], dtype=np.uint16)))
    assert image.mode.startswith("I")
    assert np.asarray(to_rgb(image))[..., 1].tolist() == [[0, 128], [2, 255]]


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (indexed(), {"transparency": 2}, [COLORS[0], [WHITE, COLORS[1][1]]]),
        (indexed(), {"transparency": b"\xff\x00\xff\xff"}, [[COLORS[0][0], WHITE], COLORS[1]]),
        (image_of("L", [0, 1, 128, 255]), {"transparency": 1}, grey([[0, 255], [128, 255]])),
        (image_of("RGB", COLORS[0] + COLORS[1]), {"transparency": (10, 20, 30)}, [[WHITE, COLORS[0][1]], COLORS[1]]),
    ],
    ids=["P index", "P alphas", "L key", "RGB key"],
)
def test_transparent_pngs_show_the_background(image, options, expected):
    result = np.asarray(to_rgb(through_png(image, **options)))
    assert result.tolist() == [[list(pixel) for pixel in row] for row in expected]


def test_the_background_is_a_choice():
    result = to_rgb(image_of("LA", [(9, 0)] * 4), background=(1, 2, 3))
    assert np.asarray(result).tolist() == [[[1, 2, 3]] * 2] * 2


def test_adobe_cmyk_jpeg_is_not_inverted():
    file = io.BytesIO()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(file, "JPEG", quality=100)
    assert b"Adobe" in file.getvalue()  # the marker under which samples are stored inverted
    image = Image.open(file)
    assert image.mode == "CMYK"
    assert np.abs(np.asarray(to_rgb(image)).astype(int) - (255, 0, 0)).max() <= 2


def test_floats_are_refused():
    with pytest.raises(ValueError, match="mode F"):
        to_rgb(Image.new("F", (2, 2)))


@pytest.mark.parametrize("value", [-1, 65536])
def test_values_beyond_16_bits_are_refused(value):
    with pytest.raises(ValueError, match=rf"{value}.*65535"):
        to_rgb(image_of("I", [0, 0, 0, value]))
