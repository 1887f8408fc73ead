import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps
from torch._utils import ExceptionWrapper

from lightning_igpt.images import BadImageError, decode
from tests.image_files import encoded, noise, picture


def row(content, path=None):
    return {"bytes": content, "path": path}


def same(left, right):
    return left.mode == right.mode == "RGB" and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(format):
    options = {"lossless": True} if format == "WEBP" else {}
    assert same(decode(row(encoded(noise(), format, **options))), noise())


@pytest.mark.parametrize("format", ["JPEG", "GIF", "MPO"])
def test_other_formats_are_what_pillow_says(format):
    content = encoded(noise(), format)
    assert same(decode(row(content)), Image.open(io.BytesIO(content)).convert("RGB"))


def test_path_and_pil_images(tmp_path):
    noise().save(tmp_path / "a.png")
    assert same(decode(row(None, str(tmp_path / "a.png"))), noise())
    assert same(decode(noise()), noise())


def test_transparency_and_background():
    content = encoded(Image.new("RGBA", (2, 2), (10, 20, 30, 0)))
    assert decode(row(content)).getpixel((0, 0)) == (255, 255, 255)
    assert decode(row(content), background=(1, 2, 3)).getpixel((0, 0)) == (1, 2, 3)


def test_first_frame_of_an_animation():
    content = encoded(picture(10), "GIF", save_all=True, append_images=[picture(200), picture(90)])
    assert decode(row(content)).getpixel((0, 0)) == picture(10).getpixel((0, 0))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation, format):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(noise(), format, exif=exif)
    assert same(decode(row(content)), ImageOps.exif_transpose(Image.open(io.BytesIO(content))))


def test_broken_exif_is_not_fatal():
    for broken in (
        b"Exif\x00\x00garbage",
        b"Exif\x00\x00II*\x00\xff\xff\xff\x7f",
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff",
    ):
        content = encoded(noise(), "PNG", exif=broken)
        assert same(decode(row(content)), noise())


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b""))


JPEG = encoded(noise((64, 64)), "JPEG")
BAD = {
    "truncated": (JPEG[: len(JPEG) // 2], "truncated"),
    "cut in the header": (JPEG[:10], "cannot be decoded"),
    "empty": (b"", "0 bytes"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "known format"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "known format"),
    "above the limit": (png_header(9_000, 9_000), "9000 x 9000 = 81,000,000 pixels, more than the limit of 64,000,000"),
    "a bomb": (png_header(60_000, 60_000), "too large"),
    "floats": (encoded(Image.new("F", (2, 2)), "TIFF"), "mode F"),
}


@pytest.mark.parametrize("content, message", BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("error")  # in particular, refused before Pillow decodes anything
def test_bad_images(content, message):
    with pytest.raises(BadImageError, match=message):
        decode(row(content))


def test_missing_images(tmp_path):
    for value in (None, row(None), row(None, "")):
        with pytest.raises(BadImageError, match="missing"):
            decode(value)
    with pytest.raises(BadImageError, match=r"no file .*gone\.png"):
        decode(row(None, str(tmp_path / "gone.png")))


def test_max_pixels():
    content = encoded(noise((12, 9)))
    assert decode(row(content), max_pixels=108).size == (12, 9)
    with pytest.raises(BadImageError, match="12 x 9 = 108"):
        decode(row(content), max_pixels=107)
    with pytest.raises(BadImageError, match="12 x 9 = 108"):
        decode(noise((12, 9)), max_pixels=107)


def test_error_survives_the_way_from_a_worker():
    try:
        raise BadImageError("row 3")
    except BadImageError:
        wrapped = ExceptionWrapper(where="in a worker")
    with pytest.raises(BadImageError, match="row 3"):
        pickle.loads(pickle.dumps(wrapped)).reraise()


def test_sixteen_bits_do_not_clip():
    grey = Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16))
    assert np.asarray(decode(row(encoded(grey))))[0, :, 0].tolist() == [0, 1, 255]
