"""The classes that a classifier confuses and its worst images, drawn when a test ends."""

from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_igpt.callbacks.run_folder import show, write_result
from lightning_igpt.files import counted, write_csv
from lightning_igpt.pictures import Theme, contact_sheet, draw_figure, enlarge, render

_READABLE = 100  # classes; beyond that a picture holds neither counts nor every name


class ClassificationReport(Callback):
    """Draw the confusions of a test and its worst images, in the run's folder and for loggers that take images.

    ``confusion.png`` and ``confusion.csv`` hold the counts, a row for each true class, of all test images and
    processes; ``worst.png`` holds the images with the highest loss in the palette's colors, captioned "true ->
    predicted (probability of predicted)". Idle for modules without ``tokens_of`` and ``palette``, and where
    ``test_step`` does not return a mapping with ``probabilities`` (B, C), ``label`` (B,) and perhaps ``prediction``.

    Args:
        n_worst: Images in ``worst.png``; 0 leaves it out.
    """

    def __init__(self, n_worst: int = 16) -> None:
        self.n_worst = n_worst
        self._counts: Tensor | None = None  # int64 (C, C)
        # Loss (N,) in nats, label, class predicted and its probability (N,), tokens (N, T).
        self._worst: list[Tensor] | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counts = self._worst = None

    def on_test_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        """Count, and keep the worst images; nothing here waits for the device."""
        is_classified = isinstance(outputs, Mapping) and {"probabilities", "label"} <= set(outputs)
        if not (is_classified and hasattr(pl_module, "tokens_of") and hasattr(pl_module, "palette")):
            return
        probabilities, label = outputs["probabilities"], outputs["label"]
        predicted, n_classes = outputs.get("prediction", probabilities.argmax(1)), probabilities.shape[1]
        if self._counts is None:
            self._counts = torch.zeros(n_classes, n_classes, dtype=torch.int64, device=label.device)
        self._counts.view(-1).index_add_(0, label * n_classes + predicted, torch.ones_like(label))
        rows = torch.arange(len(label), device=label.device)
        loss, confidence = -probabilities[rows, label].log(), probabilities[rows, predicted]
        cases = [loss, label, predicted, confidence, pl_module.tokens_of(batch)]
        self._worst = _hardest([cases] if self._worst is None else [self._worst, cases], self.n_worst)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the counts of all processes; the first one draws."""
        mine = None if self._worst is None else [column.cpu() for column in (self._counts, *self._worst)]  # type: ignore[union-attr]
        parts: list[Any] = [mine] * trainer.world_size
        if trainer.world_size > 1:  # objects, as a process without a batch knows no shapes
            torch.distributed.all_gather_object(parts, mine)
        parts = [part for part in parts if part]
        if not parts or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        counts = torch.stack([part[0] for part in parts]).sum(0)
        given = list(getattr(pl_module, "class_names", None) or [])[: len(counts)]
        names = given + [str(number) for number in range(len(given), len(counts))]
        table = [["true", *names], *([name, *row] for name, row in zip(names, counts.tolist(), strict=True))]
        write_result(trainer, "confusion.csv", lambda path: write_csv(path, table))
        show(trainer, "confusion.png", "test/confusion", draw_confusion(counts, names))
        if self.n_worst:
            worst = _hardest([part[1:] for part in parts], self.n_worst)
            show(trainer, "worst.png", "test/worst", _worst_grid(worst, names, pl_module.palette))


def draw_confusion(counts: Tensor, names: Sequence[str]) -> Tensor:
    """Draw counts int64 (C, C), a row for each true class, as uint8 (3, h, w), colored by their share of the class."""
    n, total = len(counts), int(counts.sum())
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)  # (C, C), 0..1
    side = min(12.0, max(3.0, 0.4 * n))  # inches
    font = min(9.0, 0.36 * 72 * side / n)  # points, of which a cell is 72 * side / n wide

    def draw(axes: Any, theme: Theme) -> None:
        axes.figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.1)  # without padding outer labels are cut
        image = axes.imshow(share.numpy(), vmin=0, vmax=1, cmap="Blues")
        axes.figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.04, aspect=30, shrink=0.9)
        axes.grid(visible=False)
        ticks = range(0, n, ceil(n / _READABLE))
        labels = [names[tick][:24] for tick in ticks]
        style: dict[str, Any] = {"fontsize": font, "parse_math": False}  # a dollar sign in a name starts no formula
        axes.set_xticks(ticks, labels, rotation=90 if max(map(len, labels)) > 3 else 0, **style)
        axes.set_yticks(ticks, labels, **style)
        axes.set(xlabel="predicted", ylabel="true")
        axes.set_title(f"accuracy {int(counts.trace()) / max(1, total):.3f} on {counted(total, 'image')}", fontsize=10)
        style = {"fontsize": font, "ha": "center", "va": "center", "in_layout": False}  # thousands would delay that
        for row, column in counts.nonzero().tolist() if n <= _READABLE else []:
            color = theme.paper if share[row, column] > 0.5 else theme.ink
            axes.text(column, row, str(int(counts[row, column])), color=color, **style)

    return render(draw_figure(draw, size=(side + 2, side + 1.5)))


def _hardest(parts: Sequence[list[Tensor]], n: int) -> list[Tensor]:
    """The n cases with the highest loss, the highest first."""
    joined = [torch.cat(columns) for columns in zip(*parts, strict=True)]
    order = joined[0].argsort(descending=True, stable=True)[:n]
    return [column[order] for column in joined]


def _worst_grid(cases: list[Tensor], names: Sequence[str], palette: Any) -> Tensor:
    """The images in a near-square grid, each below its caption: uint8 (3, h, w)."""
    *_, label, predicted, confidence, tokens = cases
    images = palette.dequantize(tokens)  # (N, 3, S, S)
    cells = enlarge(images, ceil(192 / images.shape[-1]))  # the least width in pixels that a caption needs
    rows = zip(label.tolist(), predicted.tolist(), confidence.tolist(), strict=True)
    captions = [[f"{names[true]} -> {names[predicted]} ({p:.2f})"] for true, predicted, p in rows]
    return contact_sheet(cells, captions, columns=ceil(sqrt(len(images))))
