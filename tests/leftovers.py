"""Finding and ending the processes that a test has started, which may have sessions of their own."""

import contextlib
import os
import signal
from pathlib import Path


def working_in(folder, word=""):
    """Numbers of all other processes whose working directory is a folder and whose command line has a word in it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile, or is somebody else's
            if (entry / "cwd").readlink() == folder and word in (entry / "cmdline").read_text():
                found.append(int(entry.name))
    return sorted(set(found) - {os.getpid()})


def parent_of(process):
    """Number of the process that started another; None where that has ended."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def end_all_in(folder):
    """Kill all that works in a folder."""
    for process in working_in(folder):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
