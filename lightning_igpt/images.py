"""The bytes of an image file -> an upright RGB image: formats, limits, orientation, modes, square crops."""

import io
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote_to_bytes

import fsspec  # type: ignore[import-untyped]
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from lightning_igpt.files import shown

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # raster only: EPS and PDF would start other programs
SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
Filter = Literal["bilinear", "bicubic", "box", "lanczos"]  # Pillow's, whose support grows as an image shrinks
BILINEAR: Filter = "bilinear"  # unless another is asked for
MAX_PIXELS = 64_000_000
MAX_SCANNED = 2_000_000_000  # pixels times scans of a progressive JPEG; ten scans are usual
MAX_EXIF_PARTS = 1000  # one is usual
WHITE = (255, 255, 255)
_LARGE = 1_000_000  # bytes; a smaller file cannot hold enough EXIF parts to matter
_JPEG = b"\xff\xd8"
_SCAN = re.compile(rb"\xff\xda\x00[\x08\x0a\x0c\x0e][\x01-\x04]")  # marker, length and components of a scan
_STRIP = 1 << 20  # pixels converted at a time
_UNPREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}
_DEEP = re.compile("(LA|RGB|RGBX|RGBA|CMYK);16[BLN]")  # what Pillow calls 16 bits per sample, of which it keeps 8
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}  # byte orders
_GRAYS = {"L;2": 85, "L;4": 17}  # brightness of one step
# Protocols that are read from any dataset: those that stay on this machine, and hf of the Hugging Face hub.
_NEAR = {"file", "local", "memory", "zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4", "hf"}

_TURNS = ("FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")
_UPRIGHT = {orientation: Image.Transpose[name] for orientation, name in enumerate(_TURNS, 2)}


class BadImageError(ValueError):
    """An image that cannot be used: damaged, too large, of another format, or missing."""


def decode(
    value: Any, *, background: tuple[int, int, int] = WHITE, mode: str | None = None, remote: bool = False
) -> Image.Image:
    """Decode one image: first frame, upright by its EXIF orientation, RGB, transparent pixels over ``background``.

    ``value`` is a row's ``{"bytes": ..., "path": ...}`` as ``datasets.Image(decode=False)`` returns it, a PIL image,
    the bytes of a file, or its path; with ``remote``, a path may be an address on the network. ``mode`` is Pillow's
    mode that ``datasets.Image(mode=...)`` asks for. An image that is too large, by its header, is refused before any
    pixel is decoded. BadImageError where it is missing, empty, damaged, too large, or not in one of ``FORMATS``.
    """
    try:
        value = fetch(value, remote=remote)
        image = value if isinstance(value, Image.Image) else _open(value)
        width, height = image.size
        if width * height > MAX_PIXELS:
            text = f"the image has {width} x {height} = {width * height:,} pixels"
            raise BadImageError(f"{text}, more than the limit of {MAX_PIXELS:,}; shrink or remove it")
        tags = getattr(image, "tag_v2", {})
        bits, planes = tags.get(ExifTags.Base.BitsPerSample, ()), tags.get(ExifTags.Base.PlanarConfiguration)
        if planes == 2 and len(bits) > 1 and max(bits) > 8:  # Pillow would read them as 8 bits
            raise BadImageError("TIFF files with a plane of 16 bits for each channel are not read; save it as PNG")
        args = tile[0].args if (tile := getattr(image, "tile", None)) else ""
        rawmode = args if isinstance(args, str) else str(args[0])
        image.load()
        # Pillow puts all metadata of a PNG into info; searching for a tag where there is none takes a tenth of the
        # time of a small image. The tag of a PIL image may have been set by hand.
        if image is value or image.format != "PNG" or image.info:
            image = _upright(image)
        if mode:
            image = image if image.mode == mode else image.convert(mode)
        elif isinstance(value, Mapping) and _DEEP.fullmatch(rawmode):
            image = _deep(image, rawmode, _open(value))
        elif rawmode in _GRAYS and isinstance(key := image.info.get("transparency"), int):
            image.info["transparency"] = key * _GRAYS[rawmode] % (255 + _GRAYS[rawmode])  # in the file a step
        return to_rgb(image, background=background)
    except BadImageError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything: OSError, SyntaxError, struct.error
        reason = f"the image cannot be decoded: {shown(error) or type(error).__name__}"
        if isinstance(error, Image.DecompressionBombError):
            reason = f"the image is far too large: {error}"
        elif isinstance(error, UnidentifiedImageError):
            reason = f"the file is not an image of a known format ({', '.join(FORMATS)}) and depth, or it is damaged"
        raise BadImageError(reason) from error


def fetch(value: Any, *, remote: bool = False) -> Any:
    """An image that is only named, by a path or an address, with the bytes of its file; others as they are.

    Without ``remote`` only addresses of local archives (``zip://a.png::set.zip``) and of the Hugging Face hub are read.
    """
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}
    path = str(value) if isinstance(value, str | Path) else value.get("path") if isinstance(value, Mapping) else None
    if not path or (isinstance(value, Mapping) and value.get("bytes") is not None):
        return value
    try:
        if "://" not in path or path.startswith("file:///"):
            file = Path(os.fsdecode(unquote_to_bytes(path.removeprefix("file://"))) if "://" in path else path)
            if not stat.S_ISREG(file.stat().st_mode):  # reading from a pipe or a device could block forever
                raise BadImageError("this is a folder, a pipe or a device, not a regular file")
            return {"bytes": file.read_bytes(), "path": path}
        protocols = {link.partition("://")[0] for link in path.split("::") if "://" in link}
        if not remote and (far := protocols - _NEAR):
            text = f"the row holds a URL ({shown(far.pop())}://) instead of an image; URLs are opened only from a text"
            raise BadImageError(f"{text} column that image_column names, or in a dataset opened in Python")
        with fsspec.open(path, "rb") as file:
            return {"bytes": file.read(), "path": path}
    except BadImageError:
        raise
    except Exception as error:  # each file system raises its own
        if isinstance(error, (FileNotFoundError, KeyError)):  # the latter from archives, by older fsspec
            raise BadImageError("there is no file of this name") from error
        raise BadImageError(f"the file cannot be read: {error}") from error


def decode_form(value: Any, where: str) -> Image.Image:
    """:func:`decode` for more forms: bytes, paths, uint8 arrays (H,W) or (H,W,3); errors start with ``where``."""
    path = value if isinstance(value, str | Path) else value.get("path") if isinstance(value, Mapping) else None
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.shape[2:] in ((), (3,)):
        value = Image.fromarray(value)
    elif not (value is None or isinstance(value, Mapping | Image.Image | bytes | str | Path)):
        raise TypeError(f"{where} is a {type(value).__name__}, not an image, bytes, path or uint8 array (H, W[, 3])")
    try:
        return decode(value)
    except BadImageError as error:
        raise BadImageError(f"{where}{f' ({shown(path)})' if path else ''}: {error}") from error


def _open(value: Mapping[str, Any] | None) -> Image.Image:
    content = value.get("bytes") if value else None
    if not content:
        raise BadImageError("the image is missing" if content is None else "the image file is empty (0 bytes)")
    # Pillow joins the parts of a JPEG's EXIF data one by one; a million parts would take hours.
    if len(content) > _LARGE and content.startswith(_JPEG) and content.count(b"Exif\0\0") > MAX_EXIF_PARTS:
        raise BadImageError(f"the image has more than {MAX_EXIF_PARTS:,} parts of EXIF data; save it again")
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    # Each scan of a progressive JPEG visits every pixel, and a scan can be as short as a hundred bytes.
    scans = len(_SCAN.findall(content)) if image.info.get("progressive") else 0
    if scans * image.width * image.height > MAX_SCANNED:
        raise BadImageError(f"the image has {scans:,} scans of {image.width} x {image.height} pixels; save it again")
    return image


def _upright(image: Image.Image) -> Image.Image:
    # Read after load(): the TIFF decoder rotates the image itself and then removes the tag.
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # a broken tag says nothing about the pixels; ImageNet has such a file
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def to_rgb(image: Image.Image, *, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """A new RGB image, transparent pixels over ``background``; the first matching row decides, others raise ValueError.

    - ``RGB``: unchanged, unless it has a color key
    - ``I;16*``, ``I``: 16-bit gray in any byte order, ``round(v / 257)``; TIFF's 12 bits, ``round(255 v / 4095)``
    - ``F``: an error, as the range of floats is unknown
    - ``LA``, ``RGBA``, ``PA``, ``La``, ``RGBa``, and a transparent index or color key: composited over ``background``
    - ``P`` is looked up in its palette; ``L``, and ``1`` as 0 or 255, are repeated three times
    - ``CMYK``: ``R = (255 - C) * (255 - K) / 255``; Pillow has undone the inversion of Adobe's JPEG files
    - anything else: Pillow's ``convert("RGB")``, for instance of ``YCbCr`` and ``HSV``
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise ValueError("images of mode F (floats) have no known range; scale to 0..255 and convert to mode L")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bits(image, background)
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


def _from_16_bits(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    values = np.asarray(image)  # (H, W)
    low, high = int(values.min(initial=0)), int(values.max(initial=0))
    if low < 0 or high > 65535:
        cure = "scale to 0..255 and convert to mode L"
        raise ValueError(f"an image of mode {image.mode} holds {low}..{high}, but 16 bits end at 65535; {cure}")
    tags = getattr(image, "tag_v2", {})
    top = 4095 if tags.get(ExifTags.Base.BitsPerSample) == (12,) else 65535
    values = top - values if tags.get(ExifTags.Base.PhotometricInterpretation) == 0 else values  # 0: white is zero
    return to_rgb(_rounded(values[..., None], "L", image.info.get("transparency"), top), background=background)


def _rounded(values: NDArray[Any], mode: str, key: Any = None, top: int = 65535) -> Image.Image:
    """Samples 0..``top`` (H, W, C) as 8 bits; pixels that equal the color key become transparent."""
    image = Image.new(mode, values.shape[1::-1])
    for start, end in _strips(image):
        part = ((values[start:end].astype(np.uint32) * 255 + top // 2) // top).astype(np.uint8)
        image.paste(Image.frombytes(mode, (image.width, end - start), part.tobytes()), (0, start))
    if key is not None:
        image.putalpha(Image.fromarray((values != key).any(axis=-1)))
    return image


def _deep(image: Image.Image, rawmode: str, twin: Any) -> Image.Image:
    """``image``, of which Pillow reads the upper bytes, with the lower bytes: ``twin`` in the opposite byte order."""
    gray = rawmode == "LA;16B"  # the bytes of its two samples are as many as those of RGBA
    other = "RGBA" if gray else rawmode[:-1] + _SWAPPED[rawmode[-1]]
    replaced = [(part, other if isinstance(part.args, str) else (other, *part.args[1:])) for part in twin.tile]
    twin.tile = [part._replace(args=args) for part, args in replaced]
    twin.load()
    low = np.asarray(_upright(twin))
    values = low.view(">u2") if gray else np.asarray(image).astype(np.uint16) * 256 + low  # (H, W, C)
    return _rounded(values, "LA" if gray else image.mode, image.info.get("transparency"))


def _strips(image: Image.Image) -> Iterator[tuple[int, int]]:
    """First and last row of the parts in which a large image is converted, so that copies take little memory."""
    rows = max(1, _STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, min(top + rows, image.height)


def resize_center_crop(image: Image.Image, size: int, resize: Filter = BILINEAR) -> Image.Image:
    """Cut the largest square out of the middle and resize it to ``size``; an image of that size is returned."""
    if image.size == (size, size):
        return image
    width, height = image.size
    side = min(width, height)
    return cut(image, ((width - side) / 2, (height - side) / 2), side=side, size=size, resize=resize)


def cut(
    image: Image.Image, corner: tuple[float, float], *, side: float, size: int, resize: Filter = BILINEAR
) -> Image.Image:
    """The square of ``side`` pixels at ``corner`` (left, top), resampled to ``size`` by a filter of Pillow's."""
    left, top = corner
    box = (left, top, min(left + side, image.width), min(top + side, image.height))
    return image.resize((size, size), Image.Resampling[resize.upper()], box=box)
