"""The command ``lightning-igpt``: Lightning's verbs and ours.

Only what a verb needs is imported, so that ``--version``, ``--help`` and ``recipes`` answer at once.
"""

import ctypes
import importlib
import io
import os
import sys
import textwrap
from collections.abc import Sequence

from lightning_igpt import __version__
from lightning_igpt.commands.help import LIGHTNING_VERBS, PROGRAM, columns, did_you_mean, usage_error

OWN_VERBS = {
    "quickstart": "pretrain, complete, probe and fine-tune on embedded images, then write a report",
    "complete": "complete the lower part of your images, or a hole, with a trained network",
    "demo": "serve a page to complete pictures and see what surprises the network",
    "score": "measure how surprising images are to a network, in nats per pixel",
    "distance": "measure the Frechet and kernel distance between completions and real images",
    "features": "write pooled features of images, by layer, as Parquet",
    "lowdata": "classify with a few labels per class: linear probes on random subsets",
    "report": "gather runs on one HTML page: curves, layers, completions, settings",
    "data": "inspect a dataset: splits, classes, bad images, palette error, a contact sheet",
    "palette": "fit a palette to images, or show a palette",
    "convert": "write weights for transformers or as safetensors, and check them",
    "plan": "compute parameters, FLOPs, memory and time of a run",
    "scaling": "plan runs of several sizes and budgets; fit scaling laws to them",
    "recipes": "list, show or copy the shipped YAML recipes",
}
POSITIONAL = ("convert", "data", "palette", "recipes", "report", "scaling")  # whose required arguments need no names
INTERRUPTED, NO_READER = 130, 141  # as shells report programs that SIGINT and SIGPIPE ended


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb, by the words after the program's name; returns or raises the exit status.

    0 when the work is done, 1 something given was wrong, 2 wrong usage, 130 Ctrl-C, 141 no reader, 143 a signal.
    """
    words = list(sys.argv[1:] if args is None else args)
    _prepare_streams()
    if words[:1] in (["fit"], ["quickstart"]):
        _reuse_memory()
    try:
        _run(words)
        sys.stdout.flush()  # here, where a closed pipe is noticed
        return 0
    except (KeyboardInterrupt, BrokenPipeError, SystemExit) as stop:
        cause = stop.__context__ if isinstance(stop, SystemExit) else stop  # Lightning and rich end with 1
        if isinstance(cause, KeyboardInterrupt):
            print(f"{PROGRAM}: interrupted", file=sys.stderr)
            return INTERRUPTED
        if not isinstance(cause, BrokenPipeError):
            raise
        if cause is stop:  # the interpreter flushes once more when it ends; rich has redirected stdout
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NO_READER


def _prepare_streams() -> None:
    """Replace closed streams, whose numbers the next files would get, and let names of any encoding be printed."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # the lowest number that is free
        pass
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _reuse_memory() -> None:
    """Let glibc keep what a training step frees for the next step, for which the kernel would map and clear pages."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-4, 0)  # M_MMAP_MAX


def _run(words: list[str]) -> None:
    verb = words[0] if words else "--help"
    if verb in ("--version", "-V"):
        print(f"{PROGRAM} {__version__}")
    elif verb in ("--help", "-h", "help"):
        print(usage())
    elif verb in LIGHTNING_VERBS:
        importlib.import_module("lightning_igpt.commands.recipe_words").check(words)
        importlib.import_module("lightning_igpt.cli").run(words)
    elif verb in OWN_VERBS:
        from lightning_igpt.commands.arguments import run_verb

        run_verb(verb, words[1:], positional=verb in POSITIONAL)
    else:
        usage_error(PROGRAM, f"there is no verb {verb!r}{did_you_mean(verb, LIGHTNING_VERBS | OWN_VERBS)}")


def usage() -> str:
    """The text of ``--help``, as wide as the terminal."""
    rows = [f"{PROGRAM} {__version__}: Image GPT for PyTorch Lightning and Hugging Face datasets", ""]
    rows += [f"usage: {PROGRAM} VERB [options]        {PROGRAM} VERB --help", ""]
    rows += ["Lightning's verbs, driven by a recipe (--config FILE or the name of a shipped recipe):"]
    rows += [f"  {verb:<12}{text}" for verb, text in LIGHTNING_VERBS.items()]
    rows += ["", "Our verbs:", *(f"  {verb:<12}{text}" for verb, text in OWN_VERBS.items())]
    rows += ["", f"Start with: {PROGRAM} quickstart"]
    return "\n".join(textwrap.fill(row, columns(), subsequent_indent=" " * 14) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
