"""From the bytes of an image file to an upright, square RGB image, with limits and clear errors.

Not here: the rule for modes and transparency (``rgb.py``), random crops (``data/transforms.py``).
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from PIL import ExifTags, Image, UnidentifiedImageError

from lightning_igpt.rgb import to_rgb

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # raster only: EPS and PDF would start other programs
SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 64_000_000
MAX_SCANNED = 2_000_000_000  # pixels times scans of a progressive JPEG; ten scans are usual
MAX_EXIF_PARTS = 1000  # one is usual
_LARGE = 1_000_000  # bytes; in a smaller file the parts are too few to matter
_JPEG = b"\xff\xd8"
_SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")  # marker, length and components of a scan

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(ValueError):
    """An image that cannot be used: damaged, too large, of another format, or absent."""


def decode(
    value: Mapping[str, Any] | Image.Image | None,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """Decode one image: first frame, upright by its EXIF orientation, RGB.

    The size is read from the header and refused before any pixel is decoded.

    Args:
        value: A row's ``{"bytes": ..., "path": ...}`` as ``datasets.Image(decode=False)`` gives it, or a PIL image.
        max_pixels: Largest accepted width times height.
        background: What shines through transparent pixels, (R, G, B) in 0..255.

    Raises:
        BadImageError: The image is absent, empty, damaged, too large, or not one of ``FORMATS``.
    """
    try:
        image = value if isinstance(value, Image.Image) else _open(value)
        _check_size(image, max_pixels)
        _check_scans(image)
        image.load()
        # Pillow puts all metadata of a PNG into info. Looking for a tag where there are none takes a tenth of the time
        # of a small image. The tag of a PIL image may have been set by hand.
        if image is value or image.format != "PNG" or image.info:
            image = _upright(image)
        return to_rgb(image, background=background)
    except BadImageError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error
        raise BadImageError(_explain(value, error)) from error


def resize_center_crop(image: Image.Image, size: int) -> Image.Image:
    """Cut the largest square out of the middle and resize it to ``size``; returns the image if it fits already."""
    if image.size == (size, size):
        return image
    width, height = image.size
    side = min(width, height)
    return cut(image, ((width - side) / 2, (height - side) / 2), side=side, size=size)


def cut(image: Image.Image, corner: tuple[float, float], *, side: float, size: int) -> Image.Image:
    """The square of ``side`` pixels at ``corner`` (left, top), resampled once to ``size``.

    The paper does not name the filter; here it is Pillow's antialiased bilinear.
    """
    left, top = corner
    box = (left, top, min(left + side, image.width), min(top + side, image.height))
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _open(value: Mapping[str, Any] | None) -> Image.Image:
    content, path = (value.get("bytes"), value.get("path")) if value else (None, None)
    if content:
        if len(content) > _LARGE:
            _check_exif(io.BytesIO(content))
        return Image.open(io.BytesIO(content), formats=FORMATS)
    if content is None and path:
        if Path(path).stat().st_size > _LARGE:
            with Path(path).open("rb") as file:
                _check_exif(file)
        return Image.open(path, formats=FORMATS)
    raise BadImageError("the image is missing" if content is None else "the image file is empty (0 bytes)")


def _check_exif(file: IO[bytes]) -> None:
    """Pillow joins the parts of a JPEG's EXIF data one by one; a million of them would take it hours."""
    if file.read(2) == _JPEG and file.read().count(b"Exif\0\0") > MAX_EXIF_PARTS:
        raise BadImageError(f"the image has more than {MAX_EXIF_PARTS:,} parts of EXIF data; save it anew or remove it")


def _check_scans(image: Image.Image) -> None:
    """Each scan of a progressive JPEG walks over the whole picture, and a hundred bytes are enough for one."""
    file = getattr(image, "fp", None)
    if file is None or not image.info.get("progressive"):
        return
    file.seek(0)
    scans = len(_SCAN.findall(file.read()))
    if scans * image.width * image.height > MAX_SCANNED:
        raise BadImageError(
            f"the image has {scans:,} scans of {image.width} x {image.height} pixels each; save it anew or remove it"
        )


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadImageError(
            f"the image has {width} x {height} = {width * height:,} pixels, more than the limit of {max_pixels:,}; "
            "shrink or remove it"
        )


def _upright(image: Image.Image) -> Image.Image:
    # Asked after load(): the TIFF reader turns the image itself and then drops the tag.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a broken tag says nothing about the pixels; ImageNet has such a file
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _explain(value: Any, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"the image is far too large: {error}"
    if isinstance(error, UnidentifiedImageError):
        if isinstance(value, Mapping) and not value.get("bytes") and not Path(value["path"]).stat().st_size:
            return "the image file is empty (0 bytes)"
        return f"the file is not an image of a known format ({', '.join(FORMATS)}) or its header is damaged"
    if isinstance(error, FileNotFoundError):
        return f"there is no file {Path(value['path'])}"
    return f"the image cannot be decoded: {error or type(error).__name__}"
