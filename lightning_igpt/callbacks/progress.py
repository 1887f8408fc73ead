"""Progress on one line of the terminal; elsewhere, a line per validation."""

import io
import logging
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from time import monotonic
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

LABELS = {"train/nats_per_pixel": "loss", "train/cross_entropy": "loss", "val/nats_per_pixel": "val"}
EVERY = 0.5  # seconds between updates: the processor waits for the device to read a loss


class Progress(ProgressBar):
    """Show optimizer steps, speed, metrics that are logged with ``prog_bar=True``, and the time left.

    In a terminal this is one line, and messages are printed above it. Without a terminal, or in a notebook, a line is
    printed after each validation, or ten in a run without validation. Modules that optimize manually count batches.
    """

    _bar: Any = None

    def __init__(self) -> None:
        super().__init__()
        self._enabled, self._redirected = True, ExitStack()

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._manual = not pl_module.automatic_optimization
        batches = trainer.num_training_batches * max(trainer.max_epochs or 1, 1)
        total = batches if self._manual else trainer.estimated_stepping_batches
        self._open("batch" if self._manual else "step", self._count(trainer), total)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        before, self._done = self._done, self._count(trainer)
        tenth = -(-(self._total or 10_000) // 10)
        self._show(trainer, line=not trainer.enable_validation and self._done // tenth > before // tenth)

    def on_validation_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.state.fn != "fit":
            sizes = {"validate": trainer.num_val_batches, "test": trainer.num_test_batches}
            self._open("batch", 0, sum(sizes.get(str(trainer.state.fn), trainer.num_predict_batches)))

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._done += trainer.state.fn != "fit"
            self._show(trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self._show(trainer, line=True)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end

    def teardown(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Leave the line as it is, and let messages go where they went before."""
        if self._bar is not None:
            self._last = 0.0
            self._show(trainer)
            self._bar.close()
        self._bar = None
        self._redirected.close()

    on_exception = teardown

    def _count(self, trainer: Trainer) -> int:
        return trainer.fit_loop.total_batch_idx + 1 if self._manual else trainer.global_step

    def _open(self, unit: str, done: int, total: float) -> None:
        """Start a line; what is printed until ``teardown`` appears above it."""
        self._unit, self._done, self._total = unit, done, int(total) if 0 < total < float("inf") else None
        self._last, self._is_terminal, err = monotonic(), sys.stderr.isatty(), sys.stderr
        if not self._enabled:
            return
        out = err if self._is_terminal else io.StringIO()
        first = f"{unit} {done:,}" + (f"/{self._total:,}" if self._total else "")
        options: dict[str, Any] = {
            "bar_format": "{desc}",
            "dynamic_ncols": True,
            "mininterval": 0,
            "miniters": 1,
            "smoothing": 0.1,
        }
        self._bar = tqdm(initial=done, total=self._total, file=out, desc=first, **options)
        if self._is_terminal:
            for logger in map(logging.getLogger, ("", "lightning.pytorch", "lightning.fabric")):
                for handler in logger.handlers:
                    if isinstance(handler, logging.StreamHandler) and handler.stream is err:
                        handler.setStream(DummyTqdmFile(err))
                        self._redirected.callback(handler.setStream, err)
            self._redirected.enter_context(redirect_stdout(DummyTqdmFile(sys.stdout)))
            self._redirected.enter_context(redirect_stderr(DummyTqdmFile(err)))

    def _show(self, trainer: Trainer, *, line: bool = False) -> None:
        """Update the line in a terminal, at most twice a second; print a ``line`` elsewhere."""
        if self._bar is None or not (line or (self._is_terminal and monotonic() - self._last >= EVERY)):
            return
        self._last = monotonic()
        self._bar.update(self._done - self._bar.n)
        text = self._text(trainer)
        if self._is_terminal:
            self._bar.set_description_str(text)
        else:
            print(text, file=sys.stderr)  # noqa: T201

    def _text(self, trainer: Trainer) -> str:
        """The line, without the last metrics where it would not fit."""
        state = self._bar.format_dict
        rate = state["rate"] or max(self._done - state["initial"], 1) / max(state["elapsed"], 1e-9)
        of = f"/{self._total}" if self._total else ""
        start = [f"{self._unit} {self._done}{of}", f"{rate:.1f} it/s" if rate >= 1 else f"{1 / rate:.1f} s/it"]
        left = ((self._total or 0) - self._done) * state["elapsed"] / max(self._done - state["initial"], 1)
        end = [f"{tqdm.format_interval(left).removeprefix('0')} left"] if left > 0 else []
        shown: dict[str, Any] = {
            name: value for name, value in trainer.progress_bar_metrics.items() if "throughput/" not in name
        }
        metrics = [f"{LABELS.get(name, name.replace('/', ' '))} {value:#.3g}" for name, value in shown.items()]
        while metrics and len(" · ".join([*start, *metrics, *end])) >= (state["ncols"] or 120):
            metrics.pop()
        return " · ".join([*start, *metrics, *end])
