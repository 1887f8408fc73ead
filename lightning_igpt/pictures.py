"""Pictures for people: small images enlarged in a grid, numbers as heat maps, the colours of a palette on a sheet.

Not here: curves and the report (``report.py``).
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from functools import cache
from math import ceil, sqrt
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL = 128  # default size of an enlarged image in pixels
_CAPTION = 18  # height of a line of captions in pixels
_APART = 10  # pixels between the rows of a contact sheet
_BAR = 10  # height of a colour bar in pixels
_WHITE = (255, 255, 255)
_SHEET = 112  # grey of the sheet behind swatches, on which black and white both show
_GREY = 0.08  # HSV saturation below which a colour sorts with the greys


def image_grid(
    rows: Tensor | Sequence[Tensor],
    *,
    scale: int | None = None,
    gap: int = 2,
    background: tuple[int, int, int] = (255, 255, 255),
    captions: Sequence[str] | None = None,
) -> Tensor:
    """Images side by side, every pixel enlarged to a square.

    Args:
        rows: uint8 (R,C,3,H,W), or R tensors (C,3,H,W).
        scale: Side of the square that shows one pixel; by default images become about 128 pixels high.
        gap: Pixels around every image.
        background: Colour of the gaps, (R, G, B) in 0..255.
        captions: One heading per column, clipped to the column's width.

    Returns:
        uint8 (3,h,w) on the CPU.

    Raises:
        ValueError: The rows are no bytes, differ in shape, or the captions do not match the columns.
    """
    shapes = sorted({tuple(row.shape) for row in rows})
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3 or any(row.dtype != torch.uint8 for row in rows):
        raise ValueError(f"a grid takes rows of one shape, uint8 (C, 3, H, W), not {shapes} of {rows[0].dtype}")
    images = torch.stack([row.cpu() for row in rows])  # (R, C, 3, H, W)
    n_rows, n_columns, _, height, width = images.shape
    if captions is not None and len(captions) != n_columns:
        raise ValueError(f"there are {len(captions)} captions for {n_columns} columns")
    scale = scale or max(1, CELL // height)
    big = images.repeat_interleave(scale, dim=3).repeat_interleave(scale, dim=4)
    color = torch.tensor(background, dtype=torch.uint8).view(3, 1, 1)
    cells = color.repeat(n_rows, n_columns, 1, height * scale + gap, width * scale + gap)
    cells[..., gap:, gap:] = big
    grid = cells.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)  # (3, R*h, C*w)
    grid = torch.cat([grid, color.expand(3, grid.shape[1], gap)], dim=2)
    grid = torch.cat([grid, color.expand(3, gap, grid.shape[2])], dim=1)
    if captions is None:
        return grid
    heading = torch.cat([_caption(text, width * scale + gap, background) for text in captions], dim=2)
    return torch.cat([torch.cat([heading, color.expand(3, _CAPTION, gap)], dim=2), grid], dim=1)


def contact_sheet(cells: Tensor, captions: Sequence[Sequence[str]], *, columns: int = 4) -> Tensor:
    """Pictures in rows on white, each below lines of text of its own.

    Args:
        cells: uint8 (N,3,h,w), shown as large as they are.
        captions: For each picture its lines, as many for one as for another. Of a line too long its end is shown.
        columns: Pictures per row.

    Returns:
        uint8 (3,H,W) on the CPU.
    """
    width = cells.shape[3]
    above = [torch.cat([_caption(_end_of(line, width), width) for line in lines], 1) for lines in captions]
    titled = torch.cat([torch.stack(above), cells.cpu()], 2)  # (N, 3, lines + h, w)
    spaced = F.pad(titled, (0, 0, 0, _APART), value=255)
    return stack([torch.cat(list(row), 2) for row in torch.split(spaced, columns)])


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Pictures below one another, flush left on white: uint8 (3,h,w) each, (3,H,W) the result."""
    width = max(part.shape[2] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[2]), value=255) for part in parts], 1)


def heading(text: str) -> Tensor:
    """A line of text, black on white: uint8 (3,h,w)."""
    return _caption(text, ceil(_font().getlength(text)) + 8)


def heat_map(values: Tensor, colors: Tensor, *, high: float) -> Tensor:
    """Numbers as colours, evenly from 0, the first colour, to ``high`` and above, the last.

    Args:
        values: Float (...,H,W).
        colors: uint8 (n,3).
        high: Above 0.

    Returns:
        uint8 (...,3,H,W) on the CPU.
    """
    index = (values.cpu() / high * len(colors)).clamp(0, len(colors) - 1).long()
    return colors.cpu()[index].movedim(-1, -3)


def color_bar(colors: Tensor, ticks: Mapping[str, float], *, width: int = 512) -> Tensor:
    """The legend of a heat map.

    Args:
        colors: uint8 (n,3), as given to ``heat_map``.
        ticks: Where each label stands, from 0 (left end) to 1 (right end).
        width: Of the bar in pixels.

    Returns:
        uint8 (3,h,w).
    """
    margin = ceil(max(_font().getlength(text) for text in ticks) / 2) + 4
    image = Image.new("RGB", (width + 2 * margin, _BAR + 4 + _CAPTION), _WHITE)
    bar = Image.fromarray(colors.cpu()[None].numpy()).resize((width, _BAR), Image.Resampling.NEAREST)
    image.paste(bar, (margin, 0))
    draw = ImageDraw.Draw(image)
    for text, fraction in ticks.items():
        x = margin + round(fraction * (width - 1))
        draw.line((x, _BAR, x, _BAR + 3), fill="black")
        draw.text((x - draw.textlength(text, font=_font()) // 2, _BAR + 4), text, fill="black", font=_font())
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def swatch(colors: Tensor, *, side: int = 24, columns: int | None = None) -> Tensor:
    """All colours of a palette as squares: greys first from dark to light, then rows of like hue, dark to light.

    Args:
        colors: uint8 (K,3).
        side: Side of a square in pixels.
        columns: Squares per row; by default the sheet is about twice as wide as high.

    Returns:
        uint8 (3,h,w).
    """
    columns = columns or ceil(sqrt(2 * len(colors)))
    values = colors.cpu().numpy() / 255  # (K, 3)
    hue, saturation = np.array([colorsys.rgb_to_hsv(*row)[:2] for row in values]).T
    luminance = values @ (0.299, 0.587, 0.114)  # ITU-R BT.601
    order = np.lexsort((luminance, np.where(saturation < _GREY, -1.0, (hue + 1 / 12) % 1)))
    rows = [
        row[np.argsort(luminance[row], kind="stable")] for row in np.split(order, range(columns, len(order), columns))
    ]
    squares = torch.full((len(rows), columns, 3, 1, 1), _SHEET, dtype=torch.uint8)
    for row, ids in enumerate(rows):
        squares[row, : len(ids), :, 0, 0] = colors.cpu()[ids]
    return image_grid(squares, scale=side, gap=1, background=(_SHEET, _SHEET, _SHEET))


def to_pil(image: Tensor) -> Image.Image:
    """Turn a uint8 (3,H,W) tensor into an RGB image."""
    return Image.fromarray(image.cpu().permute(1, 2, 0).numpy())


def save_png(image: Tensor, path: str | Path) -> None:
    """Write a uint8 (3,H,W) tensor as a PNG file, creating its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    to_pil(image).save(path, format="PNG")


def _caption(text: str, width: int, background: tuple[int, int, int] = _WHITE) -> Tensor:
    """Centred black or white text, whichever shows: uint8 (3, _CAPTION, width)."""
    image = Image.new("RGB", (width, _CAPTION), background)
    ink = "black" if sum(background) > 382 else "white"
    draw = ImageDraw.Draw(image)
    draw.text((max(0, (width - draw.textlength(text, font=_font())) // 2), 2), text, fill=ink, font=_font())
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def _end_of(text: str, width: int) -> str:
    """The text, or as much of its end as fits: file names differ there."""
    short = text
    while _font().getlength(short) > width and text:
        text = text[1:]
        short = f"...{text}"
    return short
