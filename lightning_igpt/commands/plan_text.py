"""The figures of a plan as a table for people."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

GIB = 2**30
WIDTH, MARGIN = 100, 26  # characters of a line, and those before the figures
TITLES = {"single": "one device", "ddp": "DDP", "fsdp": "FSDP"}
PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "Adam's moments",
    "copies": "copies to multiply with",
    "activations": "activations",
    "logits": "logits",
}


def lines(facts: Mapping[str, Any]) -> list[str]:
    """The table.

    Args:
        facts: As ``plan_facts.facts`` gives them.
    """
    return [
        *_costs(facts),
        "",
        *_memory(facts),
        "",
        *_largest(facts["largest_micro_batch"]),
        "",
        *_strategy(facts["strategy"]),
        "",
        *_time(facts),
        "",
        *_around(facts),
    ]


def _row(name: str, *cells: str) -> str:
    return f"{name:<{MARGIN}}{'  '.join(cells)}"


def _costs(facts: Mapping[str, Any]) -> list[str]:
    network, run, device = facts["network"], facts["run"], facts["device"]
    side = network["image_size"]
    shape = f"{network['n_layer']} layers, width {network['n_embd']}, {network['n_head']} heads"
    parts = "" if run["accumulate_grad_batches"] == 1 else f" x {run['accumulate_grad_batches']} batches"
    return [
        _row("network", f"{network['preset'] or 'given by its fields'}, {network['objective']}: {shape}"),
        _row("image", f"{side} x {side} = {network['tokens_per_image']:,} tokens"),
        _row("parameters", f"{network['parameters']:,}"),
        _row(
            "training", f"{network['train_flops_per_token']:.3e} FLOPs per token, {run['flops_per_step']:.3e} per step"
        ),
        _row(
            "run",
            f"{_several(run['batch_size'], 'image')} x {_several(run['steps'], 'step')}: {run['tokens']:.3e} tokens",
        ),
        _row("", f"{run['flops']:.3e} FLOPs"),
        _row("devices", f"{run['devices']} x {device['name']}, {device['usable_bytes'] / GIB:.1f} GiB usable"),
        _row("", f"{run['precision']}, peak {device['peak_flops'] / 1e12:,.4g} TFLOP/s"),
        _row("", f"{_several(run['micro_batch_size'], 'image')}{parts} per device and step"),
    ]


def _memory(facts: Mapping[str, Any]) -> list[str]:
    memory, run = facts["memory"], facts["run"]
    blocks = "compiled" if run["compiled"] else "eager"
    how = f"recompute {run['recompute']}, {blocks}"
    rows = [_row("memory per device", *(f"{TITLES[kind]:>11}" for kind in memory), f"  ({how})")]
    for part, title in {**PARTS, "total": "together"}.items():
        rows.append(_row(f"  {title}", *(f"{parts[part] / GIB:>7.2f} GiB" for parts in memory.values())))
    return rows


def _largest(largest: Mapping[str, Any]) -> list[str]:
    head = [f"{TITLES[kind]:>11}, eager / compiled" for kind in largest]
    rows = [_row("largest micro-batch", *head)]
    for recompute in next(iter(largest.values())):
        cells = [f"{sizes[recompute]['eager']:>18,} / {sizes[recompute]['compiled']:<8,}" for sizes in largest.values()]
        rows.append(_row(f"  recompute {recompute}", *cells).rstrip())
    return rows


def _strategy(strategy: Mapping[str, Any]) -> list[str]:
    return [_row("strategy", _layout(strategy)), *_wrapped(strategy["reason"])]


def _wrapped(text: str) -> list[str]:
    return [_row("", line) for line in textwrap.wrap(text, WIDTH - MARGIN)]


def _layout(choice: Mapping[str, Any]) -> str:
    layout = f"{TITLES[choice['strategy']]}, recompute {choice['recompute']}"
    return layout if choice["fits"] else f"none fits; {layout} takes least"


def _time(facts: Mapping[str, Any]) -> list[str]:
    run = facts["run"]
    rows = {
        f"time at {run['mfu']:.0%} MFU": ("seconds", "device_seconds"),
        "floor": ("floor_seconds", "floor_device_seconds"),
    }
    return [
        *(
            _row(name, f"{hours(run[whole])}; {rounded(run[added] / 3600)} device-hours")
            for name, (whole, added) in rows.items()
        ),
        _row("MFU at best", f"{run['ceiling_mfu']:.0%}, as moving activations takes time too"),
    ]


def _around(facts: Mapping[str, Any]) -> list[str]:
    data, files, inference = facts["data"], facts["files"], facts["inference"]
    return [
        _row("data needed", f"{rounded(data['images_per_second'])} images/s"),
        _row("checkpoint", f"{_size(files['checkpoint_bytes'])}; weights alone {_size(files['weights_bytes'])}"),
        _row("features, floor", f"{rounded(inference['forward_images_per_second'])} images/s on one device"),
        *(_sampling(inference, facts["run"]["precision"]) if inference["sampling"] else []),
    ]


def _sampling(inference: Mapping[str, Any], precision: str) -> list[str]:
    texts = [
        f"batch of {size}: {hours(one['seconds_per_batch'])}, {rounded(one['images_per_second'])} images/s"
        for size, one in inference["sampling"].items()
    ]
    kind = {"32": "float32", "16": "float16"}.get(precision.split("-")[0], "bfloat16")
    return [
        *(_row(name, text) for name, text in zip(("sampling, floor", "", ""), texts, strict=True)),
        _row("  keys and values", f"{_size(inference['cache_bytes_per_image'])} per image in {kind}"),
    ]


def _several(count: int, thing: str) -> str:
    return f"{count:,} {thing}" + ("" if count == 1 else "s")


def hours(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, length, least in (
        ("years", 365.25 * 86400, 2),
        ("days", 86400, 3),
        ("hours", 3600, 1),
        ("minutes", 60, 1),
    ):
        if seconds >= least * length:
            return f"{rounded(seconds / length)} {unit}"
    return f"{seconds:.3g} s"


def rounded(value: float) -> str:
    """Three figures, without exponents where a number is large."""
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.3g}"


def _size(count: int) -> str:
    unit, factor = next((pair for pair in (("GB", 1e9), ("MB", 1e6)) if count >= pair[1]), ("kB", 1e3))
    return f"{count / factor:.3g} {unit}"
