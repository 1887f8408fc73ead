"""argparse with errors of one line; signatures are read from source files, to answer before torch is imported."""

import argparse
import ast
import builtins
import difflib
import glob
import inspect
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import docstring_parser

from lightning_igpt.files import shown

PROGRAM = "lightning-igpt"
PACKAGE = Path(__file__).parents[1]
MARGIN = 18  # characters of the name of a table's line
LIGHTNING_VERBS = {
    "fit": "train: pretraining, probing or fine-tuning, whichever the recipe names",
    "validate": "run the validation loop on a checkpoint",
    "test": "run the test loop on a checkpoint",
    "predict": "complete images (pretraining) or classify them (probe, fine-tune)",
}
EXAMPLES: Mapping[str, Sequence[str]] = {
    "fit": ("fit --config digits_tiny_pretrain", "fit -c cifar10_s_pretrain --data.source photos --resume auto"),
    **{verb: (f"{verb} -c digits_tiny_pretrain --ckpt_path final.ckpt",) for verb in ("validate", "test", "predict")},
    "quickstart": ("quickstart", "quickstart --out first-look --steps 200"),
    "complete": ("complete --pretrained runs --images photos", "complete --pretrained runs --images digits"),
    "demo": ("demo", "demo --pretrained final.ckpt --port 8080 --open"),
    "score": (
        "score --pretrained runs --images photos --limit 500",
        "score --pretrained runs/bert --images photos --n_draws 64",
        "score --images photos --against digits",
    ),
    "distance": ("distance --pretrained emoji --source emoji", "distance --source photos --keep_rows 0"),
    "features": ("features --source emoji --layers 2-4 --out emoji.parquet",),
    "lowdata": ("lowdata --pretrained runs --source digits --out few",),
    "report": ("report runs", "report runs/pretrain runs/probe --out report.html"),
    "data show": ("data show photos --image_size 32",),
    "palette fit": ("palette fit photos mine.npy --n_colors 256 --limit 5000",),
    "palette show": ("palette show --palette mine.npy --out mine.png",),
    "convert": ("convert final.ckpt mine", "convert openai/imagegpt-small small --check"),
    "plan": (
        "plan --network igpt_l --devices 8",
        "plan --network igpt_s --rgb true",
        "plan --network igpt_tiny --device_kind cpu",
    ),
    "scaling plan": ("scaling plan mine.yaml --budgets 1e12 --sizes 16x2 24x3 32x4",),
    "scaling fit": ("scaling fit runs/scaling", "scaling fit runs/scaling --out scaling"),
    "recipes list": ("recipes list",),
    "recipes show": ("recipes show digits_tiny_pretrain",),
    "recipes copy": ("recipes copy digits_tiny_pretrain --to mine.yaml",),
}
SHARED = {  # options of several verbs that docstrings leave out
    "pretrained": "The network: an embedded one (photos, emoji, emoji_bert), a .ckpt file or run folder, a Hugging "
    "Face folder or hub id, or an OpenAI checkpoint.",
    "palette": "The palette of training, if the source has none: openai, gray:16, rgb, a .npy file, a folder or id.",
    "images": "An image file, a folder of images, Parquet, a hub id, digits or emoji.",
    "source": "A folder of images, Parquet, a hub id, digits or emoji.",
    "split": "Split of a dataset; default test, else validation, else train.",
    "config_name": "Configuration of a hub dataset that has several.",
    "image_column": "Column of images. Default: the only column of type Image.",
    "label_column": "Column of labels. Default: the only ClassLabel, or integers called label or labels.",
    "limit": "Number of images, from the first; default all.",
    "batch_size": "Images per forward pass.",
    "device": "cpu, cuda, mps, or auto.",
    "overwrite": "Replace existing files.",
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
    text = shown(" ".join(message.split())).rstrip(".")
    print(f"{prog}: {text}{'' if text.endswith('?') else '.'} See {prog} --help", file=sys.stderr)
    raise SystemExit(2)


def did_you_mean(word: str, names: Iterable[str], n: int = 1) -> str:
    """The end of a message about an unknown name: the closest names, if any is close."""
    closest = difflib.get_close_matches(word, list(names), n=n)
    return f"; did you mean {' or '.join(map(repr, closest))}?" if closest else ""


def check_options(function: Any, words: Iterable[str], prog: str) -> None:
    """Refuse options that a function, if any, does not have; argparse would first ask for those that are required."""
    names = [f"--{name}" for name in (*parameters(function), "help")] if function else []
    for word in [word.partition("=")[0] for word in words if names and word.startswith("--")]:
        if word not in names:
            usage_error(prog, f"there is no option {word}{did_you_mean(word, names)}")


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


class Source(dict[str, Any]):
    """What a source file defines: constants, and functions without bodies; names of libraries mean ``object``."""

    def __init__(self, path: Path) -> None:
        super().__init__(vars(builtins) | vars(typing) | {"__annotations__": {}})
        self.homes = dict[str, str]()
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for part in node.body if isinstance(node, ast.ClassDef) else [node]:
                if isinstance(part, ast.ImportFrom):
                    self.homes |= dict.fromkeys([alias.name for alias in part.names], str(part.module))
                elif isinstance(part, ast.FunctionDef):
                    docstring = ast.Expr(ast.Constant(ast.get_docstring(part) or ""))
                    part.body, part.decorator_list = [docstring], []
                if isinstance(part, (ast.FunctionDef, ast.Assign, ast.AnnAssign)):
                    with suppress(Exception):  # what a library's class would be needed for
                        exec(compile(ast.fix_missing_locations(ast.Module([part], [])), str(path), "exec"), self)

    def __missing__(self, name: str) -> Any:
        file = PACKAGE.parent / f"{self.homes.get(name, '').replace('.', '/')}.py"
        return Source(file)[name] if file.is_relative_to(PACKAGE) else object


def verbs(verb: str) -> dict[str, Any]:
    """The functions of a verb's file by sub-verb; that of the verb itself where it has none."""
    source = Source(PACKAGE / "commands" / f"{verb}.py")
    return source.get("VERBS") or {"": source[verb]}


def parameters(function: Any) -> dict[str, inspect.Parameter]:
    """The parameters of a function that have names."""
    pairs = inspect.signature(function).parameters.items()
    return {name: part for name, part in pairs if name != "self" and part.kind != part.VAR_KEYWORD}


def texts(function: Any) -> dict[str, str]:
    """What the docstring of a function says about each parameter."""
    return {item.arg_name: plain(item.description) for item in docstring_parser.parse(function.__doc__ or "").params}


def check_paths(options: Mapping[str, Any]) -> None:
    """Raise FileNotFoundError where weights, images or runs are neither here nor a hub id or an embedded name."""
    for name in ("pretrained", "images", "against", "source", "runs", "palette"):
        values = options.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            path = Path(value).expanduser()
            known = path.exists() or value == "digits" or (name == "palette" and path.suffix != ".npy")
            known |= not value.strip() or re.search(r"://|\$\{", value) is not None  # checked later
            known |= name != "runs" and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", value) is not None
            known |= any(value in file.name for file in (PACKAGE / "assets").rglob("*"))
            if not known and not any(path.parent.glob(f"{glob.escape(path.name)}.*")):  # of a TensorFlow checkpoint
                hub = "" if name == "runs" else "; on the Hugging Face hub, names are owner/name"
                raise FileNotFoundError(f"{name} {value} does not exist: no file or folder of that name is here{hub}")
