"""The command ``lightning-igpt``: Lightning's verbs and ours.

Only what a verb needs is imported, so that ``--version``, ``--help`` and ``recipes`` answer at once.
"""

from __future__ import annotations

import importlib
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence

from lightning_igpt import __version__
from lightning_igpt.spelling import there_is_no

LIGHTNING_VERBS = {
    "fit": "train: pretraining, probing or fine-tuning, whichever the recipe names",
    "validate": "run the validation loop on a checkpoint",
    "test": "run the test loop on a checkpoint",
    "predict": "complete images (pretraining) or classify them (probe, fine-tune)",
}
OWN_VERBS = {
    "quickstart": "pretrain, complete, probe and fine-tune on embedded images, then write a report",
    "complete": "complete the lower part of your images, or a hole, with a trained network",
    "demo": "serve a page on which to complete pictures and see what surprises the network",
    "score": "tell how surprising images are to a network, in nats per pixel",
    "lowdata": "classify with a few labels per class: linear probes on random subsets",
    "report": "gather runs on one HTML page, beside the paper's numbers and what differs",
    "data": "look at a data set: splits, classes, bad images, palette error, a contact sheet",
    "palette": "fit a palette to images, or look at one",
    "convert": "write weights for transformers, NumPy or safetensors, and check them",
    "plan": "parameters, FLOPs and memory of a network",
    "recipes": "list, show or copy the shipped YAML recipes",
    "completion": "print a script with which bash, zsh or fish completes these verbs and their options",
}


INTERRUPTED, NOBODY_READS = 130, 141  # as shells report programs that SIGINT and SIGPIPE ended


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        args: The words after the program's name; default those of the command line.

    Returns:
        The exit status: 0 when the work is done, 130 after Ctrl-C, 141 where nobody reads what is printed. SystemExit
        has 2 for wrong usage, 143 where a signal ended a run that then saved, and a message, which makes it 1, where
        something given was wrong.
    """
    words = list(sys.argv[1:] if args is None else args)
    try:
        status = _run(words)
        sys.stdout.flush()  # here, where a reader that is gone is noticed
        return status
    except KeyboardInterrupt:
        return _interrupted(words)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning ends with 1
            return _interrupted(words)
        raise
    except BrokenPipeError:
        # The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return NOBODY_READS


def _run(words: list[str]) -> int:
    verb = words[0] if words else "--help"
    if verb in ("--version", "-V"):
        print(f"lightning-igpt {__version__}")
        return 0
    if verb == "help" and words[1:]:
        return _run([*words[1:], "--help"])
    if verb in ("--help", "-h", "help"):
        print(usage())
        return 0
    if verb in LIGHTNING_VERBS:
        importlib.import_module("lightning_igpt.cli").run(words)
        return 0
    if verb in OWN_VERBS:
        return importlib.import_module(f"lightning_igpt.commands.{verb}").run(words[1:]) or 0
    told = there_is_no("verb", verb, [*LIGHTNING_VERBS, *OWN_VERBS], "See lightning-igpt --help")
    print(f"lightning-igpt: {told}", file=sys.stderr)
    raise SystemExit(2)


def _interrupted(words: Sequence[str]) -> int:
    hint = "; the same command with --resume auto goes on from the newest checkpoint" if words[:1] == ["fit"] else ""
    print(f"lightning-igpt: interrupted{hint}", file=sys.stderr)
    return INTERRUPTED


def usage() -> str:
    """The text of ``--help``, as wide as the terminal, or as the variable COLUMNS says."""
    width = max(50, shutil.get_terminal_size().columns)
    rows = [f"lightning-igpt {__version__}: Image GPT for PyTorch Lightning and Hugging Face datasets", ""]
    rows += ["usage: lightning-igpt VERB [options]        lightning-igpt VERB --help", ""]
    rows += ["Lightning's verbs, driven by a recipe (--config FILE or the name of a shipped recipe):"]
    rows += [f"  {verb:<12}{text}" for verb, text in LIGHTNING_VERBS.items()]
    rows += ["", "Our verbs:"]
    rows += [f"  {verb:<12}{text}" for verb, text in OWN_VERBS.items()]
    rows += ["", "Start with: lightning-igpt quickstart"]
    return "\n".join(line for row in rows for line in _wrapped(row, width))


def _wrapped(row: str, width: int) -> list[str]:
    """A row in lines; what a verb does goes on below where it begins."""
    indent = " " * 14 if row.startswith("  ") else ""
    return textwrap.wrap(row, width, subsequent_indent=indent, drop_whitespace=True) or [""]


if __name__ == "__main__":
    sys.exit(main())
