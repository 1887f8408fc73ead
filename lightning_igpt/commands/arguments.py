"""How a verb reads its arguments and tells its user what was wrong with them."""

from __future__ import annotations

import functools
import inspect
import os
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any, get_args, get_type_hints

import jsonargparse
from omegaconf.errors import InterpolationResolutionError

from lightning_igpt.commands.parsers import VerbParser

BOOLEANS = ("true", "false", "null")  # what may follow a switch as its value
SEEDS = 2**32  # NumPy's generators take no seed from there on, and none below 0
TRACEBACK = "LIGHTNING_IGPT_TRACEBACK"  # set to anything to see where an error came from


def run_function(
    function: Callable[..., Any] | dict[str, Any],
    words: Sequence[str],
    verb: str,
    *,
    positional: bool = False,
    about: str | None = None,
) -> int:
    """Parse ``words`` for ``function`` (or one of several, by name) with jsonargparse, and call it.

    Options may be written with dashes for underscores, as ``--batch-size``, and ``--config`` as ``-c``.

    Args:
        function: What to run, or a mapping from sub-verbs to what to run.
        words: The words after the verb.
        verb: The verb, for messages.
        positional: Take required arguments without their names.
        about: What the verb does; default the first line of the function's documentation.
    """
    prog = f"lightning-igpt {verb}"
    words = _underscored(function, words)
    with one_line_errors(prog):
        _refuse_sixties(function, words)
    if not isinstance(function, dict):
        words = _spelled_out(function, words)
        function = _with_config(function, words)
    elif words and words[0] in function:
        words = [words[0], *_spelled_out(function[words[0]], words[1:])]
    options: dict[str, Any] = {"prog": prog, "description": about, "parser_class": VerbParser}
    with one_line_errors(prog):
        jsonargparse.auto_cli(_with_seed(function), args=list(words), as_positional=positional, **options)
    return 0


def _underscored(function: Callable[..., Any] | dict[str, Any], words: Sequence[str]) -> list[str]:
    """``--batch-size`` as ``--batch_size``, where some function has such a parameter, and ``-c`` as ``--config``.

    Values stay as they are.
    """
    several = function.values() if isinstance(function, dict) else [function]
    known = {f"--{name}" for one in several for name in inspect.signature(one).parameters}
    spelled = []
    for word in words:
        if word == "-c" and "--config" in known:
            word = "--config"
        name, equals, value = word.partition("=")
        option = f"--{name.removeprefix('--').replace('-', '_')}"
        spelled.append(f"{option}{equals}{value}" if word.startswith("--") and option in known else word)
    return spelled


def _refuse_sixties(function: Callable[..., Any] | dict[str, Any], words: Sequence[str]) -> None:
    """Keep YAML from reading ``1:4`` as 64, a number to the base of 60.

    Raises:
        ValueError: An option that takes a number has such a value.
    """
    several = function.values() if isinstance(function, dict) else [function]
    kinds = [pair for one in several for pair in get_type_hints(one).items()]
    numbers = {f"--{name}" for name, kind in kinds if {int, float} & {kind, *get_args(kind)}}
    for word, after in zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        value = value if equals else after
        if name in numbers and re.fullmatch(r"[-+]?[\d_]+(:\d+)+(\.\d*)?", value):
            raise ValueError(f"{name.removeprefix('--')} is {value!r}, which is no number; write one without colons")


def _with_config(function: Callable[..., Any], words: Sequence[str]) -> Callable[..., Any]:
    """The function with its argument ``config``, which jsonargparse takes for a file of its own and does not pass."""
    if "config" not in inspect.signature(function).parameters:
        return function
    pairs = [(*word.partition("="), after) for word, after in zip_longest(words, words[1:])]
    given = [value if equals else after for name, equals, value, after in pairs if name == "--config"]

    @functools.wraps(function)
    def call(**options: Any) -> Any:
        return function(**options | {"config": given[-1] if given else None})

    return call


def _with_seed(function: Any) -> Any:
    """The function, or each of several, which looks at its argument ``seed`` before anything else is done."""
    if isinstance(function, dict):
        return {name: _with_seed(one) for name, one in function.items()}
    if "seed" not in inspect.signature(function).parameters:
        return function

    @functools.wraps(function)
    def call(*given: Any, **options: Any) -> Any:
        check_seed("seed", options.get("seed"))
        return function(*given, **options)

    return call


def check_seed(name: str, seed: Any) -> None:
    """Insist that a seed can be one.

    Args:
        name: The option's.
        seed: A number; anything else is no seed, and left alone.

    Raises:
        ValueError: It is below 0 or too large.
    """
    if isinstance(seed, int) and not 0 <= seed < SEEDS:
        raise ValueError(f"{name} is {seed}; it must be from 0 to {SEEDS - 1}")


def _spelled_out(function: Callable[..., Any], words: Sequence[str]) -> list[str]:
    """``--check`` alone as ``--check=true``: jsonargparse wants the value of every switch written."""
    switches = {f"--{name}" for name, kind in get_type_hints(function).items() if kind in (bool, bool | None)}
    return [
        f"{word}=true" if word in switches and str(after).lower() not in BOOLEANS else word
        for word, after in zip_longest(words, words[1:])
    ]


@contextmanager
def one_line_errors(prog: str) -> Iterator[None]:
    """Tell an error that this package raised on purpose in one line; let every other one through as it is.

    Raises:
        SystemExit: With the message, which makes the exit status 1.
    """
    try:
        yield
    except InterpolationResolutionError as error:  # a recipe's ${...} that leads nowhere
        raise SystemExit(f"{prog}: {str(error).splitlines()[0]}") from error
    except BrokenPipeError:  # nobody reads any more, which is no mistake
        raise
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        own = error if isinstance(error, OSError) else _own(error)  # a path is always the user's business
        if os.environ.get(TRACEBACK) or own is None:
            raise
        raise SystemExit(f"{prog}: {' '.join(str(own).split())}") from error


def _own(error: BaseException | None) -> BaseException | None:
    """The error that this package raised: ``error``, or its cause, since jsonargparse wraps those of constructors."""
    while error is not None:
        frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
        if frames and frames[-1].startswith("lightning_igpt"):
            return error
        error = error.__cause__
    return None
