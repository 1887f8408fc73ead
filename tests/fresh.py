"""Processes of their own without ten seconds of imports each: forked from one that imports and does nothing else.

What is to be seen of Python's own start, as how long it takes or what it imports, needs ``subprocess``.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest

from lightning_igpt.__main__ import main as program

ROOT = Path(__file__).parents[1]


class Fresh:
    """A process with what is needed of a ``subprocess.Popen``; it leads a session, and its output is one text.

    Args:
        work: A function that another process can import.
        arguments: For it.
        folder: Where it works, and from where it can import.
        limits: Resources, and what may be taken of each.
        environment: Variables beside those of this process.
    """

    def __init__(self, work, *arguments, folder, limits=None, **environment):
        context = multiprocessing.get_context("forkserver")
        with pytest.MonkeyPatch.context() as patch:  # for the server, which the first of them starts
            patch.setenv("PYTHONPATH", str(ROOT))
            patch.setenv("OMP_NUM_THREADS", "1")
            context.set_forkserver_preload(["tests.preloaded"])
            forkserver.ensure_running()
        left = ("MASTER_", "LOCAL_RANK")  # variables of an earlier group of processes
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(left)}
        environment = {**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
        self._output = Path(folder) / f".output-{time.monotonic_ns()}"
        self._output.touch()
        place = {"folder": str(folder), "output": str(self._output), "limits": limits or {}}
        self._process = context.Process(target=begin, args=(place, environment, work, arguments))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        """None as long as it runs."""
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """What it has printed, and None, when it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout)
        return self._output.read_text(), None


def begin(place, environment, work, arguments):
    """What precedes the work, in the process that does it."""
    multiprocessing.set_start_method(None, force=True)  # Python's own; else workers of loaders came of another server
    os.setsid()
    os.chdir(place["folder"])
    output = os.open(place["output"], os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [place["folder"], str(ROOT)]
    for kind, most in place["limits"].items():
        resource.setrlimit(kind, (most, most))
    work(*arguments)


def main(*words):
    """``lightning-igpt`` with these words."""
    sys.argv = ["lightning-igpt", *words]
    sys.exit(program(list(words)))


def script(path, *words):
    """``python PATH WORDS``."""
    sys.argv = [str(path), *words]
    runpy.run_path(str(path), run_name="__main__")


def finished(work, *arguments, timeout=300, **options):
    """What was printed by work that ended well."""
    process = Fresh(work, *arguments, **options)
    out, _ = process.communicate(timeout)
    assert process.returncode == 0, f"status {process.returncode}: {out[-4000:]}"
    return out
