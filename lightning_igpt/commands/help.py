"""argparse with help that fits the terminal and ends with examples, and with errors of one line."""

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from lightning_igpt.files import shown

PROGRAM = "lightning-igpt"
MARGIN = 18  # characters of the name of a table's line
LIGHTNING_VERBS = {
    "fit": "train: pretraining, probing or fine-tuning, whichever the recipe names",
    "validate": "run the validation loop on a checkpoint",
    "test": "run the test loop on a checkpoint",
    "predict": "complete images (pretraining) or classify them (probe, fine-tune)",
}
EXAMPLES: Mapping[str, Sequence[str]] = {
    "fit": ("fit --config digits_tiny_pretrain", "fit -c cifar10_s_pretrain --data.source photos --resume auto"),
    "validate": ("validate -c digits_tiny_pretrain --ckpt_path final.ckpt",),
    "test": ("test --config digits_tiny_pretrain --ckpt_path final.ckpt",),
    "predict": ("predict --config digits_tiny_pretrain --ckpt_path final.ckpt",),
    "quickstart": ("quickstart", "quickstart --out first-look --steps 200"),
    "complete": ("complete --pretrained runs --images photos", "complete --pretrained runs --images digits"),
    "demo": ("demo", "demo --pretrained final.ckpt --port 8080 --open"),
    "score": ("score --pretrained runs --images photos --limit 500",),
    "lowdata": ("lowdata --pretrained runs --source digits --out few",),
    "report": ("report runs", "report runs/pretrain runs/probe --out report.html"),
    "data show": ("data show photos --image_size 32",),
    "palette fit": ("palette fit photos mine.npy --n_colors 256 --limit 5000",),
    "palette show": ("palette show --palette mine.npy --out mine.png",),
    "convert": ("convert final.ckpt mine", "convert openai/imagegpt-small small --check"),
    "plan": ("plan --network igpt_l --devices 8", "plan --network igpt_tiny --device_kind cpu"),
    "recipes list": ("recipes list",),
    "recipes show": ("recipes show digits_tiny_pretrain",),
    "recipes copy": ("recipes copy digits_tiny_pretrain --to mine.yaml",),
}


class Parser(argparse.ArgumentParser):
    """argparse's parser with the examples of its verb and no abbreviations."""

    def __init__(self, *, prog: str, description: str = "", **options: Any) -> None:
        lines = [f"{PROGRAM} {line}" for line in EXAMPLES.get(prog.removeprefix(f"{PROGRAM} "), ())]
        super().__init__(
            prog=prog,
            description=textwrap.fill(plain(description), columns()),
            epilog="\n  ".join(["examples:", *lines]) if lines else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **{"add_help": False} | options,
        )

    def error(self, message: str) -> NoReturn:
        """Print what is wrong with the command in one line, and exit with status 2."""
        usage_error(self.prog, message)


def usage_error(prog: str, message: str) -> NoReturn:
    """Print a library's message about wrong usage on one line that ends with where to look, and exit with status 2."""
    print(f"{prog}: {shown(' '.join(message.split())).rstrip('.')}. See {prog} --help", file=sys.stderr)
    raise SystemExit(2)


def columns() -> int:
    """Columns of the terminal, or of the variable COLUMNS, less the margin that argparse leaves."""
    return max(50, shutil.get_terminal_size().columns) - 2


def row(name: str, text: str) -> str:
    """A line of a table."""
    return f"{name:<{MARGIN}}{shown(text)}".rstrip()


def plain(text: str | None) -> str:
    """Text of a docstring on one line, without the marks of reStructuredText."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda match: match[1].rsplit(".", 1)[-1], text or "")
    return " ".join(text.replace("`", "").split())
