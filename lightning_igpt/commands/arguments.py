"""How our own verbs read their arguments: an argparse parser made from a function's signature and docstring."""

import argparse
import inspect
import os
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
from omegaconf.errors import OmegaConfBaseException

from lightning_igpt.commands.help import PROGRAM, Parser, plain
from lightning_igpt.files import shown

SEEDS = 2**32  # NumPy's generators take seeds from 0 to one less
TRACEBACK = "LIGHTNING_IGPT_TRACEBACK"  # set to anything to see where an error came from
TRUTH = {"true": True, "false": False}
CACHES = ("HF_HOME", "HF_DATASETS_CACHE", "HF_HUB_CACHE")  # variables that name folders


def run_function(
    function: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    words: Sequence[str],
    verb: str,
    *,
    positional: bool = False,
    about: str = "",
) -> int:
    """Parse the words after a verb for a function, or for one of several by the name of its sub-verb, and call it.

    ``positional`` takes required arguments without their names; ``about`` says what a verb with sub-verbs does.
    """
    prog = f"{PROGRAM} {verb}"
    if isinstance(function, Mapping):
        parser = Parser(prog=prog, description=f"{about[:1].upper()}{about[1:]}.", add_help=True)
        verbs = parser.add_subparsers(dest="verb", required=True, metavar="|".join(function), title="verbs")
        for name, part in function.items():
            summary = docstring_parser.parse(part.__doc__ or "").short_description
            _add(verbs.add_parser(name, prog=f"{prog} {name}", description=summary, help=summary), part, positional)
    else:
        parser = Parser(prog=prog, description=docstring_parser.parse(function.__doc__ or "").description or "")
        _add(parser, function, positional)
    options = vars(parser.parse_args(list(words)))
    chosen = function[options.pop("verb")] if isinstance(function, Mapping) else function
    with one_line_errors(prog):
        check_seed("seed", options.get("seed"))
        chosen(**options)
    return 0


def _add(parser: argparse.ArgumentParser, function: Callable[..., Any], positional: bool) -> None:
    """Add an option for every parameter."""
    hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    texts = parameter_texts(function)
    needed, rest = parser.add_argument_group("needed"), parser.add_argument_group("options")
    called = [parser.prog]
    for name, parameter in parameters.items():
        required, kind = parameter.default is inspect.Parameter.empty, hints[name]
        options = _reader(kind) | {"help": _text(texts.get(name, ""), parameter.default)}
        if required and positional:
            action = needed.add_argument(name, **options | {"metavar": name.upper()})
            called.append(f"{action.metavar} ..." if action.nargs == "+" else str(action.metavar))
        elif required:
            action = needed.add_argument(f"--{name}", required=True, **options)
            called.append(f"--{name} {action.metavar or name.upper()}")
        else:
            rest.add_argument(f"--{name}", default=parameter.default, **options)
    rest.add_argument("-h", "--help", action="help", help="Show this help and exit.")
    parser.usage = " ".join([*called, "[options]"])


def parameter_texts(function: Callable[..., Any]) -> dict[str, str]:
    """What a function's docstring says about each of its parameters."""
    return {item.arg_name: plain(item.description) for item in docstring_parser.parse(function.__doc__ or "").params}


def _text(text: str, default: Any) -> str:
    """The description of an option, with its default where that says something."""
    says_nothing = default in (None, False, "", inspect.Parameter.empty)
    if not says_nothing and "efault" not in text:
        text += f" Default: {' '.join(map(str, default)) if isinstance(default, tuple) else str(default).lower()}."
    return text.replace("%", "%%")


def leaves_of(hint: Any) -> Iterator[Any]:
    """The types, and the words of Literals, that a type hint is made of; None is left out."""
    origin = get_origin(hint)
    if origin is Literal:
        yield from get_args(hint)
    elif origin in (Union, UnionType, list, tuple):
        for part in get_args(hint):
            yield from leaves_of(part)
    elif hint not in (NoneType, Ellipsis):
        yield hint


def _reader(hint: Any) -> dict[str, Any]:
    """How argparse reads a parameter of a type: str, int, float, bool, words, or several of these."""
    leaves = list(leaves_of(hint))
    words = [leaf for leaf in leaves if isinstance(leaf, str)]
    if leaves == [bool]:
        return {"nargs": "?", "const": True, "type": _truth, "metavar": "true|false"}
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    several = {"nargs": "+"} if any(get_origin(part) in (list, tuple) for part in parts) else {}
    if words == leaves:
        return several | {"choices": words, "metavar": "|".join(words)}
    (kind,) = (leaf for leaf in leaves if isinstance(leaf, type))
    if not words:
        return several | {"type": _filled if kind is str else kind, "metavar": {int: "N", float: "X"}.get(kind)}

    def read(word: str) -> Any:
        return word if word in words else kind(word)

    read.__name__ = f"{kind.__name__} or {'|'.join(words)}"  # for argparse's message
    return several | {"type": read, "metavar": "|".join([*words, "N"])}


def _filled(word: str) -> str:
    if not word:
        raise argparse.ArgumentTypeError("the value is empty; perhaps a shell variable is not set")
    return word


def _truth(word: str) -> bool:
    if word.lower() not in TRUTH:
        raise argparse.ArgumentTypeError(f"{word!r} is neither true nor false")
    return TRUTH[word.lower()]


def check_seed(name: str, seed: Any) -> None:
    """Raise ValueError where a seed is out of range; what is no number (None, true) is left alone."""
    if isinstance(seed, int) and not 0 <= seed < SEEDS:
        raise ValueError(f"{name} is {seed}; it must be from 0 to {SEEDS - 1}")


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Turn errors that this package raised on purpose into SystemExit with one line, status 1; let others through."""
    try:
        yield
    except BrokenPipeError:  # the reader of stdout has gone, which is no mistake
        raise
    except (OmegaConfBaseException, ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        # Wrong paths and references of a recipe are the user's, whoever raises.
        own = error if isinstance(error, (OSError, OmegaConfBaseException)) else _own(error)
        if os.environ.get(TRACEBACK) or own is None:
            raise
        text = str(own)
        if isinstance(own, OSError) and own.filename:
            text = f"{own.filename}: {own.strerror}{_cure(Path(os.fsdecode(own.filename)))}"
        elif isinstance(own, OmegaConfBaseException):
            text += "; a reference is ${name}, and \\${ stands for these characters themselves"
        raise SystemExit(f"{prog}: {shown(' '.join(text.split()))}") from error


def _cure(path: Path) -> str:
    """What a folder is for in which the operating system refused something, and the variable that names another."""
    for variable in CACHES:
        place = Path(os.environ.get(variable) or "~/.cache/huggingface").expanduser().absolute()
        if place.is_relative_to(path) or path.is_relative_to(place):
            return f". Converted data sets and downloads are kept there; set {variable} to a folder that can be written"
    return ""


def _own(error: BaseException | None) -> BaseException | None:
    """The error that this package raised: ``error``, or its cause, since jsonargparse wraps those of constructors."""
    while error is not None:
        frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if frames and frames[-1].startswith("lightning_igpt"):
            return error
        error = error.__cause__
    return None
