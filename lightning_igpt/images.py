"""The bytes of an image file -> an upright RGB image: formats, limits, orientation, modes, square crops."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # raster only: EPS and PDF would start other programs
SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
MAX_PIXELS = 64_000_000
MAX_SCANNED = 2_000_000_000  # pixels times scans of a progressive JPEG; ten scans are usual
MAX_EXIF_PARTS = 1000  # one is usual
WHITE = (255, 255, 255)
_LARGE = 1_000_000  # bytes; a smaller file cannot hold enough EXIF parts to matter
_JPEG = b"\xff\xd8"
_SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")  # marker, length and components of a scan
_STRIP = 1 << 20  # pixels converted at a time
_UNPREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}

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
    """An image that cannot be used: damaged, too large, of another format, or missing."""


def decode(
    value: Mapping[str, Any] | Image.Image | None,
    *,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = WHITE,
) -> Image.Image:
    """Decode one image: first frame, upright by its EXIF orientation, RGB.

    The size is read from the header, and an image that is too large is refused before any pixel is decoded.

    Args:
        value: A row's ``{"bytes": ..., "path": ...}`` as ``datasets.Image(decode=False)`` returns it, or a PIL image.
        max_pixels: Largest accepted width times height.
        background: Color behind transparent pixels, (R, G, B) in 0..255.

    Raises:
        BadImageError: The image is missing, empty, damaged, too large, or not in one of ``FORMATS``.
    """
    try:
        image = value if isinstance(value, Image.Image) else _open(value)
        _check_size(image, max_pixels)
        _check_scans(image)
        image.load()
        # Pillow puts all metadata of a PNG into info; searching for a tag where there is none takes a tenth of the
        # time of a small image. The tag of a PIL image may have been set by hand.
        if image is value or image.format != "PNG" or image.info:
            image = _upright(image)
        return to_rgb(image, background=background)
    except BadImageError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error
        raise BadImageError(_explain(value, error)) from error


def decode_form(value: Any, where: str) -> Image.Image:
    """:func:`decode` for more forms: bytes, paths, uint8 arrays (H,W) or (H,W,3); errors start with ``where``."""
    path = value if isinstance(value, str | Path) else value.get("path") if isinstance(value, Mapping) else None
    if isinstance(value, bytes):
        value = {"bytes": value}
    elif isinstance(value, str | Path):
        value = {"path": str(value)}
    elif isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.shape[2:] in ((), (3,)):
        value = Image.fromarray(value)
    elif not (value is None or isinstance(value, Mapping | Image.Image)):
        raise TypeError(
            f"{where} is a {type(value).__name__}, not an image, bytes, a path or a uint8 array (H, W[, 3])"
        )
    try:
        return decode(value)
    except BadImageError as error:
        raise BadImageError(f"{where}{f' ({path})' if path else ''}: {error}") from error


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
    """Pillow joins the parts of a JPEG's EXIF data one by one; a million parts would take hours."""
    if file.read(2) == _JPEG and file.read().count(b"Exif\0\0") > MAX_EXIF_PARTS:
        raise BadImageError(
            f"the image has more than {MAX_EXIF_PARTS:,} parts of EXIF data; save it again or remove it"
        )


def _check_scans(image: Image.Image) -> None:
    """Each scan of a progressive JPEG visits every pixel, and a scan can be as short as a hundred bytes."""
    file = getattr(image, "fp", None)
    if file is None or not image.info.get("progressive"):
        return
    file.seek(0)
    scans = len(_SCAN.findall(file.read()))
    if scans * image.width * image.height > MAX_SCANNED:
        raise BadImageError(
            f"the image has {scans:,} scans of {image.width} x {image.height} pixels each; save it again or remove it"
        )


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise BadImageError(
            f"the image has {width} x {height} = {width * height:,} pixels, more than the limit of {max_pixels:,}; "
            "shrink or remove it"
        )


def _upright(image: Image.Image) -> Image.Image:
    # Read after load(): the TIFF decoder rotates the image itself and then removes the tag.
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


def to_rgb(image: Image.Image, *, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Convert an image of any mode to RGB; the first matching row decides.

    ========================  ==============================================================================
    mode                      rule
    ========================  ==============================================================================
    ``RGB``                   unchanged, unless it has a color key
    ``I;16*``, ``I``          16-bit gray in any byte order: ``round(v / 257)``, so that 65535 becomes 255 and
                              nothing clips; a color key is ignored
    ``F``                     an error: the range of floats is unknown
    ``LA``, ``RGBA``, ``PA``  composited over ``background``; so are ``La`` and ``RGBa``, and ``P``, ``L``,
                              ``1`` and ``RGB`` with a transparent index or color key
    ``P``                     looked up in the image's own palette
    ``L``                     repeated three times
    ``1``                     0 or 255, repeated three times
    ``CMYK``                  Pillow's conversion, ``R = (255 - C) * (255 - K) / 255``; Pillow has already
                              undone the inversion of Adobe's JPEG files when it loads them
    anything else             Pillow's ``convert("RGB")``, for instance of ``YCbCr`` and ``HSV``
    ========================  ==============================================================================

    Args:
        image: A PIL image of any mode; not modified.
        background: Color behind transparent pixels, (R, G, B) in 0..255.

    Returns:
        An image of mode ``RGB`` and the same size.

    Raises:
        ValueError: The mode is ``F`` or one that Pillow cannot convert, or an ``I`` image holds values
            outside 0..65535.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise ValueError(
            "images of mode F (floats) have no known range; scale yours to 0..255 and convert it to mode L"
        )
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(image)
    if image.has_transparency_data:
        return _composited(image, background)
    return image.convert("RGB")


def _composited(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    result = Image.new("RGB", image.size)
    for top, bottom in _strips(image):
        rgba = image.crop((0, top, image.width, bottom)).convert(_UNPREMULTIPLIED.get(image.mode, "RGBA"))
        under = Image.new("RGBA", rgba.size, (*background, 255))
        result.paste(Image.alpha_composite(under, rgba.convert("RGBA")).convert("RGB"), (0, top))
    return result


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image)  # (H, W)
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < 0 or high > 65535:
        raise ValueError(
            f"an image of mode {image.mode} holds values {low}..{high}, but 16 bits end at 65535; "
            "scale yours to 0..255 and convert it to mode L"
        )
    gray = np.empty(values.shape, dtype=np.uint8)
    for top, bottom in _strips(image):
        gray[top:bottom] = (values[top:bottom].astype(np.uint32) + 128) // 257
    return Image.fromarray(gray).convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, int]]:
    """First and last row of the parts in which a large image is converted, so that copies take little memory."""
    rows = max(1, _STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, min(top + rows, image.height)


def resize_center_crop(image: Image.Image, size: int) -> Image.Image:
    """Cut the largest square out of the middle and resize it to ``size``; an image of that size is returned."""
    if image.size == (size, size):
        return image
    width, height = image.size
    side = min(width, height)
    return cut(image, ((width - side) / 2, (height - side) / 2), side=side, size=size)


def cut(image: Image.Image, corner: tuple[float, float], *, side: float, size: int) -> Image.Image:
    """The square of ``side`` pixels at ``corner`` (left, top), resampled once to ``size``.

    The paper does not name the filter; this is Pillow's antialiased bilinear.
    """
    left, top = corner
    box = (left, top, min(left + side, image.width), min(top + side, image.height))
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
