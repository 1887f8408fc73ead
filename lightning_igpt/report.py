"""Figures and the self-contained HTML page that shows what a run found."""

from __future__ import annotations

import base64
import csv
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template

import matplotlib.figure
import matplotlib.ticker

TEMPLATE = Path(__file__).parent / "assets" / "report.html"
BLUE, GREY, ORANGE = "#0b6bcb", "#8a929c", "#c65102"  # told apart by lightness too


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
) -> None:
    """Nats per pixel, or another metric, against steps, with horizontal lines for baselines.

    Args:
        curves: (steps, values) by label; the last one stands out.
        levels: Values of baselines by label.
        path: The PNG to write.
        ylabel: What the values are.
    """
    figure = matplotlib.figure.Figure(figsize=(6.4, 3.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    colors = dict(zip(reversed(list(curves)), (BLUE, GREY), strict=False))  # any others in matplotlib's own
    for label, (steps, values) in curves.items():
        marker = "o" if len(steps) < 20 else ""
        axes.plot(steps, values, label=label, color=colors.get(label), linewidth=1.6, marker=marker)
    for (label, level), style in zip(levels.items(), ("--", ":"), strict=False):
        axes.axhline(level, color=ORANGE, linestyle=style, linewidth=1.2, label=f"{label} ({level:.2f})")
    axes.set(xlabel="optimiser steps", ylabel=ylabel)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    _finish(axes, figure, path)


def plot_layers(
    curves: Mapping[str, Mapping[int, float]],
    levels: Mapping[str, float],
    path: Path,
    *,
    ylabel: str = "test accuracy",
) -> None:
    """Probe accuracy against layer.

    Args:
        curves: Accuracy by layer, by label.
        levels: Accuracy of baselines by label.
        path: The PNG to write.
        ylabel: What the accuracy is of.
    """
    figure = matplotlib.figure.Figure(figsize=(6.4, 3.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    for (label, accuracy), color, marker in zip(curves.items(), (BLUE, GREY), "os", strict=False):
        axes.plot(list(accuracy), list(accuracy.values()), marker=marker, color=color, label=label)
    for label, level in levels.items():
        axes.axhline(level, color=ORANGE, linestyle="--", linewidth=1.2, label=f"{label} ({level:.2f})")
    layers = sorted({layer for accuracy in curves.values() for layer in accuracy})
    axes.set(xlabel="layer (0: embeddings)", ylabel=ylabel)
    axes.set_xticks(layers[:: max(1, len(layers) // 12)])
    _finish(axes, figure, path)


class Markup(str):
    """Text that is HTML already; any other text is escaped."""


def picture(path: Path, alt: str, caption: str) -> Markup:
    """A figure whose PNG travels inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return Markup(
        f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


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
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = []
    for number, row in enumerate(rows):
        if above and number in above:
            lines.append(f'<th class="group" colspan="{len(head)}">{html.escape(above[number])}</th>')
        lines.append("".join(f"<td{kinds.get(i, '')}>{html.escape(cell)}</td>" for i, cell in enumerate(row)))
        if below and number in below:
            lines.append(f'<td class="note" colspan="{len(head)}">{html.escape(below[number])}</td>')
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return Markup(f'<div class="table"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>')


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


def _finish(axes: matplotlib.axes.Axes, figure: matplotlib.figure.Figure, path: Path) -> None:
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)
