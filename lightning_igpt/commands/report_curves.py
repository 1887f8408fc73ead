"""The numbers in a run's folder, from TensorBoard events and CSV files, with a word on every file that is damaged.

Not here: what made them (``report_runs.py``).
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from tensorboard.backend.event_processing.event_file_loader import (  # type: ignore[import-untyped]
    LegacyEventFileLoader,
)

from lightning_igpt import report

Curve: TypeAlias = list[tuple[int, float]]  # (step, value), steps ascending

EVENTS = "events.out.tfevents*"
_MEASURED = "nats_per_pixel|bits_per_pixel|accuracy|concat_accuracy|cross_entropy"
_OURS = re.compile(rf"(train|val|test|probe|online_probe)/(layer_\d+/)?({_MEASURED})")


def read_events(path: Path) -> tuple[dict[str, Curve], int, bool]:
    """The scalars of a TensorBoard file.

    Returns:
        (step, value) pairs by tag; the number of records read; whether something behind them cannot be read.
        TensorBoard's own EventAccumulator stops at damage without a word, hence the count.
    """
    curves: dict[str, Curve] = {}
    n_read = 0
    for event in LegacyEventFileLoader(str(path)).Load():
        n_read += 1
        for value in event.summary.value:
            if value.HasField("simple_value"):
                curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    return curves, n_read, n_read != _count_records(path)


def _count_records(path: Path) -> int:
    """How many records a whole TensorBoard file of this size has; -1 if the size fits no number of them."""
    size, position, count = path.stat().st_size, 0, 0
    with path.open("rb") as file:
        while position < size:
            file.seek(position)
            position += int.from_bytes(file.read(8), "little") + 16  # length, its checksum, the record, its checksum
            count += 1
    return count if position == size else -1


def read_curves(folder: Path, warnings: list[str]) -> dict[str, Curve]:
    """This package's metrics by name, from the events, and from metrics.csv where these are damaged or hold none.

    Args:
        folder: The run's folder.
        warnings: Gets a line for every file that is damaged.
    """
    merged: dict[str, dict[int, float]] = {}
    is_whole = True
    for path in sorted(folder.glob(EVENTS)):
        try:
            curves, n_read, damaged = read_events(path)
        except OSError as error:
            warnings.append(f"{path} cannot be read and was skipped: {error}")
            is_whole = False
            continue
        is_whole &= not damaged
        if damaged:
            kept = f"its first {n_read} records were read" if n_read else "it was skipped"
            warnings.append(f"{path} is damaged, or was cut off with its process: {kept}")
        for tag, curve in curves.items():
            if _OURS.fullmatch(tag):
                merged.setdefault(tag, {}).update(curve)
    table = folder / "metrics.csv"
    if table.exists() and not (merged and is_whole):
        for tag, values in _read_table(table, warnings).items():
            merged.setdefault(tag, {}).update(values)
    return {tag: sorted(curve.items()) for tag, curve in sorted(merged.items())}


def _read_table(table: Path, warnings: list[str]) -> dict[str, dict[int, float]]:
    try:
        with table.open(newline="") as file:
            names = [name for name in next(csv.reader(file), []) if _OURS.fullmatch(name)]
        return {name: dict(zip(*report.read_curve(table, name), strict=True)) for name in names}
    except (KeyError, ValueError, csv.Error) as error:
        warnings.append(f"{table} is damaged and was skipped: {error!r}")
        return {}


def read_layers(folder: Path, curves: Mapping[str, Curve], warnings: list[str]) -> dict[str, dict[int, float]]:
    """Accuracy by layer, by part of the data: from probe_by_layer.csv, or else from the metrics of each layer.

    Args:
        folder: The run's folder.
        curves: From read_curves.
        warnings: Gets a line if the table is damaged.
    """
    found: dict[str, dict[int, float]] = {"validation": {}, "test": {}}
    table = folder / "probe_by_layer.csv"
    try:
        for row in _rows(table) if table.exists() else ():
            for part, column in (("validation", "val_accuracy"), ("test", "test_accuracy")):
                if row["layer"].isdecimal() and row.get(column):  # layers fitted together are no point of a curve
                    found[part][int(row["layer"])] = float(row[column])
    except (KeyError, ValueError, csv.Error) as error:
        warnings.append(f"{table} is damaged and was skipped: {error!r}")
    if not any(found.values()):
        for part, prefix in (("validation", "probe"), ("test", "test")):
            for tag, curve in curves.items():
                if match := re.fullmatch(rf"{prefix}/layer_(\d+)/accuracy", tag):
                    found[part][int(match[1])] = curve[-1][1]
    return {part: dict(sorted(accuracy.items())) for part, accuracy in found.items() if accuracy}


def _rows(table: Path) -> Iterator[dict[str, str]]:
    with table.open(newline="") as file:
        yield from csv.DictReader(file)
