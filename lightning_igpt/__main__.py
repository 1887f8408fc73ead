"""The command ``lightning-igpt``: Lightning's verbs and ours.

Only what a verb needs is imported, so that ``--version``, ``--help`` and ``recipes`` answer at once.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from lightning_igpt import __version__

LIGHTNING_VERBS = {
    "fit": "train: pretraining, probing or fine-tuning, whichever the recipe names",
    "validate": "run the validation loop on a checkpoint",
    "test": "run the test loop on a checkpoint",
    "predict": "complete images (pretraining) or classify them (probe, fine-tune)",
}
OWN_VERBS = {
    "quickstart": "pretrain, complete, probe and fine-tune on embedded images, then write a report",
    "complete": "complete the lower part of your images, or a hole, with a trained network",
    "score": "tell how surprising images are to a network, in nats per pixel",
    "figures": "pictures of a palette, a network and its runs, for light and dark pages",
    "lowdata": "classify with a few labels per class: linear probes on random subsets",
    "report": "gather runs on one HTML page, beside the paper's numbers and what differs",
    "data": "look at a data set: splits, classes, bad images, palette error, a contact sheet",
    "palette": "fit a palette to images, or look at one",
    "convert": "write weights for transformers, NumPy or safetensors, and check them",
    "plan": "parameters, FLOPs and memory of a network",
    "microbatch": "the largest batch that fits into memory, tried in training steps, as options for fit",
    "launch": "train a recipe on a cluster: a SLURM script that requeues and resumes, or torchrun",
    "recipes": "list, show or copy the shipped YAML recipes",
}


def main(args: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        args: The words after the program's name; default those of the command line.

    Returns:
        The exit status. Wrong usage raises SystemExit(2), as argparse does.
    """
    words = list(sys.argv[1:] if args is None else args)
    verb = words[0] if words else "--help"
    if verb in ("--version", "-V"):
        print(f"lightning-igpt {__version__}")
        return 0
    if verb in ("--help", "-h", "help"):
        print(usage())
        return 0
    if verb in LIGHTNING_VERBS:
        importlib.import_module("lightning_igpt.cli").run(words)
        return 0
    if verb in OWN_VERBS:
        return importlib.import_module(f"lightning_igpt.commands.{verb}").run(words[1:]) or 0
    close = difflib.get_close_matches(verb, [*LIGHTNING_VERBS, *OWN_VERBS], n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    print(f"lightning-igpt: there is no verb {verb!r}{hint} See lightning-igpt --help", file=sys.stderr)
    raise SystemExit(2)


def usage() -> str:
    """The text of ``--help``."""
    rows = [f"lightning-igpt {__version__}: Image GPT for PyTorch Lightning and Hugging Face datasets", ""]
    rows += ["usage: lightning-igpt VERB [options]        lightning-igpt VERB --help", ""]
    rows += ["Lightning's verbs, driven by a recipe (--config FILE or the name of a shipped recipe):"]
    rows += [f"  {verb:<12}{text}" for verb, text in LIGHTNING_VERBS.items()]
    rows += ["", "Our verbs:"]
    rows += [f"  {verb:<12}{text}" for verb, text in OWN_VERBS.items()]
    rows += ["", "Start with: lightning-igpt quickstart"]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
