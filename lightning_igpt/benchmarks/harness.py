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
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.trainer import best_precision
from lightning_igpt.weights import save_pretrained

try:
    import transformers as transformers
except ModuleNotFoundError as error:
    raise SystemExit('benchmarks compare with transformers: pip install ".[hf]"') from error

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

    def figures(self, items: int) -> dict[str, float]:
        """Seconds, and how many of ``items`` in a second."""
        seconds = {"median_s": self.median, "min_s": min(self.seconds), "max_s": max(self.seconds)}
        return seconds | {"per_s": items / self.median}

    def times(self, factor: float) -> Turns:
        """The seconds of as many times the work."""
        return Turns(tuple(seconds * factor for seconds in self.seconds))

    def ratio_to(self, other: Turns) -> float:
        """Speed relative to ``other``: the median over the turns of the ratio within a turn."""
        return statistics.median(b / a for a, b in zip(self.seconds, other.seconds, strict=True))


def parse(
    name: str, about: str | None, words: Sequence[str] | None, precisions: Sequence[str] = (), /, **own: tuple[Any, str]
) -> argparse.Namespace:
    """The options of a benchmark; ``own`` has defaults and texts of further ones: numbers from 1 on, switches."""
    prog, layout = f"python -m lightning_igpt.benchmarks.{name}", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog, description=about, formatter_class=layout)
    parser.set_defaults(benchmark=name)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    if precisions:
        parser.add_argument("--preset", choices=sorted(PRESETS), default="igpt_s", help="network (default igpt_s)")
        parser.add_argument("--precision", choices=precisions, help="default: what suits the device")
    for option, (default, text) in ({"repeats": (5, "repetitions of each side")} | own).items():
        kind: dict[str, Any] = {"action": "store_true"} if default is False else {"type": _count, "default": default}
        parser.add_argument(f"--{option.replace('_', '-')}", help=f"{text} (default {default})", **kind)
    options = parser.parse_args(words)
    if precisions and options.precision is None:
        usual = best_precision(options.device.split(":")[0])[0]
        options.precision = usual if usual in precisions else precisions[0]
    return options


def _count(word: str) -> int:
    if int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word} must be 1 or more")
    return int(word)


def both_networks(config: ImageGPTConfig, device: str) -> tuple[ImageGPT, Any]:
    """A network with random weights, and an ``ImageGPTForCausalImageModeling`` with the same, in evaluation mode."""
    torch.manual_seed(0)
    network = ImageGPT(config)
    torch.nn.init.normal_(network.lm_head.weight, std=0.02)  # initially zero, which would agree with anything
    with TemporaryDirectory() as folder:
        save_pretrained(folder, network, Palette.load("openai"))
        theirs = transformers.ImageGPTForCausalImageModeling.from_pretrained(folder)
    return network.eval().to(device), theirs.eval().to(device)


def random_tokens(config: ImageGPTConfig, batch_size: int, device: str) -> Tensor:
    """Seeded int64 (B, T)."""
    generator, shape = torch.Generator().manual_seed(1), (batch_size, config.n_positions)
    return torch.randint(config.vocab_size, shape, generator=generator).to(device)


def pictures(count: int, height: int, width: int, seed: int) -> Tensor:
    """uint8 (count, 3, height, width): smooth colors and grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, height // 16 + 1, width // 16 + 1, generator=generator) * 255
    smooth = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    grain = torch.randn(smooth.shape, generator=generator) * 8
    return (smooth + grain).round().clamp(0, 255).to(torch.uint8)


def seconds_of(run: Callable[[], object], device: str = "cpu") -> float:
    """Wall-clock seconds of one call, including the device's work."""
    on_cuda = torch.device(device).type == "cuda"
    wait: Callable[[], object] = partial(torch.cuda.synchronize, device) if on_cuda else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def in_turns(
    sides: Mapping[str, Callable[[], object]], repeats: int, device: str = "cpu", *, warm_up: int = 1
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
    sides: dict[str, Callable[[], object]] = {"product": lambda: a @ b, "sum": source.sum}
    sides["copy"] = lambda: target.copy_(source)
    best = {name: min(turns.seconds) for name, turns in in_turns(sides, repeats, device).items()}
    size = source.numel() * source.element_size()
    return Limits(2 * side**3 / best["product"], max(2 * size / best["copy"], size / best["sum"]))


def require(agrees: bool, what: str) -> None:
    """RuntimeError where two sides do not compute the same."""
    if not agrees:
        raise RuntimeError(f"the results differ, so their speeds are not comparable: {what}")


def require_close(what: str, ours: Tensor, theirs: Tensor, bound: float) -> float:
    """The largest absolute difference, as a share of the largest absolute value of ``theirs``; at most ``bound``."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double().cpu()
    off = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))
    require(off <= bound, f"{what} differ by {off:.1e} of the largest, more than {bound:.0e}")
    return off


@dataclass(frozen=True)
class Comparison:
    """What one table shows."""

    rows: Mapping[str, Turns]
    ours: str  # the row that the last line compares
    peer: str  # the row to which all ratios refer
    least: Mapping[str, float]  # seconds that the limit allows, of the rows whose limit is known
    items: int  # of ``unit``, that a turn works on
    unit: str  # such as "tokens"

    def print_table(self, title: str) -> None:
        """Print median, spread, speed, ratio to the peer and fraction of the limit."""
        print(f"\n{title:<44}{'ms':>10}   {'fastest..slowest':<20}{self.unit + '/s':>12}{'x peer':>9}{'of limit':>10}")
        for name, turns in self.rows.items():
            spread = f"{min(turns.seconds) * 1e3:,.2f}..{max(turns.seconds) * 1e3:,.2f}"
            ratio = f"{turns.ratio_to(self.rows[self.peer]):,.2f}x"
            share = f"{self.least[name] / turns.median:.0%}" if name in self.least else ""
            speed = f"{self.items / turns.median:,.1f}"
            figures = f"{turns.median * 1e3:>10,.2f}   {spread:<20}{speed:>12}{ratio:>9}{share:>10}"
            print(f"  {name:<42}{figures}", flush=True)

    def print_result(self, options: argparse.Namespace, *libraries: Any, **rest: Any) -> None:
        """Print one JSON object; its limit is that of our row or, if unknown, of the first that has one."""
        ours, limited = self.rows[self.ours], self.ours if self.ours in self.least else next(iter(self.least))
        cpu = f"{platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
        on_cuda = torch.device(options.device).type == "cuda"
        versions = {library.__name__: library.__version__ for library in (torch, *libraries)}
        result = {
            "benchmark": options.benchmark,
            "ratio_vs_peer": ours.ratio_to(self.rows[self.peer]),
            "fraction_of_limit": self.least[limited] / self.rows[limited].median,
            **{name: value for name, value in vars(options).items() if name not in ("benchmark", "device")},
            **rest,
            "unit": self.unit,
            "sides": {name: row.figures(self.items) for name, row in self.rows.items()},
            "device": torch.cuda.get_device_name(options.device) if on_cuda else cpu,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "versions": {"python": platform.python_version(), **versions},
        }
        print(json.dumps(result))
