"""``lightning-igpt report``: any runs on one self-contained page, with the paper's numbers and what differs.

Not here: reading a run's files (``report_runs.py``, ``report_curves.py``), the paper's numbers (``report_paper.py``),
how a page looks (``lightning_igpt/report.py``).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from lightning_igpt import __version__
from lightning_igpt import report as page
from lightning_igpt.commands.arguments import run_function
from lightning_igpt.commands.places import check_file
from lightning_igpt.commands.report_curves import Curve
from lightning_igpt.commands.report_paper import Comparison, comparisons, percent
from lightning_igpt.commands.report_record import told
from lightning_igpt.commands.report_runs import Run, read_runs
from lightning_igpt.planning import parameter_count

METRICS = {"nats_per_pixel": min, "accuracy": max, "concat_accuracy": max}  # and which value of it is best
NONE = "–"

BESIDE_THE_PAPER = (
    "Numbers of the paper for the same kind of run, to see the distance. They are comparable only where nothing "
    "differs. What differs is listed as far as the runs' files tell, which is not splits, preprocessing and the search "
    "for settings; in brackets, what it was in the paper."
)


def report(runs: list[str], out: str = "report.html") -> None:
    """Gather runs on one HTML page: numbers, curves, completions, layers, confusion, worst images, low data.

    Args:
        runs: Folders, one or more: of single runs, or with runs anywhere below them.
        out: The page to write. It is one file that fetches nothing. Missing folders are made.
    """
    check_file(out, "--out", "report.html")
    if not runs:
        raise ValueError("name the folders of one or more runs")
    found = {run.folder.resolve(): run for given in runs for run in read_runs(Path(given))}.values()
    warnings = [warning for run in found for warning in run.warnings]
    warnings += [f"{run.folder} holds no numbers and no pictures of this package" for run in found if run.is_empty]
    full = [run for run in found if not run.is_empty]
    if not full:
        raise ValueError("; ".join(warnings))
    sections = [page.section("Warnings", page.bullets(warnings))] if warnings else []
    sections.append(page.section("Summary", summary(full)))
    if rows := [comparison for run in full for comparison in comparisons(run)]:
        sections.append(page.section("Beside the paper's numbers", BESIDE_THE_PAPER, beside_the_paper(rows)))
    with tempfile.TemporaryDirectory() as plots:
        sections += [page.section(run.name, describe(run), *figures(run, Path(plots))) for run in full]
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    count = "1 run" if len(full) == 1 else f"{len(full)} runs"
    page.write_page(path, "Image GPT runs", f"{count}; written by lightning_igpt {__version__}.", sections)
    for warning in warnings:
        print(f"warning: {warning}")
    print(f"wrote {path}: {count}")


def summary(runs: Sequence[Run]) -> str:
    """A table of the last and best numbers of every run."""
    rows: list[tuple[str, ...]] = []
    above = {}
    for run in runs:
        if found := [*_metric_rows(run), *_low_data_rows(run)]:
            above[len(rows)] = run.name
            rows += found
    if not rows:
        return "There are pictures and curves, but no validation and no test."
    head = ("metric", "test", "validation, last", "validation, best")
    return page.table(rows, head, numbers=(1, 2), notes=(3,), above=above)


def beside_the_paper(comparisons: Sequence[Comparison]) -> str:
    """A table of (kind, here, paper), with what differs below each row, or below rows that differ in the same."""
    above, below = {}, {}
    for number, row in enumerate(comparisons):
        before = comparisons[number - 1] if number else None
        after = comparisons[number + 1] if number + 1 < len(comparisons) else None
        if before is None or before.run != row.run:
            above[number] = row.run
        if after is None or (after.run, after.differs) != (row.run, row.differs):
            below[number] = f"What differs: {'; '.join(row.differs) or 'nothing that the files tell'}."
    cells = [(row.task, row.here, row.paper) for row in comparisons]
    return page.table(cells, ("kind", "here", "paper"), notes=(), above=above, below=below)


def describe(run: Run) -> str:
    """What a run is, as far as its files tell."""
    what = run.module or ("Low data" if run.low_data else "Module not recorded")
    parts = []
    if network := run.network:
        objective = "BERT" if network.objective == "bert" else network.objective
        parts.append(f"{objective}, {network.n_layer} layers, width {network.n_embd}, {network.n_head} heads")
        parts.append(f"{parameter_count(network) / 1e6:.1f}M parameters")
        parts.append(f"{network.image_size} × {network.image_size} pixels, {network.vocab_size} colours")
    parts += [f"data: {run.source}"] if run.source else []
    parts += [f"{run.n_images:,} training images, {run.n_drawn:,} drawn"] if run.n_images and run.n_drawn else []
    parts += [f"weights: {run.pretrained}"] if run.pretrained else []
    parts += [f"lightning_igpt {run.version}"] if run.version else []
    return f"{what}: {'; '.join(parts) or 'nothing more is recorded'}."


def figures(run: Run, folder: Path) -> Iterator[str]:
    """The plots, pictures and tables of a run.

    Args:
        run: The run.
        folder: Where plots may be written before they are put into the page.
    """
    if nats := _named(run, {"train/nats_per_pixel": "training", "val/nats_per_pixel": "validation"}):
        levels = {"uniform": math.log(run.network.vocab_size)} if run.network else {}
        plot = page.plot_loss(_columns(nats), levels, folder / "nats.png")
        hidden = " over hidden pixels" if run.network and run.network.objective == "bert" else ""
        yield page.drawing(plot, "Nats per pixel against steps", f"Nats per pixel{hidden}; lower is better.")
    online = {name: name.split("/")[1].replace("_", " ") for name in run.curves if name.startswith("online_probe/")}
    accuracy = _named(run, {"val/accuracy": "validation", **online})
    if any(len(curve) > 1 for curve in accuracy.values()):
        plot = page.plot_loss(_columns(accuracy, scale=100), {}, folder / "accuracy.png", ylabel="accuracy in %")
        caption = "Accuracy of the online probe during pretraining." if online else "Accuracy; higher is better."
        yield page.drawing(plot, "Accuracy against steps", caption)
    if run.layers:
        layers: dict[str, dict[int, float]] = {
            part: {layer: 100 * value for layer, value in run.layers[part].items()}
            for part in ("test", "validation")  # the first stands out
            if part in run.layers
        }
        plot = page.plot_layers(layers, {}, folder / "layers.png", ylabel="accuracy in %")
        yield page.drawing(plot, "Accuracy against layer", "Probe accuracy by layer; a layer is chosen by validation.")
    if run.low_data:
        yield f"The result is that of layer {run.low_data['layer']}, {run.low_data['layer_choice']}."
        yield _low_data_table(run)
    for path, caption in run.pictures.items():
        yield page.picture(path, caption, caption)
    if made := told(run.record):
        yield page.facts("Command, machine, versions", made)


def _metric_rows(run: Run) -> Iterator[tuple[str, ...]]:
    for metric, best in METRICS.items():
        val, test = run.curves.get(f"val/{metric}", []), run.curves.get(f"test/{metric}", [])
        if val or test:
            label, show = metric.replace("_", " "), _nats if metric == "nats_per_pixel" else percent
            if show is _nats and run.network is not None and run.network.objective == "bert":
                label = "nats per hidden pixel"
            finite = [point for point in val if math.isfinite(point[1])]
            step, top = best(finite, key=lambda point: point[1], default=(0, math.nan))
            chosen = f"{show(top)} at step {step:,}" if finite else NONE
            yield label, show(test[-1][1]) if test else NONE, show(val[-1][1]) if val else NONE, chosen


def _low_data_rows(run: Run) -> Iterator[tuple[str, ...]]:
    for result in run.low_data.get("results", []):
        if result["layer"] == run.low_data["layer"]:
            label = f"accuracy, {result['labels_per_class']} labels per class"
            yield label, percent(result["mean"], result["sd"]), NONE, NONE


def _low_data_table(run: Run) -> str:
    rows = [
        (str(result["layer"]), str(result["labels_per_class"]), percent(result["mean"], result["sd"]))
        for result in run.low_data["results"]
    ]
    return page.table(rows, ("layer", "labels per class", "test accuracy"), numbers=(2,), notes=())


def _named(run: Run, names: dict[str, str]) -> dict[str, Curve]:
    """The curves among ``names``, under their labels."""
    return {label: run.curves[name] for name, label in names.items() if name in run.curves}


def _columns(curves: dict[str, Curve], scale: float = 1) -> dict[str, tuple[list[int], list[float]]]:
    return {
        label: ([step for step, _ in curve], [scale * value for _, value in curve]) for label, curve in curves.items()
    }


def _nats(value: float) -> str:
    return f"{value:.4f}"


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    return run_function(report, words, "report", positional=True)
