"""``lightning-igpt scaling``: plan a study of sizes and budgets, and fit scaling laws to its runs."""

import csv
import importlib
import json
import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from lightning_igpt import scaling
from lightning_igpt.commands.arguments import check_folder
from lightning_igpt.commands.scaling_plan import HEAD, cells, plan, print_table
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.files import write_csv
from lightning_igpt.scaling import Optimum, Point, Run


def fit(
    runs: list[str],
    metric: str = "val/nats_per_pixel",
    values: str | None = None,
    out: str = "scaling",
    n_bootstrap: int = 200,
    seed: int = 0,
) -> None:
    """Fit scaling laws to what runs of several sizes and budgets reached; write two tables and two plots.

    Args:
        runs: Folders, one or more: of single runs, or with runs anywhere below them.
        metric: What to fit: the last value of a metric that falls, or of an accuracy, as 1 - accuracy. Of several that
            match, such as online_probe/layer_*/accuracy, the best.
        values: A CSV file with the columns ``run``, a run's folder, and METRIC, for what was measured after training.
        out: Folder for runs.csv, laws.csv, profiles.png and optima.png. Missing folders are made.
        n_bootstrap: Fits to resampled runs, for intervals; 0 leaves them out.
        seed: Of the resampling.
    """
    folder = Path(out)
    check_folder(folder, "--out")
    read = read_runs(runs, metric, values)
    label = f"1 - {metric}" if metric.endswith("accuracy") else metric
    epochs = [f"{run.images / run.train_images:.3g}" if run.train_images else "" for run in read]
    table = [(*cells(run), passes, f"{run.loss:.4f}") for run, passes in zip(read, epochs, strict=True)]
    table.insert(0, (*HEAD, "epochs", label))
    write_csv(folder / "runs.csv", table)
    print_table(table)
    points = [run.point() for run in read]
    lows = [min(group, key=lambda point: point.loss) for group in scaling.budgets(points)]
    if len(lows) > 1 and lows[-1].loss >= lows[0].loss:
        what = f"the best {label} is {lows[0].loss:.4g} at {lows[0].c:.3g} FLOPs and {lows[-1].loss:.4g} at"
        raise ValueError(
            f"{what} {lows[-1].c:.3g}; laws are fitted to what falls with the budget, so name another metric"
        )
    minima, _ = scaling.optima(points)
    print("\nminima of the parabolas in ln N, without embeddings" * bool(minima))
    rows = [(f"{c:.3e}", f"{n:,.0f}", f"{d:.3e}", f"{d / n:.4g}", f"{loss:.4f}") for n, d, c, loss, _ in minima]
    print_table([("FLOPs", "N_opt", "D_opt", "D_opt / N_opt", label), *rows])
    print("", *scaling.LAWS, "", sep="\n")
    columns, share, refused = list[dict[str, str]](), 0.0, list[str]()
    for counted in ([run.point(embeddings=True) for run in read], points):
        fitted, refused = scaling.fit_laws(counted)
        drawn, share = scaling.intervals(counted, fitted, n_bootstrap, seed)
        ranges = [
            {name: f"{low:.3g} to {high:.3g}" for name, (low, high) in pairs.items()}
            for pairs in (drawn, scaling.without_each_size(counted, fitted))
        ]
        columns = [{name: f"{value:.4g}" for name, value in fitted.items()}, *ranges, *columns]
    table = [("", "N", "95 %", "one size left out", "N, all", "95 %", "one size left out")]
    table += [(name, *(column.get(name, "") for column in columns)) for name in columns[0]]
    write_csv(folder / "laws.csv", table)
    print_table(table)
    print(*[f"{share:.0%} of the resampled budgets had a minimum"] * (n_bootstrap > 0), *refused, sep="\n")
    if not minima:
        raise ValueError(refused[0])
    draw(folder, points, minima, fitted, label)
    print(f"wrote {folder}: runs.csv, laws.csv, profiles.png, optima.png")


def read_runs(folders: Sequence[str], metric: str, values: str | None = None) -> list[Run]:
    """The runs below folders that have a metric, in ``metrics.csv`` or in a file of ``values``, at their last step."""
    read_curves = importlib.import_module("lightning_igpt.report").read_curves  # which needs torch; plan does not
    given: dict[Path, float] = {}
    if values:
        with Path(values).open(newline="", encoding="utf-8") as file:
            given = {Path(row["run"]).resolve(): float(row[metric]) for row in csv.DictReader(file)}
    tables = {
        table.resolve(): Path(folder) for folder in folders for table in sorted(Path(folder).rglob("metrics.csv"))
    }
    found, others = list[Run](), set[str]()
    for table, folder in tables.items():
        if not (table.parent / "run.json").exists():  # of an evaluation
            continue
        curves = read_curves(table)
        place = next((place for place in table.parents if place in given), None)
        matching = [curve for name, curve in curves.items() if fnmatchcase(name, metric)]
        if place is None and (values or not matching):
            others |= curves.keys()
            continue
        ends = [curve[1][-1] for curve in matching]
        is_accuracy = metric.endswith("accuracy")
        value = given[place] if place else max(ends) if is_accuracy else min(ends)
        steps = 1 + max(curve[0][-1] for curve in (curves.values() if place else matching))
        name = str(table.parent.relative_to(folder)).removesuffix("/lightning_logs/version_0")
        found.append(_run(table.parent / "run.json", name, steps, 1 - value if is_accuracy else value))
    if not found:
        names = f"; there are {', '.join(sorted(others))}" if others else ""
        raise ValueError(f"no run below {', '.join(folders)} has {metric}{names}")
    return found


def _read_values(path: Path, metric: str) -> dict[Path, float]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if not {"run", metric} <= {*(rows.fieldnames or ())}:
            raise ValueError(f"{path} has the columns {', '.join(rows.fieldnames or ())}; it needs run and {metric}")
        return {Path(row["run"]).resolve(): float(row[metric]) for row in rows}


def _run(path: Path, name: str, steps: int, loss: float) -> Run:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))["runs"][-1]
        config = ImageGPTConfig.resolve(record["module"]["hparams"]["network"])
        batch, longest = int(record["data"]["hparams"]["batch_size"]), int(record["trainer"]["max_steps"])
    except (LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not say network, batch size and steps ({error!r}); leave the run out") from error
    if steps < longest:
        raise ValueError(f"{path.parent} was measured at step {steps} of {longest}; continue it, or leave it out")
    if not 0 < loss < math.inf:
        raise ValueError(f"{path.parent}: the value to fit is {loss:g}; it must be above 0, and an accuracy below 1")
    return Run(name, config, steps * batch, loss, record["images"].get("train_images"))


def draw(folder: Path, points: Sequence[Point], minima: Sequence[Optimum], laws: dict[str, float], label: str) -> None:
    """Plot the metric over N for each budget, with parabolas, and N_opt and D_opt over C, with power laws."""
    pictures = importlib.import_module("lightning_igpt.pictures")
    series, lines = dict[str, Any](), list[Any]()
    for group in scaling.budgets(points):
        n, _, c, loss = np.array(sorted(group)).T
        series[f"{np.exp(np.log(c).mean()):.3g} FLOPs"] = n, loss
        x = np.geomspace(n[0], n[-1], 100)
        best = [one for one in minima if c[0] / scaling.SAME_BUDGET < one.c < c[0] * scaling.SAME_BUDGET]
        lines.append((x, best[0].loss + best[0].curvature * np.log(x / best[0].n) ** 2) if best else ((), ()))
    marks, names = ([one.n for one in minima], [one.loss for one in minima]), ("parameters without embeddings", label)
    pictures.save_png(pictures.plot_fits(series, lines, marks, labels=names).light, folder / "profiles.png")
    n, d, c, _, _ = np.array(minima).T
    fitted = [(c, laws[factor] * c ** laws[power]) for factor, power in (("k_N", "a"), ("k_D", "b")) if power in laws]
    names = ("training FLOPs", "parameters, tokens")
    series = {"N_opt": (c, n), "D_opt": (c, d)}
    plot = pictures.plot_fits(series, fitted or [((), ())] * 2, labels=names, scales=("log", "log"))
    pictures.save_png(plot.light, folder / "optima.png")


VERBS = {"plan": plan, "fit": fit}
