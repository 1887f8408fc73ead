"""Figures of pictures, each on a light and on a dark page: a palette, quantisation, completions, surprise.

Not here: which of them are drawn and of what (``figures.py``), diagrams (``figures_diagrams.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import matplotlib.figure
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_igpt.palette import Palette
from lightning_igpt.pictures import heat_map, swatch

WIDTH = 6.4  # inches, as plots of the report
DPI = 150
_GAP = 10  # pixels between pictures
_LINE = 36  # height of a line of text in pixels
_FEW = 256  # colours that a PNG with a colour table holds


@dataclass(frozen=True)
class Theme:
    """The colours of a page."""

    suffix: str  # of the file's name
    face: str
    ink: str
    soft: str  # lines and fields that are not looked at first
    blue: str
    orange: str
    middle: str  # a second line

    @property
    def settings(self) -> dict[Any, str]:
        """Matplotlib's."""
        ink = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
        face = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
        return dict.fromkeys(ink, self.ink) | dict.fromkeys(face, self.face)


THEMES = (  # the second as furo's dark page
    Theme("", face="#ffffff", ink="#1a1c1f", soft="#dfe3e8", blue="#0b6bcb", orange="#c65102", middle="#8a929c"),
    Theme("-dark", face="#131416", ink="#e3e6ea", soft="#343a42", blue="#5aa7f5", orange="#ff9a4a", middle="#8f98a3"),
)

Draw: TypeAlias = Callable[[Theme], Figure]
Picture: TypeAlias = Image.Image | NDArray[np.uint8]


def save_both(draw: Draw, folder: Path, name: str) -> list[Path]:
    """Draw a figure in both themes and write ``name.png`` and ``name-dark.png``, as small as PNG allows.

    The same figure gives the same bytes.
    """
    written = []
    for theme in THEMES:
        with matplotlib.rc_context(theme.settings):
            canvas = FigureCanvasAgg(draw(theme))
            canvas.draw()  # type: ignore[no-untyped-call]
        written.append(folder / f"{name}{theme.suffix}.png")
        pixels = np.array(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
        save_small(Image.fromarray(pixels), written[-1])
    return written


def save_small(image: Image.Image, path: Path) -> None:
    """Write an RGB image as a PNG file without loss, with a table of colours where there are no more than 256."""
    found = image.getcolors(_FEW)
    if found is not None:
        colors = np.array(sorted(color for _, color in found))  # (n, 3)
        packed, pixels = (array.astype(np.int32) @ (1 << 16, 1 << 8, 1) for array in (colors, np.array(image)))
        image = Image.fromarray(np.searchsorted(packed, pixels).astype(np.uint8), mode="P")
        image.putpalette(colors.astype(np.uint8).tobytes())
    image.save(path, format="PNG", optimize=True)


def palette_figure(palette: Palette) -> Draw:
    """All colours of a palette, like hues together."""
    sheet = swatch(palette.rgb).permute(1, 2, 0).numpy()
    return lambda theme: grid_figure(theme, [[sheet]], [[f"{len(palette)} colours"]])


def quantised_figure(photos: Sequence[Image.Image], resized: Sequence[Tensor], palette: Palette) -> Draw:
    """Photographs, what is left of them at one or several sizes, and what the palette makes of that.

    Args:
        photos: N square photographs.
        resized: For each size uint8 (N,3,S,S).
        palette: Whose colours are used.
    """
    titles: list[str] = ["photo"]
    columns: list[Sequence[Picture]] = [photos]
    for pixels in resized:
        side = pixels.shape[-1]
        titles += [f"{side} × {side}", f"{len(palette)} colours"]
        columns += [_pictures(pixels), _pictures(palette.dequantize(palette.quantize(pixels)))]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return lambda theme: grid_figure(theme, rows, [titles, *[[]] * (len(rows) - 1)])


def completions_figure(rows: Tensor, titles: Sequence[str]) -> Draw:
    """What was given, samples, the truth.

    Args:
        rows: uint8 (B,C,3,S,S).
        titles: Of the C columns.
    """
    pictures = [_pictures(row) for row in rows]
    return lambda theme: grid_figure(theme, pictures, [titles, *[[]] * (len(rows) - 1)])


def surprise_figure(tokens: Tensor, nats: Tensor, palette: Palette, *, columns: int = 4) -> Draw:
    """Pictures as the network sees them, each above a map of its surprise, with a legend.

    Args:
        tokens: int64 (N,T).
        nats: Float (N,T), the surprise of each pixel.
        palette: Of the tokens.
        columns: Pictures side by side.
    """
    side, uniform = math.isqrt(nats.shape[1]), math.log(len(palette))
    high = max(1.25 * uniform, float(np.quantile(nats.numpy(), 0.99)))
    magma = matplotlib.colormaps["magma"]
    colors = torch.from_numpy(magma(np.arange(256), bytes=True)[:, :3])  # (256, 3)
    seen, maps = (
        _pictures(palette.dequantize(tokens)),
        _pictures(heat_map(nats.view(-1, side, side), colors, high=high)),
    )
    means = [f"{mean:.2f} nats" for mean in nats.mean(1).tolist()]
    parts = [slice(start, start + columns) for start in range(0, len(seen), columns)]
    rows = [row for part in parts for row in (seen[part], maps[part])]
    titles: list[list[str]] = [line for part in parts for line in (means[part], [])]

    def draw(theme: Theme) -> Figure:
        figure = grid_figure(theme, rows, titles, below=120)
        axes = figure.add_axes((0.1, 85 / DPI / figure.get_figheight(), 0.8, 16 / DPI / figure.get_figheight()))
        axes.imshow(colors.numpy()[None], extent=(0, high, 0, 1), aspect="auto")
        axes.set_yticks([])
        axes.set_xlabel("surprise of each pixel in nats", fontsize=11)
        axes.set_xticks([0, uniform, high], ["0", f"{uniform:.2f}: uniform", f"{high:.1f}"])
        axes.tick_params(labelsize=10)
        return figure

    return draw


def grid_figure(
    theme: Theme, rows: Sequence[Sequence[Picture]], titles: Sequence[Sequence[str]], *, below: int = 0
) -> Figure:
    """Pictures of any size, all shown equally wide, in rows.

    Args:
        theme: The page's colours.
        rows: For each row its pictures, of one shape: large ones of Pillow are averaged, and of others, such as arrays
            uint8 (h,w,3), every pixel is shown as a square in its exact colour.
        titles: For each row a line above each of its pictures, or nothing.
        below: Room below the pictures, in pixels of the figure.
    """
    columns = max(len(row) for row in rows)
    finest = max(picture.shape[1] for row in rows for picture in row if not isinstance(picture, Image.Image))
    cell = max(1, round(WIDTH * DPI) // columns // finest) * finest  # whole pixels: sharp, and a smaller file
    enlarged = [[_enlarged(picture, cell) for picture in row] for row in rows]
    heights = [row[0].height + _LINE * bool(above) + _GAP for row, above in zip(enlarged, titles, strict=True)]
    page = Image.new("RGB", (columns * (cell + _GAP) + _GAP, sum(heights) + _GAP + below), theme.face)
    figure = Figure(figsize=((page.width + 0.1) / DPI, (page.height + 0.1) / DPI), dpi=DPI)
    for row, above, bottom in zip(enlarged, titles, accumulate(heights), strict=True):
        for column, picture in enumerate(row):
            left, top = _GAP + column * (cell + _GAP), bottom - picture.height
            page.paste(theme.soft, (left - 1, top - 1, left + cell + 1, bottom + 1))  # a frame
            page.paste(picture, (left, top))
        for column, text in enumerate(above):
            middle, y = _GAP + column * (cell + _GAP) + cell / 2, page.height - (bottom - row[0].height - 10)
            figure.text(middle / page.width, y / page.height, text, ha="center", fontsize=11)
    figure.figimage(np.array(page), origin="upper", zorder=-1)  # below what else is drawn
    return figure


def _enlarged(picture: Picture, width: int) -> Image.Image:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    is_photo = isinstance(picture, Image.Image) and image.width > width
    kind = Image.Resampling.LANCZOS if is_photo else Image.Resampling.NEAREST
    return image.resize((width, round(width * image.height / image.width)), kind)


def _pictures(pixels: Tensor) -> list[NDArray[np.uint8]]:
    """uint8 (N,3,h,w) as N arrays (h,w,3)."""
    return list(pixels.cpu().permute(0, 2, 3, 1).numpy())
