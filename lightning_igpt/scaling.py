"""Scaling studies: which network a budget of operations trains best, fitted to runs of several sizes and budgets.

N is a number of parameters, D of tokens seen, C of training operations, and L what was measured, the lower the better.
In each budget a parabola in ln N gives N_opt, D_opt and the least L (Hoffmann et al., 2022, approach 2). ``LAWS`` are
fitted across budgets: the first three to these minima (the form of Henighan et al., 2020), the last to all runs
(Hoffmann et al., 2022, approach 3).
"""

import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares, nnls

from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.planning import block_matrices, parameter_count, train_flops_per_token

LAWS = (
    "N_opt = k_N C^a, and ~ (6 N_opt D_opt)^a6",
    "D_opt = k_D C^b",
    "L = L_inf + K / C^alpha_C",
    "L = E + A / N^alpha + B / D^beta",
)
SAME_BUDGET = 1.1  # runs belong to one budget if their operations differ by at most this factor
HUBER = 1e-3  # a residual of ln L beyond this counts linearly, as in Hoffmann et al., 2022
EXPONENTS = (0.05, 0.1, 0.2, 0.35, 0.6, 1.0)  # where fits start; the best REFINED of all combinations are refined
REFINED = 4

Ranges = dict[str, tuple[float, float]]  # of the values of laws, by name


class Point(NamedTuple):
    """N, D, C and L of a run."""

    n: float
    d: float
    c: float
    loss: float


@dataclass(frozen=True)
class Run:
    """A run, planned or done: its network, the number of images that it sees, and what was measured at its end."""

    name: str
    config: ImageGPTConfig
    images: int
    loss: float = math.nan
    train_images: int | None = None  # different ones

    def point(self, *, embeddings: bool = False) -> Point:
        """What the laws are fitted to; N counts all parameters, or the matrices of the blocks alone; C is exact."""
        n = parameter_count(self.config) if embeddings else self.config.n_layer * block_matrices(self.config)
        tokens = self.images * self.config.n_positions
        return Point(n, tokens, tokens * train_flops_per_token(self.config), self.loss)


class Optimum(NamedTuple):
    """The minimum of a budget's parabola, L = loss + curvature (ln N - ln n)^2."""

    n: float
    d: float
    c: float
    loss: float
    curvature: float


def resized(base: ImageGPTConfig, size: str) -> ImageGPTConfig:
    """``base`` with the shape of a preset, or of WIDTHxDEPTH, with heads at least as wide as those of ``base``."""
    match = re.fullmatch(r"(\d+)x(\d+)", size)
    if not match and size not in PRESETS:
        raise ValueError(f"the size {size} is neither WIDTHxDEPTH, such as 96x6, nor one of {', '.join(PRESETS)}")
    width, depth = map(int, match.groups()) if match else (PRESETS[size].n_embd, PRESETS[size].n_layer)
    most = max(1, width * base.n_head // base.n_embd) if match else PRESETS[size].n_head
    heads = next(n for n in range(most, 0, -1) if width % n == 0)
    inner = base.n_inner and base.n_inner * width // base.n_embd
    return replace(base, n_layer=depth, n_head=heads, n_embd=width, n_inner=inner)


def read_runs(folders: Iterable[Path], metric: str, values: Path | None = None) -> list[Run]:
    """The runs below folders that have a metric, in ``metrics.csv`` or in a file of ``values``, at their last step.

    Of several metrics that match, the best counts; of an accuracy, 1 - accuracy. ValueError where no run has it, a run
    has not reached its last step, or what the runs reach does not fall with the budget.
    """
    given, runs, others = _read_values(values, metric) if values else {}, list[Run](), set[str]()
    for folder in folders:
        for table in sorted(folder.rglob("metrics.csv")):
            last = _last_values(table) if (table.parent / "run.json").exists() else {}  # none of evaluations
            place = next((place for place in table.resolve().parents if place in given), None)
            found = [pair for name, pair in last.items() if fnmatchcase(name, metric)] if not values else []
            if place:
                found = [(max(step for step, _ in last.values()), given[place])]
            if found:
                ends = [1 - value if metric.endswith("accuracy") else value for _, value in found]
                name = str(table.parent.relative_to(folder)).removesuffix("/version_0")
                runs.append(_read_run(table.parent / "run.json", name, 1 + max(step for step, _ in found), min(ends)))
            others |= last.keys()
    if not runs:
        raise ValueError(f"no run there has {metric}; they have {', '.join(sorted(others)) or 'no metrics.csv'}")
    first, *rest = (min((p.loss, p.c) for p in group) for group in budgets(run.point() for run in runs))
    if rest and rest[-1][0] >= first[0]:
        both = " and ".join(f"{loss:.4g} at {c:.3g} FLOPs" for loss, c in (first, rest[-1]))
        raise ValueError(f"the best {metric} is {both}; laws need a metric that falls: name another")
    return sorted(runs, key=lambda run: (float(f"{run.point().c:.2g}"), run.point().n))


def _last_values(table: Path) -> dict[str, tuple[int, float]]:
    """(step, value) of the last row with each metric."""
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows = [(int(row.pop("step")), row) for row in csv.DictReader(file)]
        return {name: (step, float(value)) for step, row in rows for name, value in row.items() if value}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{table} is damaged ({error!r}); restore or remove it") from error


def _read_values(path: Path, metric: str) -> dict[Path, float]:
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if not {"run", metric} <= {*(rows.fieldnames or ())}:
            raise ValueError(f"{path} has the columns {', '.join(rows.fieldnames or ())}; it needs run and {metric}")
        return {Path(row["run"]).resolve(): float(row[metric]) for row in rows}


def _read_run(path: Path, name: str, steps: int, loss: float) -> Run:
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
    return Run(name, config, steps * batch, loss, record.get("images", {}).get("train_images"))


def steps_for(budget: float, config: ImageGPTConfig, batch_size: int) -> int:
    """Optimizer steps whose operations come closest to a budget; ValueError where that is none."""
    per_step = train_flops_per_token(config) * config.n_positions * batch_size
    if (steps := round(budget / per_step)) < 1:
        what = f"a budget of {budget:.3g} FLOPs is below one step of {batch_size} images, {per_step:.3g} FLOPs"
        raise ValueError(f"{what}, at width {config.n_embd} and depth {config.n_layer}; raise it or lower batch_size")
    return steps


def budgets(points: Iterable[Point]) -> list[list[Point]]:
    """The points by budget, the smallest first."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.c):
        if not groups or point.c > SAME_BUDGET * groups[-1][0].c:
            groups.append([])
        groups[-1].append(point)
    return groups


def optimum(points: Sequence[Point]) -> Optimum:
    """The minimum in one budget; ValueError where the parabola has none between the sizes."""
    n, d, c, loss = np.array(sorted(points)).T
    x, budget, sizes = np.log(n), float(np.exp(np.log(c).mean())), np.unique(n)
    if len(sizes) < 3:
        raise ValueError(f"a parabola takes 3 sizes, and {budget:.3g} FLOPs has {len(sizes)}; add runs")
    p = np.polyfit(x - x.mean(), loss, 2)
    lowest = -p[1] / (2 * p[0]) + x.mean() if p[0] > 0 else math.inf
    if not x[0] < lowest < x[-1]:
        left, right = np.polyval(p, x[[0, -1]] - x.mean())
        best, more = ("largest", "larger") if right < left else ("smallest", "smaller")
        what = f"no minimum between {n[0]:,.0f} and {n[-1]:,.0f} parameters, since it favors the {best} network"
        raise ValueError(f"at {budget:.3g} FLOPs the parabola has {what}; add {more} networks")
    tokens = np.interp(lowest, np.log(sizes), [np.log(d[n == size]).mean() for size in sizes])
    return Optimum(math.exp(lowest), math.exp(tokens), budget, float(np.polyval(p, lowest - x.mean())), float(p[0]))


def optima(points: Iterable[Point]) -> tuple[list[Optimum], list[str]]:
    """The minima of all budgets that have one, and why others have none."""
    minima, refused = list[Optimum](), list[str]()
    for group in budgets(points):
        try:
            minima.append(optimum(group))
        except ValueError as error:
            refused.append(str(error))
    return minima, refused


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(p, k) of y = k x^p, by least squares of logarithms."""
    slope, intercept = np.polyfit(np.log(x), np.log(y), 1)
    return float(slope), float(np.exp(intercept))


def sum_of_powers(
    sizes: Sequence[Sequence[float]], loss: Sequence[float], start: Sequence[float] | None = None
) -> list[float]:
    """[E, factors, exponents] of loss = E + sum of factor_i / size_i^exponent_i, none of which is negative.

    Minimizes Huber's loss of ln L from several starts, or from ``start``, what an earlier fit gave.
    """
    x, y = np.log(np.array(sizes, dtype=float)), np.log(np.array(loss, dtype=float))  # (terms, points), (points,)
    terms, middle, least = len(x), x.mean(1), float(y.min()) - 12  # e^-12 of the least loss is nothing
    x -= middle[:, None]  # else factors and exponents would be nearly collinear

    def parts(values: Any) -> Any:
        return np.exp(values[: 1 + terms, None] - np.vstack([0 * y, values[1 + terms :, None] * x]))

    def slopes(values: Any) -> Any:
        shares = parts(values) / parts(values).sum(0)
        return np.vstack([shares, -shares[1:] * x]).T

    starts: list[tuple[float, Any, Any]] = []
    exponents: Any
    for exponents in product(EXPONENTS, repeat=terms) if start is None else ():
        columns = np.vstack([0 * y + 1, np.exp(-np.array(exponents)[:, None] * x)]) / np.exp(y)
        factors, error = nnls(columns.T, 0 * y + 1)  # E and factors, given the exponents
        starts.append((error, factors, exponents))
    if start is not None:
        factors, exponents = np.split(np.array(start), [1 + terms])
        starts.append((0.0, factors * np.exp(-np.append(0, exponents * middle)), exponents))
    low, high = [least] * (1 + terms) + [1e-3] * terms, [y.min()] + [y.max() + 12] * terms + [3] * terms
    options: dict[str, Any] = {"jac": slopes, "bounds": (low, high), "loss": "huber", "f_scale": HUBER}
    fits = [
        least_squares(lambda values: np.log(parts(values).sum(0)) - y, np.clip(one, low, high), **options)
        for _, factors, exponents in sorted(starts, key=lambda start: start[0])[:REFINED]
        for one in [[*np.log(np.maximum(factors, math.exp(least))), *exponents]]
    ]
    logs, exponents = np.split(min(fits, key=lambda fit: float(fit.cost)).x, [1 + terms])
    return [*np.exp(logs + np.append(0, exponents * middle)).tolist(), *exponents.tolist()]


def fit_laws(points: Sequence[Point], earlier: Mapping[str, float] | None = None) -> tuple[dict[str, float], list[str]]:
    """The values of ``LAWS``, by name, and why some are missing; ``earlier`` values are where to start."""
    minima, refused = optima(points)
    n, d, c, loss, _ = np.array(minima).reshape(-1, 5).T.tolist()
    values: dict[str, float] = {}

    def fit(names: str, sizes: Sequence[Sequence[float]], loss: Sequence[float]) -> None:
        known = [(earlier or {}).get(name, math.nan) for name in names.split()]
        fitted = sum_of_powers(sizes, loss, known if np.isfinite(known).all() else None)
        values.update(zip(names.split(), fitted, strict=True))

    if len(minima) < 3:
        refused.append(f"a and b need 2 budgets with a minimum, L_inf, K and alpha_C 3; the runs have {len(minima)}")
    if len(minima) > 1:
        values["a"], values["k_N"] = power_law(c, n)
        values["b"], values["k_D"] = power_law(c, d)
        values["a6"], _ = power_law([6 * one.n * one.d for one in minima], n)
    if len(minima) > 2:
        fit("L_inf K alpha_C", [c], loss)
    n_sizes, n_budgets = len({point.n for point in points}), len(budgets(points))
    if len(points) < 6 or n_sizes < 3 or n_budgets < 2:
        have = f"{len(points)} of {n_sizes} sizes in {n_budgets}"
        refused.append(f"E, A, B, alpha and beta need 6 runs of 3 sizes in 2 budgets; there are {have}")
        return values, refused
    sizes = [[point.n for point in points], [point.d for point in points]]
    fit("E A B alpha beta", sizes, [point.loss for point in points])
    values["beta/(alpha+beta)"] = values["beta"] / (values["alpha"] + values["beta"])
    return values, refused


def intervals(
    points: Sequence[Point], values: Mapping[str, float], n_bootstrap: int = 200, seed: int = 0
) -> tuple[Ranges, float]:
    """95 % intervals of ``values``, which ``fit_laws`` gave, by fits to runs drawn with replacement in each budget.

    Where a budget has a minimum, draws without one are drawn again; the share that was kept comes second.
    """
    generator, kept, drawn = np.random.default_rng(seed), 0, 0
    groups, fits = [(group, len(optima(group)[0])) for group in budgets(points)], list[dict[str, float]]()
    for _ in range(n_bootstrap):
        sample: list[Point] = []
        for group, needed in groups:
            draw: list[Point] = []
            while not draw or len(optima(draw)[0]) < needed:
                draw, drawn = [group[i] for i in generator.integers(len(group), size=len(group))], drawn + 1
            sample, kept = sample + draw, kept + 1
        fits.append(fit_laws(sample, values)[0])
    return _ranges(fits, (2.5, 97.5)), kept / max(1, drawn)


def without_each_size(points: Sequence[Point], values: Mapping[str, float]) -> Ranges:
    """The lowest and the highest of each of ``values``, which ``fit_laws`` gave, in fits that leave out one size."""
    sizes = sorted({point.n for point in points})
    return _ranges([fit_laws([point for point in points if point.n != n], values)[0] for n in sizes], (0, 100))


def _ranges(fits: Sequence[Mapping[str, float]], percentiles: tuple[float, float]) -> Ranges:
    names = dict.fromkeys(name for fit in fits for name in fit)
    ends = {name: np.percentile([fit[name] for fit in fits if name in fit], percentiles) for name in names}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}
