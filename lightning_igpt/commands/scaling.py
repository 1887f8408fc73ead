"""``lightning-igpt scaling``: plan a study of sizes and budgets as recipes, and fit scaling laws to its runs."""

import importlib
import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from omegaconf import OmegaConf

from lightning_igpt import scaling
from lightning_igpt.commands import recipes
from lightning_igpt.commands.arguments import check_folder
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.files import shown, write_csv, write_text
from lightning_igpt.scaling import Point, Run

HEAD = ("run", "N", "N, all", "tokens", "FLOPs", "6 N D", "tokens / N")
SCRIPT = """#!/bin/sh
# Trains the runs of a study one after another, and continues where it was stopped. Start it where the study was
# planned; options, such as --data.source FOLDER, are passed on to each run.
set -e
for run in {names}; do
  lightning-igpt fit --config {folder}/"$run".yaml --resume auto "$@"
done
"""


def plan(
    recipe: str,
    *,
    budgets: list[float],
    sizes: list[str],
    out: str = "runs/scaling",
    lr: Literal["recipe", "hint"] = "recipe",
) -> None:
    """Write a recipe for each budget and size, and a script that trains them all and can be resumed.

    Args:
        recipe: File or shipped recipe that pretrains from scratch, with all settings but size and steps.
        budgets: Training FLOPs per run, one or more, such as 1e14 4e14; each run has the number of steps closest to it.
        sizes: Presets, or WIDTHxDEPTH such as 96x6, with heads at least as wide as the recipe's.
        out: Folder for recipes, script and runs. Missing folders are made.
        lr: The recipe's learning rate for all sizes; or hint, 0.0283 N^-1/4, which the rates of Henighan et al. (2020)
            follow with Adam; N leaves out embeddings.
    """
    folder = Path(out)
    check_folder(folder, "--out")
    path = Path(recipe) if Path(recipe).exists() else recipes.find(recipe)
    try:
        base: Any = OmegaConf.to_container(OmegaConf.load(path))
        options = base["model"].setdefault("init_args", {})
        batch = base.setdefault("data", {}).setdefault("init_args", {}).setdefault("batch_size", 128)
        from_scratch = base["model"]["class_path"].endswith("PretrainModule") and not options.get("pretrained")
    except Exception as error:  # PyYAML's, and those of files that are no recipe
        raise ValueError(f"{path} is no recipe: {error!r}") from error
    if not from_scratch:
        raise ValueError(f"{recipe} does not pretrain from scratch; take a recipe such as cifar10_tiny_pretrain")
    if not all(0 < budget < math.inf for budget in budgets):
        raise ValueError(f"budgets are {budgets}; they must be above 0")
    given = {name: options[name] for name in ("image_size", "objective") if options.get(name)}
    network = replace(ImageGPTConfig.resolve(options.get("network") or "igpt_s"), **given)
    rows, files = [[*HEAD, "steps", "lr", "lr hint"]], dict[Path, str]()
    for budget, size in ((budget, size) for budget in sorted(set(budgets)) for size in dict.fromkeys(sizes)):
        config, name = scaling.resized(network, size), f"{size}_{budget:.4g}".replace("+", "")
        run = Run(name, config, batch * scaling.steps_for(budget, config, batch))
        hint = float(f"{0.0283 * run.point().n ** -0.25:.3g}")
        rate = hint if lr == "hint" else options.get("lr", 0.003)
        files[folder / f"{name}.yaml"] = _recipe(base, run, run.images // batch, rate, folder, recipe)
        rows.append([*cells(run), f"{run.images // batch:,}", f"{rate:g}", f"{hint:g}"])
    names = " ".join(shlex.quote(row[0]) for row in rows[1:])
    files[folder / "run.sh"] = SCRIPT.format(names=names, folder=shlex.quote(str(folder)))
    for file, text in files.items():
        if file.exists() and file.read_text(encoding="utf-8") != text:
            raise FileExistsError(f"{file} belongs to another plan; remove it, or name another --out")
    for file, text in files.items():
        write_text(file, text)
    print_table(rows)
    print("lr hint is 0.0283 N^-1/4 (Henighan et al., 2020), a start for a search; --lr hint uses it.")
    print(f"next: sh {shown(folder / 'run.sh')}, then lightning-igpt scaling fit {shown(folder)}")


def _recipe(base: Any, run: Run, steps: int, lr: float, folder: Path, origin: str) -> str:
    """The text of a run's recipe. The run validates at its end only, where the fits read the metric."""
    recipe = json.loads(json.dumps(base))
    model, trainer = recipe["model"]["init_args"], recipe.setdefault("trainer", {})
    if isinstance(warmup := model.get("warmup_steps"), int) and warmup > steps:
        what = f"{run.name} has {steps} steps and the recipe's warmup_steps is {warmup}"
        raise ValueError(f"{what}; leave it out of the recipe, or raise the budget")
    model |= {"network": {name: value for name, value in asdict(run.config).items() if value is not None}, "lr": lr}
    batches = steps * int(trainer.get("accumulate_grad_batches") or 1)
    trainer |= {"max_steps": steps, "val_check_interval": batches, "default_root_dir": str(folder / run.name)}
    trainer.pop("max_epochs", None)
    head = f"# {run.name}: {run.point().c:.4g} FLOPs; planned from {origin} by lightning-igpt scaling plan.\n#\n"
    return f"{head}# lightning-igpt fit --config {folder / run.name}.yaml --resume auto\n\n{OmegaConf.to_yaml(recipe)}"


def fit(
    runs: list[str],
    metric: str = "val/nats_per_pixel",
    values: str | None = None,
    out: str = "scaling",
    n_bootstrap: int = 200,
    seed: int = 0,
) -> None:
    """Fit scaling laws to the results of runs of several sizes and budgets; write two tables and two plots.

    Args:
        runs: One or more folders that are runs, or have runs anywhere below them.
        metric: Metric whose last value is fitted: one that falls, or an accuracy, as 1 - accuracy. Of several matches,
            such as for online_probe/layer_*/accuracy, the best counts.
        values: A CSV file of results measured after training, with the columns ``run``, a run's folder, and METRIC.
        out: Folder for runs.csv, laws.csv, profiles.png and optima.png. Missing folders are made.
        n_bootstrap: Fits to resampled runs, for intervals; 0 leaves them out.
        seed: Seed of the resampling.
    """
    folder, label = Path(out), f"1 - {metric}" if metric.endswith("accuracy") else metric
    check_folder(folder, "--out")
    read = scaling.read_runs([Path(place) for place in runs], metric, Path(values) if values else None)
    points = [run.point() for run in read]
    epochs = [f"{run.images / run.train_images:.3g}" if run.train_images else "" for run in read]
    table: list[Any] = [(*HEAD, "epochs", label)]
    table += [(*cells(run), passes, f"{run.loss:.4f}") for run, passes in zip(read, epochs, strict=True)]
    write_csv(folder / "runs.csv", table)
    print_table(table)
    minima, refused = scaling.optima(points)
    if not minima:
        raise ValueError(refused[0])
    rows = [(f"{c:.3e}", f"{n:,.0f}", f"{d:.3e}", f"{d / n:.4g}", f"{loss:.4f}") for n, d, c, loss, _ in minima]
    print()
    print_table([("FLOPs", "N_opt", "D_opt", "D_opt / N_opt", label), *rows])
    columns = list[dict[str, str]]()
    for counted in (points, [run.point(embeddings=True) for run in read]):
        fitted, refused = scaling.fit_laws(counted)
        drawn, share = scaling.intervals(counted, fitted, n_bootstrap, seed)
        columns.append({name: f"{value:.4g}" for name, value in fitted.items()})
        for ranges in (drawn, scaling.without_each_size(counted, fitted)):
            columns.append({name: f"{low:.3g} to {high:.3g}" for name, (low, high) in ranges.items()})
    table = [("", *("N", "95 %", "one size left out"), *("N, all", "95 %", "one size left out"))]
    table += [(name, *(column.get(name, "") for column in columns)) for name in columns[0]]
    write_csv(folder / "laws.csv", table)
    print("", *scaling.LAWS, "", sep="\n")
    print_table(table)
    print(*[f"{share:.0%} of the resampled budgets had a minimum"] * (n_bootstrap > 0), *refused, sep="\n")
    draw(folder, points, label)
    print(f"wrote {shown(folder)}: runs.csv, laws.csv, profiles.png, optima.png")


def draw(folder: Path, points: Sequence[Point], label: str) -> None:
    """Plot the metric over N for each budget, with parabolas, and N_opt and D_opt over C, with power laws."""
    pictures = importlib.import_module("lightning_igpt.pictures")  # which needs torch, and plan does not
    series, lines, (minima, _) = dict[str, Any](), list[Any](), scaling.optima(points)
    for group in scaling.budgets(points):
        n, _, c, loss = np.array(sorted(group)).T
        series[f"{np.exp(np.log(c).mean()):.3g} FLOPs"] = n, loss
        x = np.geomspace(n[0], n[-1], 100)
        lines += [(x, best.loss + best.curvature * np.log(x / best.n) ** 2) for best in scaling.optima(group)[0]]
    n, d, c, loss, _ = np.array(minima).T
    series["minimum"] = n, loss
    plot = pictures.plot_fits(series, lines, labels=("parameters without embeddings", label))
    pictures.save_png(plot.light, folder / "profiles.png")
    laws = [scaling.power_law(c, y) for y in (n, d) if len(c) > 1]
    lines, labels = [(c, factor * c**power) for power, factor in laws], ("training FLOPs", "parameters, tokens")
    plot = pictures.plot_fits({"N_opt": (c, n), "D_opt": (c, d)}, lines, labels=labels, scales=("log", "log"))
    pictures.save_png(plot.light, folder / "optima.png")


def cells(run: Run) -> tuple[str, ...]:
    """The row of a run under ``HEAD``."""
    n, d, c, _ = run.point()
    every = run.point(embeddings=True).n
    return run.name, f"{n:,}", f"{every:,}", f"{d:.3e}", f"{c:.3e}", f"{6 * n * d:.3e}", f"{d / n:.4g}"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns, the first flush left."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    for name, *texts in rows:
        right = (text.rjust(width) for text, width in zip(texts, widths, strict=True))
        print("  ".join([shown(name).ljust(first), *right]).rstrip())


VERBS = {"plan": plan, "fit": fit}
