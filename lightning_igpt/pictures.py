"""Every picture that the package draws, in one style: uint8 tensors (3,h,w), and matplotlib figures, light and dark."""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_igpt.files import replacing, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 128  # default side of an enlarged image in pixels
SIZE = (4.8, 3.2)  # of a plot, in inches: small, so that its text stays readable on a phone
_DPI = 200
_MAX_POINTS = 1000  # of a curve; more than a plot has pixels
_CAPTION = 18  # height of a line of text in pixels
_GAP = 10  # pixels between the pictures of a contact sheet
_BAR = 10  # height of a color bar in pixels
_WHITE = (255, 255, 255)
_SHEET = 112  # gray behind swatches, on which black and white both show
_GRAY = 0.08  # HSV saturation below which a color sorts with the grays


class Theme(NamedTuple):
    """Colors of a plot; its lines differ in lightness as well as in hue."""

    paper: str
    ink: str
    grid: str
    first: str  # the curve that matters
    second: str
    level: str  # horizontal lines
    others: tuple[str, ...]


_BRIGHT, _PALE = "#7b4fb5 #1f8a5b #8d5a2b #c13584 #0f8a9a", "#c4a4f2 #6fd3a6 #d6ab7d #f28cc4 #6fd0dc"
LIGHT = Theme("#ffffff", "#1c1f24", "#e4e7eb", "#0b6bcb", "#868e98", "#c65102", tuple(_BRIGHT.split()))
DARK = Theme("#131416", "#e8eaed", "#363c45", "#6cb2f5", "#9099a4", "#f59a52", tuple(_PALE.split()))


class Plot(NamedTuple):
    """One plot, drawn for light and for dark pages."""

    light: Figure
    dark: Figure


def image_grid(
    rows: Tensor | Sequence[Tensor],
    *,
    scale: int | None = None,
    gap: int = 2,
    background: tuple[int, int, int] = _WHITE,
    captions: Sequence[str] | None = None,
    line: int | None = None,
) -> Tensor:
    """Images side by side, every pixel enlarged to a square: uint8 (3,h,w) on the CPU.

    ``rows`` are uint8 (R,C,3,H,W), or R tensors (C,3,H,W). By default images become about 128 pixels high. ``captions``
    are headings of the columns, clipped to their width. A line is drawn through every image below ``line`` rows of
    pixels, such as those that a network was given. ValueError where shapes or captions do not match.
    """
    shapes = sorted({tuple(row.shape) for row in rows})
    if len(shapes) != 1 or len(shapes[0]) != 4 or shapes[0][1] != 3 or any(row.dtype != torch.uint8 for row in rows):
        raise ValueError(f"a grid takes rows of one shape, uint8 (C, 3, H, W), not {shapes} of {rows[0].dtype}")
    images = torch.stack([row.cpu() for row in rows])  # (R, C, 3, H, W)
    n_rows, n_columns, _, height, width = images.shape
    if captions is not None and len(captions) != n_columns:
        raise ValueError(f"there are {len(captions)} captions for {n_columns} columns")
    scale = scale or max(1, CELL // height)
    high, wide, above = height * scale + gap, width * scale + gap, 0 if captions is None else _CAPTION
    grid = torch.tensor(background, dtype=torch.uint8).view(3, 1, 1)
    grid = grid.repeat(1, above + n_rows * high + gap, n_columns * wide + gap)
    for row, column in np.ndindex(n_rows, n_columns):
        top, left = above + row * high + gap, column * wide + gap
        grid[:, top : top + high - gap, left : left + wide - gap] = enlarge(images[row, column], scale)
        if line:  # white on black, so that it shows on any picture
            y = top + line * scale
            grid[:, y - 1 : y + 1] = torch.tensor([[255], [0]], dtype=torch.uint8)
    for column, text in enumerate(captions or ()):
        grid[:, :above, column * wide : (column + 1) * wide] = _caption(text, wide, background)
    return grid


def enlarge(images: Tensor, scale: int) -> Tensor:
    """Every pixel of (...,H,W) as a square with ``scale`` pixels a side."""
    return images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)


def contact_sheet(cells: Tensor, captions: Sequence[Sequence[str]], *, columns: int = 4) -> Tensor:
    """Pictures, uint8 (N,3,h,w), in rows on white, each below its lines of text: uint8 (3,H,W) on the CPU."""
    width = cells.shape[3]
    above = [torch.cat([_caption(_end_of(shown(line), width), width) for line in lines], 1) for lines in captions]
    titled = torch.cat([torch.stack(above), cells.cpu()], 2)  # (N, 3, lines + h, w)
    spaced = F.pad(titled, (0, _GAP, 0, _GAP), value=255)
    return stack([torch.cat(list(row), 2) for row in torch.split(spaced, columns)])


def stack(parts: Sequence[Tensor]) -> Tensor:
    """Pictures uint8 (3,h,w) below one another, flush left on white: (3,H,W)."""
    width = max(part.shape[2] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[2]), value=255) for part in parts], 1)


def heading(text: str) -> Tensor:
    """A line of text, black on white, as uint8 (3,h,w)."""
    return _caption(text, math.ceil(_font().getlength(text)) + 8)


def surprise_colors() -> Tensor:
    """The color scale of every map of surprise, uint8 (256,3), dark to bright: matplotlib's magma."""
    import matplotlib  # 0.3 s, which a palette need not take

    return torch.from_numpy(matplotlib.colormaps["magma"](np.arange(256), bytes=True)[:, :3])


def surprise_limit(nats: Tensor, n_colors: int) -> float:
    """Where the scale of ``nats`` ends: beyond a uniform guess, with 1 % of the pixels above it."""
    return max(1.25 * math.log(n_colors), float(np.quantile(nats.cpu().numpy(), 0.99)))


def surprise_map(nats: Tensor, *, limit: float) -> Tensor:
    """Nats (...,H,W) as colors, evenly from 0 to ``limit`` and beyond it the last: uint8 (...,3,H,W) on the CPU."""
    return surprise_colors()[(nats.cpu() / limit * 256).clamp(0, 255).long()].movedim(-1, -3)


def surprise_bar(limit: float, n_colors: int, *, width: int = 512) -> Tensor:
    """The legend of maps of surprise: the scale with marks at 0, a uniform guess and the limit; uint8 (3,h,w)."""
    uniform = math.log(n_colors)
    ticks = {"0": 0.0, f"{uniform:.2f} (uniform)": uniform / limit, f"{limit:.2f} or more": 1.0}
    margin = math.ceil(max(map(_font().getlength, ticks)) / 2) + 4
    image = Image.new("RGB", (width + 2 * margin, _BAR + 4 + _CAPTION), _WHITE)
    bar = Image.fromarray(surprise_colors()[None].numpy()).resize((width, _BAR), Image.Resampling.NEAREST)
    image.paste(bar, (margin, 0))
    draw = ImageDraw.Draw(image)
    for text, fraction in ticks.items():
        x = margin + round(fraction * (width - 1))
        draw.line((x, _BAR, x, _BAR + 3), fill="black")
        draw.text((x - draw.textlength(text, font=_font()) // 2, _BAR + 4), text, fill="black", font=_font())
    return to_tensor(image)


def swatch(colors: Tensor, *, side: int = 24, columns: int | None = None) -> Tensor:
    """All colors uint8 (K,3) as squares: grays first from dark to light, then rows of like hue: uint8 (3,h,w)."""
    columns = columns or math.ceil(math.sqrt(2 * len(colors)))
    values = colors.cpu().numpy() / 255  # (K, 3)
    hue, saturation = np.array([colorsys.rgb_to_hsv(*row)[:2] for row in values]).T
    luminance = values @ (0.299, 0.587, 0.114)  # ITU-R BT.601
    order = np.lexsort((luminance, np.where(saturation < _GRAY, -1.0, (hue + 1 / 12) % 1)))
    squares = torch.full((-(-len(order) // columns), columns, 3, 1, 1), _SHEET, dtype=torch.uint8)
    for square, row in zip(squares, np.split(order, range(columns, len(order), columns)), strict=True):
        square[: len(row), :, 0, 0] = colors.cpu()[row[np.argsort(luminance[row], kind="stable")]]
    return image_grid(squares, scale=side, gap=1, background=(_SHEET, _SHEET, _SHEET))


def plot_curves(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    levels: Mapping[str, float] | None = None,
    *,
    xlabel: str = "optimizer steps",
    ylabel: str = "nats per pixel",
) -> Plot:
    """Curves (x, y), the first of which is emphasized; ``levels`` are baselines, drawn as dashed lines."""

    def draw(axes: Axes, theme: Theme) -> None:
        from matplotlib.ticker import MaxNLocator

        colors = (theme.first, theme.second, *theme.others)
        for number, (label, (x, y)) in enumerate(curves.items()):
            marker, color, above = "o" if len(x) < 60 else "", colors[number % len(colors)], 3 - number / 100
            axes.plot(*_thinned(x, y), label=label, marker=marker, markersize=3.5, color=color, zorder=above)
        for (label, level), style in zip((levels or {}).items(), ("--", ":"), strict=False):
            axes.axhline(level, color=theme.level, linestyle=style, linewidth=1.2, label=f"{label} ({level:.2f})")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))

    return Plot(draw_figure(draw, LIGHT), draw_figure(draw, DARK))


def plot_fits(
    points: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    lines: Sequence[tuple[Sequence[float], Sequence[float]]],
    *,
    labels: tuple[str, str],
    scales: tuple[str, str] = ("log", "linear"),
) -> Plot:
    """Measured points (x, y) of several series, and fitted lines; labels and scales are of x and of y."""

    def draw(axes: Axes, theme: Theme) -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        for x, y in lines:
            axes.plot(x, y, color=theme.second, linewidth=1)
        colors = cycle((theme.first, theme.level, *theme.others))
        for color, (label, (x, y)) in zip(colors, points.items(), strict=False):
            axes.plot(x, y, label=label, marker="o", markersize=3.5, linestyle="", color=color)
        axes.set(xlabel=labels[0], ylabel=labels[1], xscale=scales[0], yscale=scales[1])
        for axis in [axis for axis in (axes.xaxis, axes.yaxis) if axis.get_scale() == "log"]:
            axis.set_major_locator(LogLocator(subs=(1, 3)))  # two labels or more on less than a decade, too
            axis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e+", "e"))
            axis.set_minor_formatter(NullFormatter())

    return Plot(draw_figure(draw, LIGHT), draw_figure(draw, DARK))


def draw_figure(draw: Callable[[Axes, Theme], None], theme: Theme = LIGHT, size: tuple[float, float] = SIZE) -> Figure:
    """A figure of ``size`` inches in the package's style, with a legend below if something in it has a label."""
    import matplotlib
    import matplotlib.figure

    style: dict[Any, Any] = {"font.size": 10, "grid.color": theme.grid, "lines.linewidth": 1.6}
    style |= dict.fromkeys(("axes.axisbelow", "axes.grid"), True)
    style |= dict.fromkeys(("axes.spines.right", "axes.spines.top", "legend.frameon"), False)
    style |= dict.fromkeys(("axes.facecolor", "figure.facecolor", "savefig.facecolor"), theme.paper)
    inked = ("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color")
    style |= dict.fromkeys(inked, theme.ink)
    with matplotlib.rc_context(style):
        figure = matplotlib.figure.Figure(figsize=size, dpi=_DPI, layout="constrained")
        axes = figure.subplots()
        draw(axes, theme)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def render(figure: Figure) -> Tensor:
    """The pixels of a figure: uint8 (3,h,w)."""
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return to_tensor(Image.open(file).convert("RGB"))


def to_svg(figure: Figure) -> str:
    """A figure as SVG on a transparent background; equal figures give equal text."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning_igpt"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Creator": None, "Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3,H,W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def to_pil(image: Tensor) -> Image.Image:
    """Turn a uint8 (3,H,W) tensor into an RGB image."""
    return Image.fromarray(image.cpu().permute(1, 2, 0).numpy())


def save_png(image: Tensor | Figure, path: str | Path) -> None:
    """Write a uint8 (3,H,W) tensor, or a figure, as a PNG file, creating its folder."""
    with replacing(path) as temporary:
        if isinstance(image, Tensor):
            to_pil(image).save(temporary, format="PNG")
        else:
            image.savefig(temporary, format="png")


def _thinned(x: Sequence[int], y: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    """A long curve with the lowest and the highest point of each stretch, which is all that a plot can show."""
    if len(x) <= _MAX_POINTS:
        return x, y
    stretches = np.array_split(np.arange(len(x)), _MAX_POINTS // 2)
    array = np.asarray(y, dtype=np.float64)
    kept = {0, len(x) - 1} | {int(i[pick(array[i])]) for i in stretches for pick in (np.argmin, np.argmax)}
    return [x[i] for i in sorted(kept)], [y[i] for i in sorted(kept)]


def _caption(text: str, width: int, background: tuple[int, int, int] = _WHITE) -> Tensor:
    """Centered black or white text, whichever shows: uint8 (3, _CAPTION, width)."""
    image = Image.new("RGB", (width, _CAPTION), background)
    ink = "black" if sum(background) > 382 else "white"
    draw = ImageDraw.Draw(image)
    draw.text((max(0, (width - draw.textlength(text, font=_font())) // 2), 2), text, fill=ink, font=_font())
    return to_tensor(image)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def _end_of(text: str, width: int) -> str:
    """The text, or as much of its end as fits: file names differ there."""
    ends = (f"...{text[start:]}" if start else text for start in range(len(text) + 1))
    return next((end for end in ends if _font().getlength(end) <= width), "...")
