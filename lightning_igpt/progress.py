"""A line on the terminal while something takes long: on stderr, after a second, and gone when the work is done.

Nothing is shown where stderr is no terminal, and in processes beside the first. Works inside others share one display.
Not here: the bars of training and evaluation, which are Lightning's.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

Item = TypeVar("Item")
DELAY = 1.0  # seconds; shorter works leave no trace
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID")  # where launchers tell a process its number


def is_shown() -> bool:
    """Whether somebody looks: stderr is a terminal, and this is the first process."""
    first = all(os.environ.get(name, "0") == "0" for name in RANKS)
    return first and sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


@contextmanager
def working(what: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
    """Show that something is under way; gives a function that is told how much more of it is done.

    Args:
        what: The work in a few words, such as ``colour table``.
        total: How much there is; None shows only for how long it has been going on.
    """
    if not is_shown():
        yield lambda amount: None
        return
    line = _Line(what, total)
    line.timer.start()
    try:
        yield line.advance
    finally:
        line.close()


def track(items: Iterable[Item], what: str, total: float | None = None) -> Iterator[Item]:
    """Give the items one by one, and show how many of them are done.

    Args:
        items: Any iterable.
        what: The work in a few words.
        total: How many there are; default their length where they have one.
    """
    size = getattr(items, "__len__", None)
    with working(what, size() if total is None and size is not None else total) as advance:
        for item in items:
            yield item
            advance(1)


class _Display:
    """What a terminal has room for once: the lines of all works under way."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.shown: Progress | None = None
        self.lines = 0

    def add(self, what: str, total: float | None, **fields: Any) -> Any:
        with self.lock:
            if self.shown is None:
                self.shown = _progress()
                if self.shown is None:
                    return None
                self.shown.start()
            self.lines += 1
            return self.shown.add_task(what, total=total, **fields)

    def update(self, task: Any, done: float, **fields: Any) -> None:
        with self.lock:
            if self.shown is not None:
                self.shown.update(task, completed=done, **fields)

    def remove(self, task: Any) -> None:
        with self.lock:
            self.lines -= 1
            if self.shown is not None:
                self.shown.remove_task(task)
                if not self.lines:
                    self.shown.stop()
                    self.shown = None


_display = _Display()


class _Line:
    """One work. A timer draws its line, so that a single long call is seen too."""

    def __init__(self, what: str, total: float | None) -> None:
        self.what, self.total, self.done = what, total, 0.0
        self.started, self.closed, self.task = time.monotonic(), False, None
        self.timer = threading.Timer(DELAY, self._appear)
        self.timer.daemon = True

    def advance(self, amount: float) -> None:
        """Count ``amount`` more."""
        self.done += amount
        if self.task is not None:
            _display.update(self.task, self.done, **self._words())

    def close(self) -> None:
        """Take the line away."""
        self.timer.cancel()
        with _display.lock:
            self.closed = True
            if self.task is not None:
                _display.remove(self.task)

    def _appear(self) -> None:
        with _display.lock:
            if not self.closed:
                self.task = _display.add(self.what, self.total, **self._words())
                if self.task is not None:
                    _display.update(self.task, self.done)

    def _words(self) -> dict[str, Any]:
        if self.total is None:
            return {"count": "", "left": ""}
        count = f"{self.done:,.0f} of {self.total:,.0f}"
        if not 0 < self.done < self.total:
            return {"count": count, "left": ""}
        left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        return {"count": count, "left": f"{left // 60:.0f}:{left % 60:02.0f} left"}


def _progress() -> Progress | None:
    """A display, below Rich's bar where Lightning has one; none beside a bar that would be torn by it."""
    from rich import get_console
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    words = [TextColumn(f"{{task.{name}}}") for name in ("description", "fields[count]", "fields[left]")]
    columns = (SpinnerColumn("line"), words[0], BarColumn(24), words[1], TimeElapsedColumn(), words[2])
    other = get_console()
    bars = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    below = bool(getattr(other, "_live_stack", ()))  # since rich 14.1
    if getattr(bars, "_instances", ()) or (getattr(other, "_live", None) is not None and not below):
        return None
    # What is printed meanwhile goes above the line where both are one terminal, and else where it would have gone.
    same = sys.stdout is not None and sys.stdout.isatty()
    console = other if below else Console(stderr=True)
    return Progress(*columns, console=console, transient=True, redirect_stdout=same)
