"""A line on a terminal while something takes long, and silence everywhere else."""

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lightning_igpt
from lightning_igpt import progress
from lightning_igpt.progress import track, working

SCRIPT = """
import sys, time
from lightning_igpt import progress
progress.DELAY = float(sys.argv[1])
def work():
    with progress.working("outer work"):
        for number in progress.track(range(20), "counting things"):
            time.sleep(0.05)
            if number == 15:
                print("a result", flush=True)
work()
"""


def on_a_terminal(delay, stdout=None, **environment):
    """(what a terminal shows of the script's stderr, or of both, and what a pipe got of its stdout)."""
    ours, theirs = pty.openpty()
    path = str(Path(lightning_igpt.__file__).parents[1])
    variables = {name: value for name, value in os.environ.items() if name not in progress.RANKS}
    variables |= {"PYTHONPATH": path, "TERM": "xterm", "COLUMNS": "100", **environment}
    words = [sys.executable, "-c", SCRIPT, str(delay)]
    program = subprocess.Popen(words, stdout=stdout or theirs, stderr=theirs, stdin=theirs, env=variables)
    os.close(theirs)
    shown, until = b"", time.monotonic() + 60
    while time.monotonic() < until:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                part = os.read(ours, 65536)
            except OSError:  # how Linux tells that nobody holds the other end
                break
            if not part:
                break
            shown += part
    piped = program.stdout.read().decode() if stdout else ""
    assert program.wait() == 0, shown
    os.close(ours)
    return shown.decode(), piped


def test_a_terminal_shows_works_that_take_long_and_stdout_stays_clean():
    shown, piped = on_a_terminal(0.1, subprocess.PIPE)
    assert "counting things" in shown and " of 20" in shown and "outer work" in shown
    assert piped == "a result\n"


def test_what_is_printed_meanwhile_is_not_lost():
    shown, _ = on_a_terminal(0.1)
    assert "a result" in shown and "counting things" in shown


@pytest.mark.parametrize("options", [{"delay": 30}, {"delay": 0.1, "RANK": "1"}, {"delay": 0.1, "TERM": "dumb"}])
def test_short_works_other_processes_and_dumb_terminals_show_nothing(options):
    assert on_a_terminal(options.pop("delay"), subprocess.PIPE, **options) == ("", "a result\n")


def test_nothing_is_shown_where_nobody_looks(capsys, monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    with working("work", 3) as advance:
        advance(2)
    assert list(track(iter("abc"), "letters")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_the_line_goes_away_when_the_work_fails(monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "is_shown", lambda: True)

    def fail():
        for _ in track(range(3), "failing"):
            time.sleep(0.05)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    assert progress._display.shown is None and progress._display.lines == 0
