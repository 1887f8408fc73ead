"""Progress on one line of the terminal; elsewhere, a line per validation."""

import io
import logging
import sys
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from time import monotonic
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm  # type: ignore[import-untyped]
from tqdm.contrib import DummyTqdmFile  # type: ignore[import-untyped]

LABELS = {"train/nats_per_pixel": "loss", "train/cross_entropy": "loss", "val/nats_per_pixel": "val"}
EVERY = 0.5  # seconds between updates: the processor waits for the device to read a loss


class Progress(ProgressBar):
    """Show optimizer steps, speed, metrics that are logged with ``prog_bar=True``, and the time left.

    In a terminal this is one line, and messages are printed above it. Without a terminal, or in a notebook, a line is
    printed after each validation, or ten in a run without validation. Modules that optimize manually count batches.
    """

    _bar: Any = None
    _enabled, _done, _total = True, 0, 0  # done and to do, in steps or batches; 0 if the total is not known

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counts_batches = not pl_module.automatic_optimization
        if self._counts_batches:
            batches = trainer.num_training_batches * max(trainer.max_epochs or 1, 1)
            self._open("batch", trainer.fit_loop.total_batch_idx + 1, batches)
        else:
            self._open("step", trainer.global_step, trainer.estimated_stepping_batches)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        before, tenth = self._done, -(-(self._total or 10_000) // 10)
        self._done = trainer.fit_loop.total_batch_idx + 1 if self._counts_batches else trainer.global_step
        self._show(trainer, line=not trainer.enable_validation and self._done // tenth > before // tenth)

    def on_validation_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if trainer.state.fn != "fit":
            sizes = {"validate": trainer.num_val_batches, "test": trainer.num_test_batches}
            self._open("batch", 0, sum(sizes.get(str(trainer.state.fn), trainer.num_predict_batches)))

    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._done += trainer.state.fn != "fit"
        self._show(trainer)

    def on_validation_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._show(trainer, line=True)

    on_test_start = on_predict_start = on_validation_start
    on_test_batch_end = on_predict_batch_end = on_validation_batch_end
    on_test_end = on_predict_end = on_validation_end

    def _open(self, unit: str, done: int, total: float) -> None:
        """Start the line; until ``teardown``, what is printed appears above it."""
        if not self._enabled:
            return
        self._unit, self._done, self._total = unit, done, int(total) if 0 < total < float("inf") else 0
        self._last, self._is_terminal, self._redirected, err = monotonic(), sys.stderr.isatty(), ExitStack(), sys.stderr
        options: dict[str, Any] = {"bar_format": "{desc}", "dynamic_ncols": True, "mininterval": 0, "miniters": 1}
        options |= {"file": err if self._is_terminal else io.StringIO(), "smoothing": 0.1}
        self._bar = tqdm(initial=done, desc=f"{unit} {done}/{self._total or '?'}", **options)
        if self._is_terminal:
            for logger in map(logging.getLogger, ("", "lightning.pytorch", "lightning.fabric")):
                for handler in logger.handlers:
                    if isinstance(handler, logging.StreamHandler) and handler.stream is err:
                        handler.setStream(DummyTqdmFile(err))
                        self._redirected.callback(handler.setStream, err)
            self._redirected.enter_context(redirect_stdout(DummyTqdmFile(sys.stdout)))
            self._redirected.enter_context(redirect_stderr(DummyTqdmFile(err)))

    def _show(self, trainer: Trainer, *, line: bool = False) -> None:
        """Update the line in a terminal, at most twice a second; elsewhere print it if ``line``."""
        if self._bar is None or not (line or (self._is_terminal and monotonic() - self._last >= EVERY)):
            return
        self._last = monotonic()
        self._bar.update(self._done - self._bar.n)
        if self._is_terminal:
            self._bar.set_description_str(self._text(trainer))
        else:
            print(self._text(trainer), file=sys.stderr)  # noqa: T201

    def _text(self, trainer: Trainer) -> str:
        """The line, without the last metrics where it would not fit."""
        state = self._bar.format_dict
        new, elapsed = max(self._done - state["initial"], 1), max(state["elapsed"], 1e-9)
        rate = state["rate"] or new / elapsed
        parts = [f"{self._unit} {self._done}" + f"/{self._total}" * bool(self._total)]
        parts.append(f"{rate:.1f} it/s" if rate >= 1 else f"{1 / rate:.1f} s/it")
        left = tqdm.format_interval((self._total - self._done) * elapsed / new).removeprefix("0")
        end = [f"{left} left"] if self._done < self._total else []
        for name, value in trainer.progress_bar_metrics.items():
            part = f"{LABELS.get(name, name.replace('/', ' '))} {value:#.3g}"
            if "throughput/" not in name and len(" · ".join([*parts, part, *end])) < (state["ncols"] or 120):
                parts.append(part)
        return " · ".join(parts + end)

    def teardown(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Leave the line with the last values, and let messages go where they went before."""
        if self._bar is not None:
            if self._is_terminal:
                self._show(trainer, line=True)
            self._bar.close()
            self._redirected.close()
            self._bar = None

    on_exception = teardown
