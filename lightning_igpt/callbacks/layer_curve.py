"""The result of a linear probe: accuracy against layer, as table, CSV file and picture (paper, figure 2)."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_igpt.callbacks.run_folder import show, write_result
from lightning_igpt.files import write_csv
from lightning_igpt.modules import ProbeModule
from lightning_igpt.pictures import Theme, draw_figure, render

COLUMNS = ("layer", "c", "val_accuracy", "test_accuracy")

Row = Mapping[str, Any]  # layer is an int, or a name such as "8-12" for layers that are probed together


class LayerCurve(Callback):
    """After validation and test of a probe, show the accuracy of each layer.

    Prints a table, writes ``probe_by_layer.csv`` and ``probe_by_layer.png`` into the run's folder, and passes the
    picture to loggers that take images. Idle for other modules than a ``ProbeModule``.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = pl_module.results if isinstance(pl_module, ProbeModule) and trainer.is_global_zero else []
        if trainer.sanity_checking or all(_accuracy(row) is None for row in _single(rows)):
            return
        rank_zero_info(f"accuracy by layer\n{table_text(rows)}")
        table = [COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]  # empty cells are unknown
        write_result(trainer, "probe_by_layer.csv", lambda path: write_csv(path, table))
        show(trainer, "probe_by_layer.png", "probe_by_layer", render(layer_figure(rows)))

    on_test_end = on_validation_end


def best_row(rows: Sequence[Row]) -> tuple[Row, str]:
    """The best single layer and the column that it is chosen by: validation if it is known, else test."""
    single = _single(rows)
    column = next(name for name in COLUMNS[2:] if any(row[name] is not None for row in single))
    return max((row for row in single if row[column] is not None), key=lambda row: row[column]), column


def table_text(rows: Sequence[Row]) -> str:
    """The rows as aligned text, without empty columns; the best layer is marked."""
    columns = [name for name in COLUMNS if any(row[name] is not None for row in rows)]
    best, _ = best_row(rows)
    lines = [[name.removesuffix("_accuracy") for name in columns]]
    for row in rows:
        cells = ["" if row[name] is None else row[name] for name in columns]
        lines.append([f"{cell:.4g}" if isinstance(cell, float) else cell for cell in cells] + ["best"] * (row is best))
    return "\n".join("".join(f"{cell:>9}" for cell in line) for line in lines)


def layer_figure(rows: Sequence[Row]) -> Any:
    """A matplotlib figure of accuracy against layer, on validation and test as far as known, the best layer ringed."""
    single, (best, chosen_by) = _single(rows), best_row(rows)

    def draw(axes: Any, theme: Theme) -> None:
        looks = {"val_accuracy": ("validation", theme.second, "s"), "test_accuracy": ("test", theme.first, "o")}
        for column, (label, color, marker) in looks.items():
            points = sorted((row["layer"], row[column]) for row in single if row[column] is not None)
            if points:
                axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, markersize=3.5)
        label = f"best on {looks[chosen_by][0]}: layer {best['layer']} ({best[chosen_by]:.3f})"
        ring: dict[str, Any] = {"markersize": 10, "markerfacecolor": "none", "color": theme.level}
        axes.plot(best["layer"], best[chosen_by], "o", label=label, **ring)
        for row in rows:
            level = None if row in single else _accuracy(row)
            if level is not None:
                part = "validation" if row["test_accuracy"] is None else "test"
                label = f"layers {row['layer']} together on {part} ({level:.3f})"
                axes.axhline(level, color=theme.level, linestyle="--", linewidth=1.2, label=label)
        layers = sorted(row["layer"] for row in single)
        axes.set(xlabel="layer (0: embeddings)", ylabel="accuracy", xticks=layers[:: max(1, len(layers) // 12)])

    return draw_figure(draw)


def _single(rows: Sequence[Row]) -> list[Row]:
    """The rows of one layer each."""
    return [row for row in rows if isinstance(row["layer"], int)]


def _accuracy(row: Row) -> float | None:
    """On test if known, else on validation."""
    return row["val_accuracy"] if row["test_accuracy"] is None else row["test_accuracy"]  # type: ignore[no-any-return]
