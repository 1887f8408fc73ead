"""Figures and the self-contained HTML page that shows what a run found."""

from __future__ import annotations

import base64
import csv
import html
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import matplotlib
import matplotlib.figure
import matplotlib.rcsetup
import matplotlib.ticker
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_igpt.pictures import image_grid

TEMPLATE = Path(__file__).parent / "assets" / "report.html"
_SIZE = (4.8, 3.2)  # inches: small, so that the text can still be read when a phone shows all of it
_DPI = 200
_NARROWEST = 560  # CSS pixels: the most that a picture keeps where there are fewer
_MANY = 1000  # points of a curve: more than a plot has pixels


class Colors(NamedTuple):
    """What a plot is drawn with; the lines are told apart by lightness too."""

    paper: str
    ink: str
    grid: str
    first: str
    second: str
    level: str
    others: tuple[str, ...]


LIGHT = Colors(
    paper="#ffffff",
    ink="#1c1f24",
    grid="#e4e7eb",
    first="#0b6bcb",
    second="#868e98",
    level="#c65102",
    others=("#7b4fb5", "#1f8a5b", "#8d5a2b", "#c13584", "#0f8a9a"),
)
DARK = Colors(
    paper="#1e2227",
    ink="#e8eaed",
    grid="#363c45",
    first="#6cb2f5",
    second="#9099a4",
    level="#f59a52",
    others=("#c4a4f2", "#6fd3a6", "#d6ab7d", "#f28cc4", "#6fd0dc"),
)


class Plot(NamedTuple):
    """One plot drawn twice: on white, and for a dark page."""

    light: matplotlib.figure.Figure
    dark: matplotlib.figure.Figure


def read_curve(metrics_csv: Path, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric from the file that Lightning's CSVLogger writes."""
    with metrics_csv.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(name)]
    return [int(row["step"]) for row in rows], [float(row[name]) for row in rows]


def plot_loss(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]],
    levels: Mapping[str, float],
    path: Path,
    *,
    ylabel: str = "nats per pixel",
) -> Plot:
    """Nats per pixel, or another metric, against steps, with horizontal lines for baselines.

    Args:
        curves: (steps, values) by label; the last one stands out.
        levels: Values of baselines by label.
        path: The PNG to write, of the light one.
        ylabel: What the values are.

    Returns:
        The figures, for :func:`drawing`.
    """

    def draw(axes: matplotlib.axes.Axes, colors: Colors) -> None:
        known = dict(zip(reversed(list(curves)), (colors.first, colors.second), strict=False))
        for label, (steps, values) in curves.items():
            marker = "o" if len(steps) < 20 else ""
            looks: Any = {"color": known[label]} if label in known else {}  # any others have those of the cycle
            axes.plot(*_thinned(steps, values), label=label, marker=marker, markersize=4, **looks)
        for (label, level), style in zip(levels.items(), ("--", ":"), strict=False):
            axes.axhline(level, color=colors.level, linestyle=style, linewidth=1.2, label=f"{label} ({level:.2f})")
        axes.set(xlabel="optimiser steps", ylabel=ylabel)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(6, integer=True))

    return _drawn(draw, path)


def plot_layers(
    curves: Mapping[str, Mapping[int, float]],
    levels: Mapping[str, float],
    path: Path,
    *,
    ylabel: str = "test accuracy",
) -> Plot:
    """Probe accuracy against layer.

    Args:
        curves: Accuracy by layer, by label.
        levels: Accuracy of baselines by label.
        path: The PNG to write, of the light one.
        ylabel: What the accuracy is of.

    Returns:
        The figures, for :func:`drawing`.
    """

    def draw(axes: matplotlib.axes.Axes, colors: Colors) -> None:
        for (label, accuracy), color, marker in zip(curves.items(), (colors.first, colors.second), "os", strict=False):
            axes.plot(list(accuracy), list(accuracy.values()), marker=marker, markersize=4, color=color, label=label)
        for label, level in levels.items():
            axes.axhline(level, color=colors.level, linestyle="--", linewidth=1.2, label=f"{label} ({level:.2f})")
        layers = sorted({layer for accuracy in curves.values() for layer in accuracy})
        axes.set(xlabel="layer (0: embeddings)", ylabel=ylabel)
        axes.set_xticks(layers[:: max(1, -(-len(layers) // 12))])

    return _drawn(draw, path)


class Markup(str):
    """Text that is HTML already; any other text is escaped."""


def drawing(plot: Plot, alt: str, caption: str) -> Markup:
    """A plot that travels inside the page as SVG, once for light pages and once for dark ones."""
    light, dark = (_svg(figure) for figure in plot)
    width, height = (round(96 * inches) for inches in _SIZE)
    return _figure(
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img class="plot" src="{light}" width="{width}" height="{height}" alt="{html.escape(alt)}"></picture>',
        caption,
    )


def picture(path: Path, alt: str, caption: str) -> Markup:
    """A picture on white, with text in it, whose PNG travels inside the page.

    On a narrow page it keeps most of its size, and scrolls in its own box.
    """
    with Image.open(path) as image:
        width, height = image.size
    return _figure(
        f'<div class="scroll" tabindex="0"><img class="paper" style="min-width: {min(_NARROWEST, width * 7 // 10)}px" '
        f'src="{_data("image/png", path.read_bytes())}" width="{width}" height="{height}" alt="{html.escape(alt)}">'
        "</div>",
        caption,
    )


def pixels(
    rows: Tensor, alt: str, caption: str, *, headings: Sequence[str] = (), scale: int = 8, below: str = ""
) -> Markup:
    """Small images in a grid, which the page enlarges to sharp squares; the page shows between them.

    Args:
        rows: uint8 (R,C,3,H,W).
        alt: What is to be seen, in words.
        caption: Stands below.
        headings: Of the columns.
        scale: Side in CSS pixels of the square that shows one pixel, where the page is wide enough.
        below: Markup between picture and caption.
    """
    grid = image_grid(rows, scale=1, gap=1, background=(0, 0, 0))
    shown = image_grid(torch.full_like(rows, 255), scale=1, gap=1, background=(0, 0, 0))[:1]
    file = io.BytesIO()
    Image.fromarray(torch.cat([grid, shown]).permute(1, 2, 0).numpy()).save(file, format="PNG", optimize=True)
    height, width = grid.shape[1:]
    above = "".join(f"<span>{html.escape(heading)}</span>" for heading in headings)
    return _figure(
        f'<div class="pixels" style="width: {width * scale}px">'
        + (f'<div class="headings">{above}</div>' if above else "")
        + f'<img src="{_data("image/png", file.getvalue())}" width="{width}" height="{height}" '
        f'alt="{html.escape(alt)}"></div>{below}',
        caption,
    )


def legend(colors: Tensor, low: str, high: str) -> Markup:
    """A bar of colours between what its ends stand for.

    Args:
        colors: uint8 (n,3).
        low: Stands at the left end.
        high: Stands at the right end.
    """
    file = io.BytesIO()
    Image.fromarray(colors[None].numpy()).save(file, format="PNG")
    bar = f'<img src="{_data("image/png", file.getvalue())}" alt="colours from low to high">'
    return Markup(f'<div class="legend"><span>{html.escape(low)}</span>{bar}<span>{html.escape(high)}</span></div>')


def facts(title: str, pairs: Sequence[tuple[str, str]]) -> Markup:
    """A list of (name, value) that opens at a click."""
    lines = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in pairs)
    return Markup(f"<details><summary>{html.escape(title)}</summary><dl>{lines}</dl></details>")


def table(
    rows: Sequence[Sequence[str]],
    head: Sequence[str],
    *,
    numbers: Sequence[int] = (1,),
    notes: Sequence[int] = (2,),
    above: Mapping[int, str] | None = None,
    below: Mapping[int, str] | None = None,
) -> Markup:
    """A table, by default of (what, number, note).

    Args:
        rows: The cells.
        head: A heading per column.
        numbers: Columns of numbers, set strong and unbroken.
        notes: Columns of remarks, set soft.
        above: Headings over the whole width, by the number of the row that follows.
        below: Remarks over the whole width, by the number of the row before.
    """
    kinds = {**dict.fromkeys(notes, ' class="note"'), **dict.fromkeys(numbers, ' class="number"')}
    cells = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    lines = []
    for number, row in enumerate(rows):
        if above and number in above:
            lines.append(f'<th class="group" colspan="{len(head)}">{html.escape(above[number])}</th>')
        lines.append("".join(f"<td{kinds.get(i, '')}>{html.escape(cell)}</td>" for i, cell in enumerate(row)))
        if below and number in below:
            lines.append(f'<td class="note" colspan="{len(head)}">{html.escape(below[number])}</td>')
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return Markup(
        f'<div class="table" tabindex="0"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def bullets(lines: Sequence[str]) -> Markup:
    """A list of remarks."""
    return Markup(f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>")


def section(title: str, *parts: str) -> str:
    """A heading and what stands below it; a part without markup becomes a paragraph."""
    body = "\n".join(part if isinstance(part, Markup) else f"<p>{html.escape(part)}</p>" for part in parts)
    return f"<h2>{html.escape(title)}</h2>\n{body}"


def commands(lines: Sequence[str]) -> Markup:
    """Commands to copy."""
    return Markup(f"<pre><code>{html.escape(chr(10).join(lines))}</code></pre>")


def write_page(path: Path, title: str, subtitle: str, sections: Sequence[str]) -> None:
    """Write the page: one file, no script, nothing fetched."""
    page = Template(TEMPLATE.read_text(encoding="utf-8"))
    text = page.substitute(title=html.escape(title), subtitle=html.escape(subtitle), body="\n".join(sections))
    path.write_text(text, encoding="utf-8")


def _drawn(draw: Callable[[matplotlib.axes.Axes, Colors], None], path: Path) -> Plot:
    """Draw on light and on dark; write the light one."""
    plot = Plot(*(_figure_of(draw, colors) for colors in (LIGHT, DARK)))
    plot.light.savefig(path)
    return plot


def _figure_of(draw: Callable[[matplotlib.axes.Axes, Colors], None], colors: Colors) -> matplotlib.figure.Figure:
    looks: Any = {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.prop_cycle": matplotlib.rcsetup.cycler(color=colors.others),
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 10,
        "grid.color": colors.grid,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
        **dict.fromkeys(("axes.facecolor", "figure.facecolor"), colors.paper),
        **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), colors.ink),
    }
    with matplotlib.rc_context(looks):
        figure = matplotlib.figure.Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
        axes = figure.subplots()
        draw(axes, colors)
        figure.legend(loc="outside lower center", ncols=2)  # no corner of the axes is free for sure
    return figure


def _thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[Sequence[int], Sequence[float]]:
    """A long curve without the points that nobody sees: of each stretch the lowest and the highest stay."""
    if len(steps) <= _MANY:
        return steps, values
    stretches = np.array_split(np.arange(len(steps)), _MANY // 2)
    array = np.asarray(values, dtype=np.float64)
    kept = {0, len(steps) - 1} | {int(i[pick(array[i])]) for i in stretches for pick in (np.argmin, np.argmax)}
    return [steps[i] for i in sorted(kept)], [values[i] for i in sorted(kept)]


def _svg(figure: matplotlib.figure.Figure) -> str:
    """The figure without its paper, as an address; the same figure gives the same."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "lightning_igpt"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Creator": None, "Date": None})
    text = file.getvalue()
    return _data("image/svg+xml", text[text.index("<svg") :].encode())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _figure(content: str, caption: str) -> Markup:
    return Markup(f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>")
