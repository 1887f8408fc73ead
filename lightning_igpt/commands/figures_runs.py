"""Figures of what runs measured: nats per pixel against steps, accuracy by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_igpt.commands.figures_draw import DPI, WIDTH, Draw, Theme
from lightning_igpt.commands.report_runs import Run, read_runs

Lines: TypeAlias = Mapping[str, Sequence[tuple[int, float]]]  # (x, y) by label; the last one stands out


def run_figures(folder: Path) -> dict[str, Draw]:
    """``curves`` and ``layers``, as far as there are such runs in a folder and below it.

    One pretraining is shown with its training and validation, several with validation each; so are probes.

    Raises:
        FileNotFoundError: There is no such folder, or no run in it.
    """
    runs, draws = read_runs(folder), {}
    if nats := _nats(runs):
        draws["curves"] = _lines_figure(nats, "optimiser steps", "nats per pixel", level=_uniform(runs))
    if layers := _layers(runs):
        draws["layers"] = _lines_figure(layers, "layer (0: embeddings)", "accuracy in %")
    return draws


def _nats(runs: Sequence[Run]) -> Lines:
    pretrained = [run for run in runs if _has_nats(run)]
    if len(pretrained) == 1:
        curves = pretrained[0].curves
        parts = {"training": "train/nats_per_pixel", "validation": "val/nats_per_pixel"}
        return {label: curves[name] for label, name in parts.items() if name in curves}
    return {_short(run): run.curves["val/nats_per_pixel"] for run in pretrained if "val/nats_per_pixel" in run.curves}


def _has_nats(run: Run) -> bool:
    is_pretraining = run.module in (None, "PretrainModule")  # fine-tuning has a generative loss too
    return is_pretraining and bool({"train/nats_per_pixel", "val/nats_per_pixel"} & {*run.curves})


def _uniform(runs: Sequence[Run]) -> float | None:
    """The surprise of a uniform guess, if all networks have as many colours."""
    sizes = {run.network.vocab_size for run in runs if _has_nats(run) and run.network is not None}
    return math.log(sizes.pop()) if len(sizes) == 1 else None


def _layers(runs: Sequence[Run]) -> Lines:
    probes = [run for run in runs if run.layers]
    if len(probes) == 1:
        found = dict(sorted(probes[0].layers.items(), reverse=True))  # validation, test
    else:
        found = {_short(run): run.layers.get("test") or run.layers["validation"] for run in probes}
        found = dict(sorted(found.items(), key=lambda item: max(item[1].values())))  # the best stands out
    return {
        label: [(layer, 100 * value) for layer, value in accuracy.items()]
        for label, accuracy in found.items()
        if len(accuracy) > 1
    }


def _short(run: Run) -> str:
    return run.name.rpartition(" · ")[2]


def _lines_figure(lines: Lines, xlabel: str, ylabel: str, *, level: float | None = None) -> Draw:
    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(WIDTH, 0.55 * WIDTH), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        others = (theme.middle, *(f"C{number}" for number in range(1, len(lines))))  # matplotlib's own
        for (label, line), color in zip(lines.items(), (*others[: len(lines) - 1][::-1], theme.blue), strict=True):
            steps, values = zip(*line, strict=True)
            axes.plot(steps, values, label=label, color=color, marker="o" if len(line) < 30 else "", linewidth=1.8)
        if level is not None:
            axes.axhline(level, color=theme.orange, linestyle="--", linewidth=1.4, label=f"uniform ({level:.2f})")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        _finish(axes, theme)
        return figure

    return draw


def _finish(axes: Axes, theme: Theme) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.grid(color=theme.soft, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
