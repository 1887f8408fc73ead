"""What a classifier confuses, and the images it is most wrong about, drawn when a test ends.

Not here: the metrics, which the modules log themselves.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from math import ceil, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor

from lightning_igpt.pictures import image_grid, save_png

_READABLE = 100  # classes; beyond that a picture holds neither counts nor every name
_CELL = 192  # least width in pixels of a worst image, for its caption


class _Cases(NamedTuple):
    """Test images with what was said of them."""

    loss: Tensor  # float32 (N,), in nats
    label: Tensor  # int64 (N,)
    said: Tensor  # int64 (N,)
    confidence: Tensor  # float32 (N,), the probability of the class said
    tokens: Tensor  # int64 (N, T)


class ClassificationReport(Callback):
    """Draw what a test found, in the trainer's log folder and in TensorBoard.

    ``confusion.png`` and ``confusion.csv`` hold the counts, a row for each true class, of all test images and
    processes; ``worst.png`` holds the images with the highest loss, captioned "true -> said (probability of said)" and
    coloured with the palette, as the network sees them. Does nothing beside a module without ``tokens_of`` and
    ``palette``, or whose ``test_step`` does not return a mapping with ``probabilities`` (B, C) and ``label`` (B,). What
    it said is ``prediction`` (B,) if that is there too, else the likeliest class.

    Args:
        n_worst: Images in ``worst.png``; 0 leaves it out.

    Raises:
        ValueError: ``n_worst`` is below 0.
    """

    def __init__(self, n_worst: int = 16) -> None:
        if n_worst < 0:
            raise ValueError(f"n_worst is {n_worst}; it must be 0 or more")
        self.n_worst = n_worst
        self._counts: Tensor | None = None  # int64 (C, C)
        self._worst: _Cases | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier test."""
        self._counts = self._worst = None

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count, and keep the worst so far; nothing here waits for the device."""
        if not (isinstance(outputs, Mapping) and {"probabilities", "label"} <= set(outputs)):
            return
        if not (hasattr(pl_module, "tokens_of") and hasattr(pl_module, "palette")):
            return
        probabilities, label = outputs["probabilities"], outputs["label"]
        said = outputs.get("prediction", probabilities.argmax(1))
        self._counts = _counted(self._counts, label, said, probabilities.shape[1])
        if self.n_worst:
            rows = torch.arange(len(label), device=label.device)
            loss, tokens = -probabilities[rows, label].log(), pl_module.tokens_of(batch)  # type: ignore[operator]
            cases = _Cases(loss, label, said, probabilities[rows, said], tokens)
            self._worst = _hardest([cases] if self._worst is None else [self._worst, cases], self.n_worst)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather what the processes counted; the first one draws."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks every process, as does the next line
        found = [part for part in _gathered(trainer, self._on_cpu()) if part is not None]
        self._counts = self._worst = None
        if not found or not trainer.is_global_zero:
            return
        counts = torch.stack([counts for counts, _ in found]).sum(0)
        worst = [cases for _, cases in found if cases is not None]
        given = list(getattr(pl_module, "class_names", None) or [])[: len(counts)]
        names = given + [str(number) for number in range(len(given), len(counts))]
        folder.mkdir(parents=True, exist_ok=True)
        write_confusion(counts, names, folder / "confusion.csv")
        pictures = {"confusion": draw_confusion(counts, names)}
        if worst:
            pictures["worst"] = _worst_grid(_hardest(worst, self.n_worst), names, pl_module.palette)
        for name, picture in pictures.items():
            save_png(picture, folder / f"{name}.png")
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    logger.experiment.add_image(f"test/{name}", picture, trainer.global_step)

    def _on_cpu(self) -> tuple[Tensor, _Cases | None] | None:
        """What this process found, or None if it saw no classified batch."""
        if self._counts is None:
            return None
        return self._counts.cpu(), None if self._worst is None else _Cases(*(part.cpu() for part in self._worst))


def write_confusion(counts: Tensor, names: Sequence[str], path: Path) -> None:
    """Write a confusion matrix as CSV.

    Args:
        counts: int64 (C, C), a row for each true class, a column for each class said.
        names: C class names.
        path: The file to write.
    """
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true", *names])
        writer.writerows([name, *row] for name, row in zip(names, counts.tolist(), strict=True))


def draw_confusion(counts: Tensor, names: Sequence[str]) -> Tensor:
    """Draw a confusion matrix: counts in the cells, coloured by their share of the true class.

    Args:
        counts: int64 (C, C), a row for each true class, a column for each class said.
        names: C class names.

    Returns:
        uint8 (3, h, w).
    """
    n, total = len(counts), int(counts.sum())
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)  # (C, C), 0..1
    side = min(24.0, max(3.5, 0.4 * n))  # inches
    font = min(9.0, 0.36 * 72 * side / n)  # points, of which a cell is 72 * side / n wide
    figure = matplotlib.figure.Figure(figsize=(side + 2, side + 1.5), dpi=100)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.1)  # without padding the outer labels are cut
    axes = figure.subplots()
    image = axes.imshow(share.numpy(), vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, label="share of the true class", fraction=0.04, aspect=30, shrink=0.9)
    ticks = range(0, n, ceil(n / _READABLE))
    labels = [_shortened(names[tick], 24) for tick in ticks]
    style: dict[str, Any] = {"fontsize": font, "parse_math": False}  # a dollar sign in a name starts no formula
    axes.set_xticks(ticks, labels, rotation=90 if max(map(len, labels)) > 3 else 0, **style)
    axes.set_yticks(ticks, labels, **style)
    axes.set(xlabel="said", ylabel="true")
    axes.set_title(f"accuracy {int(counts.trace()) / max(1, total):.3f} on {total:,} images", fontsize=10)
    figure.draw_without_rendering()  # lays out, going through all there is to draw: so before thousands of counts
    figure.set_layout_engine("none")
    for row, column in counts.nonzero().tolist() if n <= _READABLE else []:
        color = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, str(int(counts[row, column])), fontsize=font, color=color, ha="center", va="center")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.array(canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _counted(counts: Tensor | None, label: Tensor, said: Tensor, n_classes: int) -> Tensor:
    if counts is None:
        counts = torch.zeros(n_classes, n_classes, dtype=torch.int64, device=label.device)
    counts.view(-1).index_add_(0, label * n_classes + said, torch.ones_like(label))
    return counts


def _hardest(parts: Sequence[_Cases], n: int) -> _Cases:
    """The n cases with the highest loss, the highest first."""
    joined = _Cases(*(torch.cat(columns) for columns in zip(*parts, strict=True)))
    order = joined.loss.argsort(descending=True, stable=True)[:n]
    return _Cases(*(column[order] for column in joined))


def _gathered(trainer: Trainer, mine: Any) -> list[Any]:
    """What every process found. Objects, because one without a batch knows no shapes."""
    if trainer.world_size == 1 or not torch.distributed.is_initialized():
        return [mine]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _worst_grid(cases: _Cases, names: Sequence[str], palette: Any) -> Tensor:
    """The images in a near-square grid, each under its caption: uint8 (3, h, w)."""
    images = palette.dequantize(cases.tokens)  # (N, 3, S, S)
    triples = zip(cases.label.tolist(), cases.said.tolist(), cases.confidence.tolist(), strict=True)
    captions = [
        f"{_shortened(names[true], 11)} -> {_shortened(names[said], 11)} ({p:.2f})" for true, said, p in triples
    ]
    columns = ceil(sqrt(len(images)))
    missing = -len(images) % columns
    images = torch.cat([images, images.new_full((missing, *images.shape[1:]), 255)])
    captions += [""] * missing
    scale = ceil(_CELL / images.shape[-1])
    rows = [
        image_grid([images[start : start + columns]], scale=scale, captions=captions[start : start + columns])
        for start in range(0, len(images), columns)
    ]
    return torch.cat(rows, 1)


def _shortened(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
