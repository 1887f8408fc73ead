"""The text of a script for sbatch, into which no value can bring a line or a command of its own."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Mapping, Sequence

UNLIMITED = ("unlimited", "infinite")
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
# What sbatch takes as one value: it splits at blanks and has its own rules for quotes, backslashes and #.
WORD = re.compile(r"[\w.,:;=+@%/\[\]{}()&|*~^!<>?-]+", re.ASCII)
NAME = re.compile(r"[\w.+-]+", re.ASCII)

SCRIPT = """\
#!/bin/bash
# A training run that SLURM may stop and start again. Submit it in the folder in which its relative paths begin.
{directives}

{remarks}
# Each GPU has one task: Lightning takes the processes that srun starts, and starts none of its own.
#
# {seconds} seconds before the time is up, or a minute earlier, SLURM sends SIGUSR1. There is no B: in --signal, so the
# tasks of srun get it; with it this shell alone would, which passes nothing on. The run finishes its step, saves
# and has the job requeued. This script then begins anew under the same number, and --resume auto goes on from there.
export SRUN_CPUS_PER_TASK={cpus} # srun of SLURM 22.05 and later does not take it from the lines above
{setup}
# A task that ends early must not stop the others at once, which may be saving, nor let them wait for ever.
srun --kill-on-bad-exit=0 --wait=60 \\
  {command}
"""
REQUEUE = """\
status=$?
# There is no scontrol in the container to ask for the requeueing. 143 means: told to stop, and saved.
if [ "$status" -eq 143 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
"""


def seconds(time: str) -> int:
    """Seconds of a time in one of SLURM's spellings; 0 means that there is no limit, as it does there.

    Raises:
        ValueError: It is in none of them.
    """
    if time.lower() in UNLIMITED:
        return 0
    found = TIME.fullmatch(time)
    if found is None:
        raise ValueError(f"time is {time!r}; write minutes, hours:minutes:seconds, or days-hours:minutes:seconds")
    days, *rest = (None if part is None else int(part) for part in found.groups())
    parts = [part for part in rest if part is not None]
    units = (3600, 60, 1) if days is not None or len(parts) == 3 else (60, 1)
    return (days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units, strict=False))


def comment(lines: Sequence[str]) -> str:
    """Lines of a comment, broken where they are long."""
    return "\n".join(
        textwrap.fill(line, 120, initial_indent="# ", subsequent_indent="#   ", break_long_words=False)
        for line in lines
    )


def directives(wanted: Mapping[str, str | int | None]) -> str:
    """Lines that begin with #SBATCH; one for each value that is not None.

    Raises:
        ValueError: sbatch would read a value as something else.
    """
    lines = []
    for name, value in wanted.items():
        if value is not None and not WORD.fullmatch(str(value)):
            raise ValueError(
                f"{name} is {value!r}; blanks, quotes, #, $ and the like do not belong into an #SBATCH line"
            )
        lines += [] if value is None else [f"#SBATCH --{name}={value}"]
    return "\n".join([*lines, "#SBATCH --requeue", "#SBATCH --open-mode=append"])


def quoted(command: Sequence[str]) -> str:
    """Safe in a shell; options with their values, each pair on a line of its own."""
    lines: list[str] = []
    for word in command:
        new = not lines or word == "-m" or (word.startswith("--") and word != "--")
        lines += [shlex.quote(word)] if new else []
        lines[-1] += "" if new else f" {shlex.quote(word)}"
    return " \\\n  ".join(lines)


def one_line(name: str, value: str) -> str:
    """The value itself.

    Raises:
        ValueError: It has line breaks or other control characters.
    """
    if not value.isprintable():
        raise ValueError(f"{name} is {value!r}; line breaks and control characters do not belong into a script")
    return value


def whole_commands(setup: str) -> str:
    """The setup itself; bash reads it where there is one, without running it.

    Raises:
        ValueError: It leaves a quotation, a loop, a list or a here-document open, which would go on in the lines below.
    """
    told = _complaints(f"{setup}\n")
    if told:
        raise ValueError(f"setup is no whole shell command: {' '.join(told.split())}")
    # A word that may not begin a command: if bash takes it, the line break before it did not end the setup.
    if shutil.which("bash") and not _complaints(f"{setup}\nfi\n"):
        raise ValueError(f"setup is no whole shell command: {setup!r} goes on in the next line")
    return setup


def _complaints(commands: str) -> str:
    """What bash says about commands; of an open here-document it only warns, with status 0."""
    bash = shutil.which("bash")
    if bash is None:
        return ""
    # Nothing else may be said: no warning about a locale, and no file that the environment names is read.
    done = subprocess.run(
        [bash, "-n"], input=commands, capture_output=True, encoding="utf-8", check=False, env={"LC_ALL": "C"}
    )
    return done.stderr or (f"status {done.returncode}" if done.returncode else "")
