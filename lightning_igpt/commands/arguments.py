"""How our own verbs read their arguments, by signature and docstring, and check where results go before any work."""

import argparse
import importlib
import itertools
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import docstring_parser

from lightning_igpt.commands.help import PROGRAM, SHARED, Parser, check_options, check_paths, parameters, texts, verbs
from lightning_igpt.files import shown

SEEDS = 2**32  # NumPy's generators take seeds from 0 to one less
LEAST = {"batch_size": 1, "limit": 1, "n_images": 1, "image_size": 1, "pictures": 0, "n_draws": 4}  # two pairs
CACHES = ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE")  # variables that name folders


def run_verb(verb: str, words: Sequence[str], *, positional: bool = False) -> None:
    """Parse the words after a verb, whose file is imported only once they are understood, and call its function."""
    functions, prog = verbs(verb), f"{PROGRAM} {verb}"
    name, options = read_words(functions, words, prog, positional=positional)
    with one_line_errors(prog):
        check_seed("seed", options.get("seed"))
        for option, least in (LEAST | {"limit": 0} if verb == "data" else LEAST).items():  # there 0 means all
            if (value := options.get(option)) is not None and value < least:
                raise ValueError(f"{option} is {value}; it must be at least {least}")
        if options.get("n_draws", 0) % 2:
            raise ValueError(f"n_draws is {options['n_draws']}; it must be even, as masks are drawn in pairs")
        check_paths(options)
        getattr(importlib.import_module(f"lightning_igpt.commands.{verb}"), functions[name].__name__)(**options)


def read_words(
    functions: Mapping[str, Any], words: Sequence[str], prog: str, *, positional: bool = False
) -> tuple[str, dict[str, Any]]:
    """(sub-verb or "", values by parameter); ``positional`` takes required ones without names, if not keyword-only."""
    docs = {name: docstring_parser.parse(function.__doc__) for name, function in functions.items()}
    if "" in functions:
        parser = Parser(prog=prog, description=docs[""].description or "")
        _add(parser, functions[""], positional)
    else:
        parser = Parser(prog=prog, add_help=True)
        group = parser.add_subparsers(dest="verb", required=True, metavar="|".join(functions), title="verbs")
        for name, function in functions.items():
            summary = docs[name].short_description
            added = group.add_parser(name, prog=f"{prog} {name}", description=summary, help=summary)
            _add(added, function, positional)
    check_options(functions.get("", functions.get(words[0] if words else "")), words, prog)
    options = vars(parser.parse_args(list(words)))
    return options.pop("verb", ""), options


def _add(parser: argparse.ArgumentParser, function: Any, positional: bool) -> None:
    about = SHARED | texts(function)
    needed, rest = parser.add_argument_group("needed"), parser.add_argument_group("options")
    called = [parser.prog]
    for name, part in parameters(function).items():
        text, default = about.get(name, ""), part.default
        if default not in (None, False, "", part.empty) and "efault" not in text:  # where that says something
            text += f" Default: {' '.join(map(str, default)) if isinstance(default, tuple) else str(default).lower()}."
        options = reader(part.annotation) | {"help": text.replace("%", "%%")}
        if default is not part.empty:
            rest.add_argument(f"--{name}", default=default, **options)
        elif positional and part.kind is not part.KEYWORD_ONLY:
            action = needed.add_argument(name, **options | {"metavar": name.upper()})
            called.append(f"{action.metavar} ..." if action.nargs == "+" else str(action.metavar))
        else:
            action = needed.add_argument(f"--{name}", required=True, **options)
            called.append(f"--{name} {action.metavar or name.upper()}")
    rest.add_argument("-h", "--help", action="help", help="Show this help and exit.")
    parser.usage = " ".join([*called, "[options]"])


def reader(hint: Any) -> dict[str, Any]:
    """How argparse reads a parameter of a type: str, int, float, bool, range, words, lists, or several of these."""
    leaves = list(_leaves(hint))
    values: dict[str, Any] = {leaf: leaf for leaf in leaves if isinstance(leaf, str)}
    values |= {"true": True, "false": False} if bool in leaves else {}
    kind = next((kind for kind in (str, range, float, int) if kind in leaves), None)
    mark = {str: None, float: "X", int: "N", range: "N-N"}[kind or str]

    def read(word: str) -> Any:
        if not word:
            raise argparse.ArgumentTypeError("the value is empty; perhaps a shell variable is not set")
        if kind is None and word.lower() not in values:
            raise ValueError(word)
        if kind is None or word in values:
            return values[word.lower()]
        return span(word) if kind is range else kind(word)

    metavar = "|".join([*values, *([mark] if mark else [])])
    read.__name__ = metavar or "text"  # for argparse's message
    several = any(get_origin(part) in (list, tuple) for part in (hint, *get_args(hint)))
    amount = {"nargs": "+"} if several else {"nargs": "?", "const": True} if leaves == [bool] else {}
    return {"type": read, "metavar": metavar or None} | amount


def span(word: str) -> range:
    """The numbers of 8-16, or of 8 alone; ValueError for other words."""
    first, _, last = word.partition("-")
    if not (numbers := range(int(first), int(last or first) + 1)):
        raise ValueError(word)
    return numbers


def _leaves(hint: Any) -> Iterator[Any]:
    """The types, and the words of Literals, that a type hint is made of; None is left out."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    elif get_origin(hint) in (Union, UnionType, list, tuple):
        yield from itertools.chain.from_iterable(map(_leaves, get_args(hint)))
    elif hint not in (NoneType, Ellipsis):
        yield hint


def check_seed(name: str, seed: Any) -> None:
    """Raise ValueError where a seed is out of range; what is no number (None, true) is left alone."""
    if isinstance(seed, int) and not 0 <= seed < SEEDS:
        raise ValueError(f"{name} is {seed}; it must be from 0 to {SEEDS - 1}")


def check_file(path: str | Path, option: str, example: str, suffix: str = "") -> None:
    """Raise ValueError or OSError unless ``option`` names a file to write or replace that ends in ``suffix``."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; {option} takes the name of a file, such as {path / example}")
    if not path.name.lower().endswith(suffix):
        raise ValueError(f"{option} is {path}; it must be a {suffix} file, such as {example}")
    if path.is_file() and not os.access(path, os.W_OK):
        raise PermissionError(f"{path} is not writable; change its permissions, or name another file by {option}")
    if path.is_file() or not path.exists():  # devices and pipes are written directly
        _check_writable(path, Path(os.path.realpath(path)).parent)


def check_folder(path: str | Path, option: str) -> None:
    """Raise OSError unless files can be written into a folder, which need not exist and which ``option`` names."""
    path = Path(path)
    if path.is_file():
        raise NotADirectoryError(f"{path} is a file; {option} takes a folder, so name another")
    _check_writable(path, path.absolute())


def _check_writable(place: Path, folder: Path) -> None:
    # Missing folders are made, but none at the root of the file system, where a new name is most likely misspelt.
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if existing == Path("/") != folder:
        raise FileNotFoundError(f"nothing is saved in {place}: {Path(*folder.parts[:2])} does not exist; make it first")
    try:
        with tempfile.TemporaryFile(dir=existing), suppress(FileNotFoundError):
            (existing / place.name).stat()  # an OSError where the name is too long
    except OSError as error:
        raise OSError(f"nothing can be saved in {place}: {existing}: {error.strerror}; name another place") from error


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Turn errors that this package raised on purpose into SystemExit with one line, status 1; let others through."""
    try:
        yield
    except Exception as error:
        references = getattr(sys.modules.get("omegaconf.errors"), "OmegaConfBaseException", ())
        # Wrong paths and references of a recipe are the user's, whoever raises.
        own = error if isinstance(error, (OSError, references)) else _own(error)
        meant = isinstance(error, (references, ValueError, TypeError, OSError, ModuleNotFoundError))
        meant = meant and not isinstance(error, BrokenPipeError)  # the reader of stdout has gone, which is no mistake
        if own is None or not meant or os.environ.get("LIGHTNING_IGPT_TRACEBACK"):
            raise
        text = str(own)
        if isinstance(own, OSError) and own.filename:
            text = f"{own.filename}: {own.strerror}{_cure(Path(os.fsdecode(own.filename)))}"
        elif isinstance(own, references):
            text += "; a reference is ${name}, to a value of the recipe, or ${oc.env:NAME}, to one of the environment"
        raise SystemExit(f"{prog}: {shown(' '.join(text.split()))}") from error


def _cure(path: Path) -> str:
    """What a folder is for in which the operating system refused something, and the variable that names another."""
    for variable in CACHES:
        place = Path(os.environ.get(variable) or "~/.cache/huggingface").expanduser().absolute()
        if place.is_relative_to(path) or path.is_relative_to(place):
            return f". Converted datasets and downloads are kept there; set {variable} to a folder that can be written"
    return ""


def _own(error: BaseException | None) -> BaseException | None:
    """The error that this package, or Lightning about its intervals, raised: ``error``, or its cause if wrapped."""
    while error is not None:
        frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if frames and frames[-1].startswith(("lightning_igpt", "lightning.pytorch.loops.fit_loop")):
            return error
        error = error.__cause__
    return None
