import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from lightning_igpt.images import BadImageError, decode, to_rgb
from tests.image_files import encoded, noise


def row(content, path=None):
    return {"bytes": content, "path": path}


def same(left, right):
    return left.mode == right.mode == "RGB" and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "JPEG", "GIF", "MPO"])
def test_formats_are_what_pillow_says(format):
    content = encoded(noise(), format, **({"lossless": True} if format == "WEBP" else {}))
    assert same(decode(row(content)), Image.open(io.BytesIO(content)).convert("RGB"))
    assert format in ("JPEG", "GIF", "MPO") or same(decode(row(content)), noise())


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(noise(), format, exif=exif)
    assert same(decode(row(content)), ImageOps.exif_transpose(Image.open(io.BytesIO(content))))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


JPEG = encoded(noise((64, 64)), "JPEG")
BAD = {
    "truncated": (JPEG[: len(JPEG) // 2], "truncated"),
    "cut in the header": (JPEG[:10], "cannot be decoded"),
    "empty": (b"", "0 bytes"),
    "above the limit": (png_header(9_000, 9_000), "9000 x 9000 = 81,000,000 pixels, more than the limit of 64,000,000"),
    "a bomb": (png_header(60_000, 60_000), "too large"),
    "floats": (encoded(Image.new("F", (2, 2)), "TIFF"), "mode F"),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("error")  # in particular, refused before Pillow decodes anything
def test_bad_images(content, message):
    with pytest.raises(BadImageError, match=message):
        decode(row(content))


def png(*extra):
    """4 x 4 pixels, with chunks before them."""
    header = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(4 * 13)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + pixels + chunk(b"IEND", b"")


def gif(width, height, frame=(4, 4)):
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + bytes([2, 2, 0x4C, 1, 0, 0]) + b";"


def repeated_scans(size, times):
    """A progressive JPEG whose last scan comes again and again; each makes the decoder walk over the whole picture."""
    content = encoded(Image.new("RGB", size), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * times + b"\xff\xd9"


def repeated_exif(times):
    content, part = encoded(noise(), "JPEG"), b"Exif\0\0ab"
    return content[:2] + (b"\xff\xe1" + struct.pack(">H", 2 + len(part)) + part) * times + content[2:]


INFLATED = zlib.compress(bytes(30_000_000))  # 30 MB in 30 kB
TEXTS = [chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(900_000)))] * 99
BOMBS = {
    "GIF screen": (gif(60_000, 60_000), "too large"),
    "GIF above the limit": (gif(4, 4, (9_000, 9_000)), "9000 x 9000 = 81,000,000 pixels, more than the limit"),
    "PNG iCCP": (png(chunk(b"iCCP", b"x\0\0" + INFLATED)), "Decompressed data too large"),
    "PNG zTXt": (png(chunk(b"zTXt", b"x\0\0" + INFLATED)), "Decompressed data too large"),
    "PNG iTXt": (png(chunk(b"iTXt", b"x\0\1\0\0\0" + INFLATED)), "Decompressed data too large"),
    "PNG texts": (png(*TEXTS), "Too much memory used in text"),
    "JPEG scans": (repeated_scans((2000, 2000), 1000), "1,009 scans of 2000 x 2000 pixels"),
    "JPEG small scans": (repeated_scans((200, 200), 60_000), "60,009 scans of 200 x 200 pixels"),
    "JPEG EXIF": (repeated_exif(100_000), "more than 1,000 parts of EXIF data"),
}


@pytest.mark.parametrize("content, message", BOMBS.values(), ids=BOMBS)
@pytest.mark.parametrize("from_path", [False, True])
def test_bombs_are_refused_at_once(tmp_path, content, message, from_path):
    (tmp_path / "a.png").write_bytes(content)
    start = time.process_time()
    with pytest.raises(BadImageError, match=message):
        decode(row(None, str(tmp_path / "a.png")) if from_path else row(content))
    assert time.process_time() - start < 1


OTHERS = ["ICO", "ICNS", "PCX", "PPM", "TGA", "JPEG2000", "DDS", "SGI", "PDF", "EPS"]
POLYGLOTS = {
    **{name: encoded(noise((64, 64)), name) for name in OTHERS},
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "PSD": b"8BPS\0\1" + bytes(100),
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(100),
}


@pytest.mark.parametrize("content", POLYGLOTS.values(), ids=POLYGLOTS)
def test_other_formats_are_refused_whatever_their_name(tmp_path, monkeypatch, content):
    monkeypatch.setattr("subprocess.Popen", None)
    (tmp_path / "a.png").write_bytes(content)
    for value in (row(content, "a.png"), row(None, str(tmp_path / "a.png"))):
        with pytest.raises(BadImageError, match="not an image of a known format"):
            decode(value)


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


def gray(rows):
    return [[(value,) * 3 for value in row] for row in rows]


def word(order):
    return np.array([0, 257, 128, 65535], dtype=f"{order}u2").tobytes()


WHITE = (255, 255, 255)
GOLDEN = {
    "RGB": (image_of("RGB", COLORS[0] + COLORS[1]), COLORS),
    "L": (image_of("L", [0, 1, 128, 255]), gray([[0, 1], [128, 255]])),
    "1": (image_of("1", [0, 255, 255, 0]), gray([[0, 255], [255, 0]])),
    "P": (indexed(), COLORS),
    "PA": (indexed("PA"), [COLORS[0], [WHITE, COLORS[1][1]]]),
    "LA": (image_of("LA", [(0, 255), (0, 0), (0, 128), (200, 128)]), gray([[0, 255], [127, 227]])),
    "RGBA": (
        image_of("RGBA", [(200, 100, 0, 128), (1, 2, 3, 0), (1, 2, 3, 255), (0, 0, 0, 51)]),
        [[(227, 177, 127), WHITE], [(1, 2, 3), (204, 204, 204)]],
    ),
    "RGBa": (image_of("RGBa", [(100, 50, 0, 128)] * 4), [[(227, 177, 127)] * 2] * 2),
    "CMYK": (
        image_of("CMYK", [(0, 0, 0, 0), (0, 255, 255, 0), (51, 0, 102, 127), (0, 0, 0, 255)]),
        [[WHITE, (255, 0, 0)], [(102, 128, 77), (0, 0, 0)]],
    ),
    "I": (image_of("I", [0, 257, 128, 65535]), gray([[0, 1], [0, 255]])),
    "I;16": (Image.frombytes("I;16", (2, 2), word("<")), gray([[0, 1], [0, 255]])),
    "I;16L": (Image.frombytes("I;16L", (2, 2), word("<")), gray([[0, 1], [0, 255]])),
    "I;16B": (Image.frombytes("I;16B", (2, 2), word(">")), gray([[0, 1], [0, 255]])),
    "I;16N": (Image.frombytes("I;16N", (2, 2), word("=")), gray([[0, 1], [0, 255]])),
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


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (indexed(), {"transparency": 2}, [COLORS[0], [WHITE, COLORS[1][1]]]),
        (indexed(), {"transparency": b"\xff\x00\xff\xff"}, [[COLORS[0][0], WHITE], COLORS[1]]),
        (image_of("L", [0, 1, 128, 255]), {"transparency": 1}, gray([[0, 255], [128, 255]])),
        (image_of("RGB", COLORS[0] + COLORS[1]), {"transparency": (10, 20, 30)}, [[WHITE, COLORS[0][1]], COLORS[1]]),
    ],
    ids=["P index", "P alphas", "L key", "RGB key"],
)
def test_transparent_pngs_show_the_background(image, options, expected):
    result = np.asarray(to_rgb(through_png(image, **options)))
    assert result.tolist() == [[list(pixel) for pixel in row] for row in expected]


@pytest.mark.parametrize("value", [-1, 65536])
def test_values_beyond_16_bits_are_refused(value):
    with pytest.raises(ValueError, match=rf"{value}.*65535"):
        to_rgb(image_of("I", [0, 0, 0, value]))


# Depths: files written by hand, so that every expected byte is arithmetic
def packed(samples, bits, order=">"):
    """Rows of samples (H, W * C) as a file holds them."""
    if bits == 16:
        return [np.array(row, f"{order}u2").tobytes() for row in samples]
    texts = ["".join(f"{value:0{bits}b}" for value in row) for row in samples]
    return [int(text.ljust(-len(text) // 8 * -8, "0"), 2).to_bytes(-(-len(text) // 8), "big") for text in texts]


def png_of(samples, bits, channels, key=None):
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", len(samples[0]) // channels, len(samples), bits, kind, 0, 0, 0)
    transparent = b"" if key is None else chunk(b"tRNS", struct.pack(f">{channels}H", *key))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed(samples, bits))))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + transparent + pixels + chunk(b"IEND", b"")


def tiff_of(samples, bits, channels, photometric=None, order="<", compression=1, planes=1):
    data = b"".join(packed(samples, bits, order))
    data, n_bits = (zlib.compress(data) if compression == 8 else data) + b"\0", struct.pack(f"{order}4H", *[bits] * 4)
    height, kind = len(samples), (1 if channels == 1 else 2) if photometric is None else photometric
    tags = [(256, len(samples[0]) // channels), (257, height), (258, bits), (259, compression), (262, kind), (273, 16)]
    tags += [(277, channels), (278, height), (279, len(data) - 1), (284, planes)] + [(338, 2)] * (channels == 4)
    entries = b"".join(struct.pack(f"{order}HHL", tag, 4, 1) + struct.pack(f"{order}L", value) for tag, value in tags)
    if channels > 1:
        bits_at = struct.pack(f"{order}HHLL", 258, 3, channels, 8)
        entries = entries.replace(struct.pack(f"{order}HHLL", 258, 4, 1, bits), bits_at)
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", 16 + len(data)) + n_bits
    return start + data + struct.pack(f"{order}H", len(tags)) + entries + bytes(4)


def expected(samples, bits, channels, key=None, inverted=False):
    """Rounded to 8 bits, white where a pixel equals the key or is not opaque."""
    pixels, top = np.array(samples).reshape(len(samples), -1, channels), 2**bits - 1
    hidden = (pixels == key).all(-1) if key else pixels[..., -1] == 0 if channels % 2 == 0 else np.zeros(1, bool)
    colors = pixels[..., :3] if channels > 2 else pixels[..., :1].repeat(3, -1)
    colors = np.floor((top - colors if inverted else colors) * 255 / top + 0.5)
    return np.where(np.broadcast_to(hidden, pixels.shape[:2])[..., None], 255, colors)


def samples_of(bits, channels):
    pixels = np.random.default_rng(bits).integers(0, 2**bits, (5, 6, channels))
    if channels % 2 == 0:
        pixels[..., -1] = np.where(np.arange(6) % 2, 2**bits - 1, 0)
    pixels[1] = pixels[0]
    pixels[1, :, 0] ^= 1  # nearly the colors above
    return pixels.reshape(5, -1).tolist()


DEPTHS = [("png", bits, 1, {"key": True}) for bits in (1, 2, 4, 8, 16)] + [("png", 16, 3, {"key": True})]
DEPTHS += [("png", bits, 1, {"key": True, "ignored": 16}) for bits in (2, 4)]  # bits of the key beyond the depth
DEPTHS += [("png", bits, channels, {}) for bits in (8, 16) for channels in (1, 2, 3, 4)]
DEPTHS += [("tiff", bits, 1, {"photometric": kind}) for bits in (1, 2, 4, 8, 16) for kind in (0, 1)]
DEPTHS += [("tiff", 12, 1, {}), ("tiff", 12, 1, {"compression": 8})]
DEPTHS += [("tiff", 16, channels, {"order": order, "compression": compression})
           for channels in (3, 4) for order in "<>" for compression in (1, 8)]  # fmt: skip


@pytest.mark.parametrize("format, bits, channels, options", DEPTHS)
def test_every_depth_is_rounded_to_8_bits(format, bits, channels, options):
    samples = samples_of(bits, channels)
    key = samples[0][:channels] if options.get("key") else None
    raw = key and [value + options.get("ignored", 0) for value in key]
    content = png_of(samples, bits, channels, raw) if format == "png" else tiff_of(samples, bits, channels, **options)
    pixels = np.asarray(decode(row(content)))
    assert (pixels == expected(samples, bits, channels, key, options.get("photometric") == 0)).all()


def test_planes_of_16_bits_are_refused():
    """Pillow would read them as 8 bits."""
    with pytest.raises(BadImageError, match="a plane of 16 bits for each channel"):
        decode(row(tiff_of(samples_of(16, 3), 16, 3, planes=2)))
    with pytest.raises(BadImageError, match=r"not an image of a known format .* and depth"):
        decode(row(tiff_of(samples_of(14, 1), 14, 1)))
