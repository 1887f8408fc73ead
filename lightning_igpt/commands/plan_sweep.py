"""What size and resolution cost, as a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_igpt.commands.plan_facts import Plan
from lightning_igpt.commands.plan_text import rounded
from lightning_igpt.config import PRESETS
from lightning_igpt.planning import parameter_count, training_bytes, usual_mfu

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZES = {"S": PRESETS["igpt_s"], "M": PRESETS["igpt_m"], "L": PRESETS["igpt_l"], "XL": PRESETS["igpt_xl"]}
STYLES = {32: ("#0b6bcb", "o"), 48: ("#c65102", "s"), 64: ("#1f2933", "^")}  # told apart by lightness too
GREY = "#8a929c"
GIB = 2**30


def draw_sweep(plan: Plan, path: Path, *, mfu: float | None) -> None:
    """Draw time and memory of the paper's four sizes at its three resolutions, on the devices of a plan.

    Args:
        plan: Its schedule, devices and layout are kept; network and resolution vary.
        path: The PNG to write.
        mfu: Share of the device's peak; None takes each size's usual one.

    Raises:
        ValueError: The name does not end in ``.png``, in any case.
    """
    if path.suffix.lower() != ".png":
        raise ValueError(f"sweep is {str(path)!r}; the plot is a PNG file, so name it something.png")
    from matplotlib.figure import Figure  # a plan without a plot answers sooner

    figure = Figure(figsize=(10.5, 4.8), dpi=150, layout="constrained")
    time, memory = figure.subplots(1, 2)
    _draw_time(time, plan, mfu)
    _draw_memory(memory, plan)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def _draw_time(axes: Axes, plan: Plan, mfu: float | None) -> None:
    schedule, used = plan.run.schedule, sorted({mfu or usual_mfu(config) for config in SIZES.values()})
    for side, (color, marker) in STYLES.items():
        runs = [
            replace(plan.run, config=replace(config, image_size=side), mfu=mfu or usual_mfu(config))
            for config in SIZES.values()
        ]
        hours = [run.seconds * run.devices / 3600 for run in runs]
        axes.plot(_places(), hours, color=color, marker=marker, label=f"{side} x {side} pixels")
        if side in (min(STYLES), max(STYLES)):
            _label(axes, hours, [rounded(value) for value in hours], above=side == max(STYLES), color=color)
    share = " to ".join(f"{value:.0%}" for value in (used[0], used[-1])) if len(used) > 1 else f"{used[0]:.0%}"
    axes.set_title(f"Time at {share} MFU\n{schedule.batch_size:,} images x {schedule.steps:,} steps", fontsize=10)
    axes.set_ylabel(f"device-hours, {plan.run.device.name}")
    _finish(axes)


def _draw_memory(axes: Axes, plan: Plan) -> None:
    run = plan.run
    layouts = {"one device": False} if run.devices == 1 else {"DDP": False, f"FSDP over {run.devices}": True}
    for side, (color, marker) in STYLES.items():
        for (layout, sharded), line in zip(layouts.items(), ("-", "--"), strict=False):
            gib = [
                sum(
                    training_bytes(
                        replace(config, image_size=side),
                        plan.micro_batch,
                        run.precision,
                        devices=run.devices,
                        sharded=sharded,
                        recompute=plan.recompute,
                        compiled=plan.compiled,
                    ).values()
                )
                / GIB
                for config in SIZES.values()
            ]
            axes.plot(_places(), gib, line, color=color, marker=marker, label=f"{side} x {side}, {layout}")
    usable = run.device.usable / GIB
    axes.axhline(usable, color=GREY, linewidth=1.2)
    axes.text(_places()[0], usable * 1.06, f"usable: {usable:.0f} GiB", color="#5b6570", fontsize=8)
    blocks = "compiled" if plan.compiled else "eager"
    images = "1 image" if plan.micro_batch == 1 else f"{plan.micro_batch:,} images"
    axes.set_title(f"Memory with {images} at once\n{run.precision}, {blocks}, recompute {plan.recompute}", fontsize=10)
    axes.set_ylabel("GiB per device")
    _finish(axes)


def _places() -> list[int]:
    return [parameter_count(config) for config in SIZES.values()]


def _label(axes: Axes, heights: list[float], texts: list[str], *, above: bool, color: str) -> None:
    for place, height, text in zip(_places(), heights, texts, strict=True):
        shift, ha, va = ((-4, 6), "right", "bottom") if above else ((4, -6), "left", "top")  # clear of rising lines
        axes.annotate(text, (place, height), shift, textcoords="offset points", ha=ha, va=va, fontsize=8, color=color)


def _finish(axes: Axes) -> None:
    axes.set(xscale="log", yscale="log", xlabel="parameters")
    names = [f"{name}\n{_millions(parameter_count(config))}" for name, config in SIZES.items()]
    axes.set_xticks(_places(), names)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.margins(x=0.12, y=0.12)
    axes.grid(color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, handlelength=3.2, loc="upper left" if len(axes.lines) < 5 else "lower right")


def _millions(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.0f} M"
