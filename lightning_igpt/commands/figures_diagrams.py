"""Diagrams: what a pixel is predicted from, the shift by ``sos``, where features are taken."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from lightning_igpt.commands.figures_draw import DPI, Theme

_WIDTH = 5.6  # inches: narrower than plots, so that the text stays large on a narrow page
_SIDE = 5  # pixels of the small image
_TARGET = 12  # the pixel in its middle
_HIDDEN = (3, 12, 16, 19)
_TEXT: dict[str, Any] = {"ha": "center", "va": "center"}


def raster_figure(theme: Theme) -> Figure:
    """Two small images: what the autoregressive network predicts a pixel from, and what BERT does."""
    figure = Figure(figsize=(_WIDTH, 3.5), dpi=DPI)
    left, right = figure.subplots(1, 2)
    _image(left, theme, read=range(_TARGET), predicted=[_TARGET])
    left.set_title("autoregressive", fontsize=12)
    _image(right, theme, read=[place for place in range(_SIDE**2) if place not in _HIDDEN], predicted=_HIDDEN)
    right.set_title("BERT", fontsize=12)
    legend = figure.add_axes((0, 0, 1, 0.12))
    _blank(legend, (0, _WIDTH), (0.42, 0))
    for x, fill, edge, text in (
        (0.55, theme.blue, theme.blue, "read"),
        (1.75, theme.orange, theme.orange, "predicted"),
        (3.45, "none", theme.middle, "neither"),
    ):
        legend.add_patch(Rectangle((x, 0.08), 0.2, 0.2, facecolor=fill, edgecolor=edge))
        legend.text(x + 0.3, 0.19, text, va="center", fontsize=11)
    figure.subplots_adjust(left=0.02, right=0.98, top=0.9, bottom=0.13, wspace=0.06)
    return figure


def _image(axes: Axes, theme: Theme, *, read: Collection[int], predicted: Collection[int]) -> None:
    for place in range(_SIDE**2):
        row, column = divmod(place, _SIDE)
        is_filled = place in read or place in predicted
        fill = theme.orange if place in predicted else theme.blue if place in read else "none"
        edge = theme.face if is_filled else theme.middle
        axes.add_patch(Rectangle((column + 0.04, row + 0.04), 0.92, 0.92, facecolor=fill, edgecolor=edge))
        axes.text(column + 0.5, row + 0.5, str(place), color=theme.face if is_filled else theme.middle, **_TEXT)
    _blank(axes, (-0.1, _SIDE + 0.1), (_SIDE + 0.1, -0.1))
    axes.set_aspect("equal")


def shift_figure(theme: Theme) -> Figure:
    """What the autoregressive network reads and predicts at each position."""
    figure = Figure(figsize=(_WIDTH, 2.5), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    _blank(axes, (-1.75, 6.3), (4.05, -0.1))
    columns = ("0", "1", "2", "...", "$T-2$", "$T-1$")
    read = ("sos", "$x_0$", "$x_1$", "...", "$x_{T-3}$", "$x_{T-2}$")
    predicted = ("$x_0$", "$x_1$", "$x_2$", "...", "$x_{T-2}$", "$x_{T-1}$")
    for y, text in ((0.45, "predicts"), (2.55, "reads"), (3.6, "position")):
        axes.text(-0.25, y, text, ha="right", va="center", fontsize=12)
    axes.add_patch(FancyBboxPatch((0.05, 1.3), 5.95, 0.45, boxstyle="round,pad=0.05", fc=theme.soft, ec="none"))
    axes.text(3.03, 1.53, "network: position $t$ sees 0 to $t$", fontsize=11, **_TEXT)
    for column, (place, above, below) in enumerate(zip(columns, predicted, read, strict=True)):
        x = column + 0.5
        axes.text(x, 3.6, place, color=theme.middle, fontsize=11, **_TEXT)
        if place == "...":
            axes.text(x, 0.45, above, fontsize=12, **_TEXT)
            axes.text(x, 2.55, below, fontsize=12, **_TEXT)
            continue
        _box(axes, theme, x, 0.45, above, theme.orange)
        _box(axes, theme, x, 2.55, below, theme.middle if below == "sos" else theme.blue)
        _arrow(axes, theme, (x, 1.25), (x, 0.88))
        _arrow(axes, theme, (x, 2.13), (x, 1.83))
    return figure


def taps_figure(theme: Theme) -> Figure:
    """One block of the network with its tap, and the last norm with the last one."""
    figure = Figure(figsize=(_WIDTH, 2.9), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    _blank(axes, (0, 11.2), (5.8, 0))
    frame: dict[str, Any] = {
        "boxstyle": "round,pad=0.1",
        "facecolor": "none",
        "edgecolor": theme.middle,
        "linestyle": "--",
    }
    axes.add_patch(FancyBboxPatch((0.95, 0.85), 6.35, 2.15, **frame))
    axes.text(4.1, 0.42, "block $l$, for $l$ = 0 to $L-1$", fontsize=11, **_TEXT)
    axes.text(0.4, 1.3, "$h^l$", fontsize=13, **_TEXT)
    for start, end in ((0.7, 4.25), (4.65, 6.7), (7.1, 7.75), (8.25, 8.65), (10.15, 10.8)):  # the residual stream
        _arrow(axes, theme, (start, 1.3), (end, 1.3))
    for x in (4.45, 6.9):
        axes.text(x, 1.3, "+", fontsize=15, **_TEXT)
    axes.text(8.0, 1.3, "...", fontsize=13, **_TEXT)
    for norm, part, name, width in ((1.5, 3.35, "attention", 1.5), (5.0, 6.25, "MLP", 0.85)):
        _arrow(axes, theme, (norm, 1.3), (norm, 2.16))
        _arrow(axes, theme, (norm + 0.42, 2.5), (part - width / 2 - 0.02, 2.5))
        _arrow(axes, theme, (part + width / 2 + 0.03, 2.5), (4.45 if name == "attention" else 6.9, 1.55), bend=0.35)
        _step(axes, theme, norm, 2.5, "norm", 0.8)
        _step(axes, theme, part, 2.5, name, width)
    _step(axes, theme, 9.4, 1.3, "last norm", 1.5)
    axes.text(10.55, 0.8, "logits", fontsize=10, **_TEXT)
    for x, top, text in ((2.22, 2.5, "tap $l$"), (10.4, 1.3, "tap $L$")):
        axes.plot((x, x), (top, 3.55), color=theme.orange, linewidth=1.8, linestyle=(0, (2, 1.5)))
        axes.plot(x, top, "o", color=theme.orange, markersize=4)
        axes.text(x, 3.9, text, color=theme.orange, fontsize=12, **_TEXT)
    for x in (2.22, 10.4):
        _arrow(axes, theme, (x, 4.2), (6.31 + (x - 6.31) * 0.1, 4.6))
    axes.text(6.31, 4.85, "mean over all $T$ positions", fontsize=11, **_TEXT)
    axes.text(6.31, 5.4, "$L+1$ vectors as wide as the network, for probes", fontsize=11, **_TEXT)
    return figure


def _box(axes: Axes, theme: Theme, x: float, y: float, text: str, color: str) -> None:
    axes.add_patch(Rectangle((x - 0.42, y - 0.38), 0.84, 0.76, facecolor=color, edgecolor="none"))
    axes.text(x, y, text, color=theme.face, fontsize=12, **_TEXT)


def _step(axes: Axes, theme: Theme, x: float, y: float, text: str, width: float) -> None:
    box = (x - width / 2, y - 0.32)
    axes.add_patch(FancyBboxPatch(box, width, 0.64, boxstyle="round,pad=0.02", fc=theme.soft, ec="none"))
    axes.text(x, y, text, fontsize=10, **_TEXT)


def _arrow(axes: Axes, theme: Theme, start: tuple[float, float], end: tuple[float, float], bend: float = 0) -> None:
    looks: dict[str, Any] = {"arrowstyle": "->", "color": theme.ink, "shrinkA": 0, "shrinkB": 0}
    looks["connectionstyle"] = f"arc3,rad={bend}"
    axes.annotate("", end, start, arrowprops=looks)


def _blank(axes: Axes, x: tuple[float, float], y: tuple[float, float]) -> None:
    axes.set(xlim=x, ylim=y)
    axes.set_axis_off()
