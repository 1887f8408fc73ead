"""One written rule that turns any PIL image into 8-bit RGB.

Not here: EXIF orientation, resizing and cropping (``images.py``), colours of a palette (``palette.py``).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

_STRIP = 1 << 20  # pixels that are converted at a time
_UNPREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def to_rgb(image: Image.Image, *, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Convert an image of any mode to RGB; the first row that fits decides.

    ========================  ==============================================================================
    mode                      rule
    ========================  ==============================================================================
    ``RGB``                   as it is, unless it has a colour key
    ``I;16*``, ``I``          grey of 16 bits in any byte order: ``round(v / 257)``, so that 65535 becomes 255
                              and nothing clips; a colour key is ignored
    ``F``                     an error: the range of floats is not known
    ``LA``, ``RGBA``, ``PA``  composited over ``background``; so are ``La`` and ``RGBa``, and ``P``, ``L``,
                              ``1`` and ``RGB`` with a transparent index or colour key
    ``P``                     looked up in the image's own palette
    ``L``                     repeated three times
    ``1``                     0 or 255, repeated three times
    ``CMYK``                  Pillow's conversion, ``R = (255 - C) * (255 - K) / 255``; Pillow has already
                              undone the inversion of Adobe's JPEG files when it loads them
    anything else             Pillow's ``convert("RGB")``, for instance of ``YCbCr`` and ``HSV``
    ========================  ==============================================================================

    Args:
        image: A PIL image of any mode. It is not changed.
        background: What shines through transparent pixels, (R, G, B) in 0..255.

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
    grey = np.empty(values.shape, dtype=np.uint8)
    for top, bottom in _strips(image):
        grey[top:bottom] = (values[top:bottom].astype(np.uint32) + 128) // 257
    return Image.fromarray(grey).convert("RGB")


def _strips(image: Image.Image) -> Iterator[tuple[int, int]]:
    """First and last row of parts that are small beside a large image, so that copies of it take little memory."""
    rows = max(1, _STRIP // max(1, image.width))
    for top in range(0, image.height, rows):
        yield top, min(top + rows, image.height)
