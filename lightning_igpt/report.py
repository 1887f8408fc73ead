"""One self-contained HTML page: of the quickstart, or of any runs, by their ``metrics.csv`` and ``run.json``."""

import base64
import csv
import html
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from string import Template
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from lightning_igpt import __version__
from lightning_igpt.files import counted, write_text
from lightning_igpt.pictures import SIZE, Plot, image_grid, plot_curves, to_svg

Curve: TypeAlias = tuple[list[int], list[float]]  # steps, values

TEMPLATE = Path(__file__).parent / "assets" / "report.html"
PICTURES = {
    "confusion.png": "Confusion matrix of the test images.",
    "worst.png": "The test images with the highest loss, each with its class and the predicted one.",
}
METRICS = {"nats_per_pixel": min, "accuracy": max}  # and which value is best


class Markup(str):
    """Text that is HTML already; all other text is escaped."""


@dataclass(frozen=True)
class Run:
    """What the folder of a run holds."""

    folder: Path
    curves: dict[str, Curve]  # metrics by name
    settings: list[tuple[str, str]]  # (name, value) of the newest entry of run.json, nested names joined by dots

    def layers(self, part: str) -> Curve:
        """(layers, accuracy) of a probe on ``probe`` (validation) or ``test``."""
        matches = {name: re.fullmatch(rf"{part}/layer_(\d+)/accuracy", name) for name in self.curves}
        by_layer = {int(match[1]): self.curves[name][1][-1] for name, match in matches.items() if match}
        return sorted(by_layer), [by_layer[layer] for layer in sorted(by_layer)]


def read_runs(folder: Path) -> list[Run]:
    """The runs in a folder and below it, version_9 before version_10; ValueError where a ``metrics.csv`` is damaged."""
    tables = sorted(folder.rglob("metrics.csv"), key=lambda path: re.sub(r"\d+", lambda n: n[0].zfill(9), str(path)))
    if not tables:
        raise FileNotFoundError(f"{folder} holds no run: neither it nor a folder below it has a metrics.csv")
    return [Run(table.parent, read_curves(table), _read_settings(table.parent)) for table in tables]


def read_curves(table: Path) -> dict[str, Curve]:
    """The metrics of a ``metrics.csv`` by name; ValueError where it is damaged."""
    curves: dict[str, Curve] = {}
    try:
        with table.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name in [name for name, value in row.items() if value and name not in ("step", "epoch")]:
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(float(row[name]))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{table} is damaged ({error!r}); restore or remove it") from error
    return dict(sorted(curves.items()))


def write_runs(path: Path, runs: Sequence[Run]) -> None:
    """Write a page with the numbers, curves, layers, pictures and settings of runs."""
    rows = [row for run in runs for row in _numbers(run)]
    head = ("run", "metric", "test", "validation, last", "validation, best")
    sections = [section("Summary", table(rows, head, numbers=(2, 3), notes=(4,)))] if rows else []
    sections += [section(str(run.folder), *_figures(run)) for run in runs]
    write_page(path, "Image GPT runs", f"{counted(len(runs), 'run')}; lightning_igpt {__version__}.", sections)


def write_page(path: Path, title: str, subtitle: str, sections: Sequence[str]) -> None:
    """Write the page: one file, no script, nothing fetched."""
    words = {"title": html.escape(title), "subtitle": html.escape(subtitle), "body": "\n".join(sections)}
    write_text(path, Template(TEMPLATE.read_text(encoding="utf-8")).substitute(words))


def section(title: str, *parts: str) -> str:
    """A heading and what follows it; a part without markup becomes a paragraph."""
    body = "\n".join(part if isinstance(part, Markup) else f"<p>{html.escape(part)}</p>" for part in parts)
    return f"<h2>{html.escape(title)}</h2>\n{body}"


def table(
    rows: Sequence[Sequence[str]], head: Sequence[str], *, numbers: Sequence[int] = (1,), notes: Sequence[int] = (2,)
) -> Markup:
    """A table, by default of (what, number, note); ``numbers`` and ``notes`` are columns."""
    kinds = {**dict.fromkeys(notes, ' class="note"'), **dict.fromkeys(numbers, ' class="number"')}
    titles = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    cells = ("".join(f"<td{kinds.get(i, '')}>{html.escape(cell)}</td>" for i, cell in enumerate(row)) for row in rows)
    parts = f"<thead><tr>{titles}</tr></thead><tbody>{''.join(f'<tr>{line}</tr>' for line in cells)}</tbody>"
    return Markup(f'<div class="table" tabindex="0"><table>{parts}</table></div>')


def facts(title: str, pairs: Sequence[tuple[str, str]]) -> Markup:
    """A list of (name, value) that opens at a click."""
    lines = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in pairs)
    return Markup(f"<details><summary>{html.escape(title)}</summary><dl>{lines}</dl></details>")


def commands(lines: Sequence[str]) -> Markup:
    """Commands to copy."""
    return Markup(f"<pre><code>{html.escape(chr(10).join(lines))}</code></pre>")


def drawing(plot: Plot, alt: str, caption: str) -> Markup:
    """A plot as SVG inside the page, once for light pages and once for dark ones."""
    light, dark = (_data("image/svg+xml", to_svg(figure).encode()) for figure in plot)
    width, height = (round(96 * inches) for inches in SIZE)
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
    image = f'<img class="plot" src="{light}" width="{width}" height="{height}" alt="{html.escape(alt)}">'
    return _figure(f"<picture>{source}{image}</picture>", caption)


def picture(path: Path, caption: str) -> Markup:
    """A PNG file inside the page; on a narrow page it keeps most of its size and scrolls in its own box."""
    with Image.open(path) as image:
        width, height = image.size
    look = f'class="paper" style="min-width: {min(560, width * 7 // 10)}px" width="{width}" height="{height}"'
    image = f'<img {look} src="{_data("image/png", path.read_bytes())}" alt="{html.escape(caption)}">'
    return _figure(f'<div class="scroll" tabindex="0">{image}</div>', caption)


def pixels(rows: Tensor, alt: str, caption: str, *, headings: Sequence[str] = (), scale: int = 8) -> Markup:
    """Small images, uint8 (R,C,3,H,W), in a transparent grid, in which a pixel has ``scale`` CSS pixels."""
    grid = image_grid(rows, scale=1, gap=1, background=(0, 0, 0))
    opaque = image_grid(torch.full_like(rows, 255), scale=1, gap=1, background=(0, 0, 0))[:1]
    height, width = grid.shape[1:]
    image = Image.fromarray(torch.cat([grid, opaque]).permute(1, 2, 0).numpy())
    above = "".join(f"<span>{html.escape(heading)}</span>" for heading in headings)
    above = f'<div class="headings">{above}</div>' if above else ""
    content = f'{above}<img src="{png_url(image)}" width="{width}" height="{height}" alt="{html.escape(alt)}">'
    return _figure(f'<div class="pixels" style="width: {width * scale}px">{content}</div>', caption)


def _numbers(run: Run) -> Iterator[tuple[str, ...]]:
    """A row for each metric: the test's value, and the last and the best of validation."""
    for metric, best in METRICS.items():
        test, (steps, values) = run.curves.get(f"test/{metric}"), run.curves.get(f"val/{metric}", ([], []))
        if test or steps:
            finite = [pair for pair in zip(values, steps, strict=True) if math.isfinite(pair[0])]
            top, step = best(finite, key=lambda pair: pair[0], default=(math.nan, 0))
            last = (f"{values[-1]:.4f}", f"{top:.4f} at step {step:,}") if steps else ("–", "–")
            yield str(run.folder), metric.replace("_", " "), f"{test[1][-1]:.4f}" if test else "–", *last


def _figures(run: Run) -> Iterator[str]:
    """The plots and pictures of a run, and its settings."""
    sizes = [int(value) for name, value in run.settings if name.endswith("network.vocab_size") and value.isdecimal()]
    names = {"val/nats_per_pixel": "validation", "train/nats_per_pixel": "training"}
    if nats := {label: run.curves[name] for name, label in names.items() if name in run.curves}:
        plot = plot_curves(nats, {"uniform": math.log(max(1, sizes[0]))} if sizes else {})
        yield drawing(plot, "Nats per pixel over steps", "Nats per pixel; lower is better.")
    online = {name: name.split("/")[1] for name in run.curves if name.startswith("online_probe/")}
    online = {name: label.replace("_", " ").replace("$", r"\$") for name, label in online.items()}  # no mathtext
    names = {"val/accuracy": "validation", **online}
    accuracy = {label: run.curves[name] for name, label in names.items() if name in run.curves}
    if any(len(steps) > 1 for steps, _ in accuracy.values()):
        yield drawing(plot_curves(accuracy, ylabel="accuracy"), "Accuracy over steps", "Accuracy; higher is better.")
    parts = {"test": run.layers("test"), "validation": run.layers("probe")}
    if layers := {label: curve for label, curve in parts.items() if curve[0]}:
        plot = plot_curves(layers, xlabel="layer (0: embeddings)", ylabel="accuracy")
        yield drawing(plot, "Accuracy by layer", "Probe accuracy by layer; validation chooses the layer.")
    folders = [run.folder, *sorted(run.folder.glob("pictures*"))[-1:]]
    last = [sorted(folder.glob("completions/step-*.png"))[-1:] for folder in folders]
    for path in [*chain.from_iterable(last), *(folder / name for folder in folders for name in PICTURES)]:
        step = path.stem.replace("-", " ")
        caption = PICTURES.get(path.name, f"Completions at {step}: given part, samples, ground truth.")
        try:
            yield from [picture(path, caption)] if path.exists() else []
        except (OSError, SyntaxError, ValueError) as error:  # whatever Pillow raises at the head of a file
            yield f"{path} is left out, since it cannot be read: {error}"
    if run.settings:
        yield facts("Settings, machine, versions", run.settings)


def _read_settings(folder: Path) -> list[tuple[str, str]]:
    path = folder / "run.json"
    if not path.exists():
        return []
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return list(_flat("", record["runs"][-1] if "runs" in record else record))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return [("run.json", f"left out, since it is damaged: {error!r}")]


def _flat(prefix: str, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{prefix}{name}.", value)
        elif value not in (None, "", []):
            yield f"{prefix}{name}", " ".join(map(str, value)) if isinstance(value, list) else str(value)


def png_url(image: Image.Image) -> str:
    """An image as a data URL."""
    file = io.BytesIO()
    image.save(file, format="PNG", optimize=True)
    return _data("image/png", file.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _figure(content: str, caption: str) -> Markup:
    return Markup(f"<figure>{content}<figcaption>{html.escape(caption)}</figcaption></figure>")
