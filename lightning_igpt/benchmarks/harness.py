"""What all benchmarks share: options, turns, the machine's limits, the table, and the JSON line."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_igpt.config import PRESETS

PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "bf16-true": torch.bfloat16}
MATRIX = {"cpu": 2048, "cuda": 8192}  # side of the matrix product that measures the arithmetic limit
COPIED_BYTES = {"cpu": 2**28, "cuda": 2**31}  # far beyond any cache


class Limits(NamedTuple):
    """What the machine reached in the same run."""

    flops_per_second: float
    bytes_per_second: float  # the faster of reading alone and copying (read and written bytes)


@dataclass(frozen=True)
class Turns:
    """Seconds of one side, turn by turn."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure to compare."""
        return statistics.median(self.seconds)

    def times(self, factor: float) -> Turns:
        """The seconds of as many times the work."""
        return Turns(tuple(seconds * factor for seconds in self.seconds))

    def ratio_to(self, other: Turns) -> float:
        """Speed relative to ``other``: the median over the turns of the ratio within a turn."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def options_parser(
    name: str,
    about: str | None,
    *,
    repeats: int = 5,
    batch_size: int | None = None,
    preset: str | None = None,
    precisions: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """The options of a benchmark: ``about`` is its docstring, the others are defaults; None leaves an option out."""
    parser = argparse.ArgumentParser(
        prog=f"python -m lightning_igpt.benchmarks.{name}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.set_defaults(benchmark=name)
    parser.add_argument("--device", default=device, help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"turns of each side (default {repeats})")
    if batch_size is not None:
        parser.add_argument("--batch-size", type=int, default=batch_size, help=f"images (default {batch_size})")
    if preset is not None:
        parser.add_argument("--preset", choices=sorted(PRESETS), default=preset, help=f"network (default {preset})")
    if precisions:
        parser.add_argument("--precision", choices=precisions, help="default: see above")
    return parser


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """Wall-clock seconds of one call, including the device's work."""

    def wait() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def in_turns(
    sides: Mapping[str, Callable[[], object]], *, repeats: int, device: str = "cpu", warm_up: int = 1
) -> dict[str, Turns]:
    """Time all sides one after the other, ``repeats`` times, after ``warm_up`` rounds that do not count."""
    for _ in range(warm_up):
        for run in sides.values():
            run()
    turns = [{name: seconds_of(run, device) for name, run in sides.items()} for _ in range(repeats)]
    return {name: Turns(tuple(turn[name] for turn in turns)) for name in sides}


def machine_limits(device: str = "cpu", dtype: torch.dtype = torch.float32, repeats: int = 7) -> Limits:
    """A large matrix product, and a large copy or sum, the best of ``repeats``."""
    kind = torch.device(device).type
    side = MATRIX.get(kind, 2048)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.ones(COPIED_BYTES.get(kind, 2**28) // 4, device=device)
    target = torch.ones_like(source)
    sides: dict[str, Callable[[], object]] = {
        "product": lambda: a @ b,
        "copy": lambda: target.copy_(source),
        "sum": source.sum,
    }
    best = {name: min(turns.seconds) for name, turns in in_turns(sides, repeats=repeats, device=device).items()}
    size = source.numel() * source.element_size()
    return Limits(2 * side**3 / best["product"], max(2 * size / best["copy"], size / best["sum"]))


def largest_difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference, as a share of the largest absolute value of ``theirs``."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def require(agrees: bool, what: str) -> None:
    """RuntimeError where two sides do not compute the same."""
    if not agrees:
        raise RuntimeError(f"the sides disagree, so comparing their speed means nothing: {what}")


def conditions(device: str, *libraries: Any) -> dict[str, Any]:
    """Device, threads and versions, for the JSON line."""
    name = f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version()}
        | {one.__name__: one.__version__ for one in (torch, *libraries)},
    }


def print_table(
    title: str, rows: Mapping[str, Turns], *, peer: str, work: Mapping[str, float] | None = None, limit: float = 1
) -> None:
    """Print median, spread, ratio to the row ``peer`` and fraction of the limit.

    ``work`` is the operations or bytes of the rows whose limit is known, ``limit`` those of a second.
    """
    print(f"\n{title:<50}{'ms':>10}   {'fastest..slowest':<20}{'x peer':>8}{'of limit':>10}")
    for name, turns in rows.items():
        spread = f"{min(turns.seconds) * 1e3:,.2f}..{max(turns.seconds) * 1e3:,.2f}"
        share = f"{work[name] / turns.median / limit:>9.0%}" if work and name in work else f"{'':>9}"
        ratio = turns.ratio_to(rows[peer])
        print(f"  {name:<48}{turns.median * 1e3:>10,.2f}   {spread:<20}{ratio:>7.2f}x{share}", flush=True)


def print_result(options: argparse.Namespace, rows: Mapping[str, Turns], *libraries: Any, **rest: Any) -> None:
    """Print the last line: what is measured, seconds of every side, the options and the conditions."""
    figures = {"median_s": statistics.median, "min_s": min, "max_s": max}
    sides = {
        name: {key: float(f"{figure(turns.seconds):.6g}") for key, figure in figures.items()}  # type: ignore[operator]
        for name, turns in rows.items()
    }
    given = {name: value for name, value in vars(options).items() if name in ("preset", "batch_size", "precision")}
    print_json(options.benchmark, **rest, **given, sides=sides, **conditions(options.device, *libraries))


def print_json(name: str, *, ratio_vs_peer: float | None, fraction_of_limit: float | None, **rest: Any) -> None:
    """Print the last line, one JSON object; None where there is no peer or no limit."""
    ratios = {"ratio_vs_peer": ratio_vs_peer, "fraction_of_limit": fraction_of_limit}
    short = {key: None if value is None else float(f"{value:.4g}") for key, value in ratios.items()}
    print(json.dumps({"benchmark": name, **short, **rest}))
