"""What ``--help`` prints: how to call it, what is needed, what may be given, examples.

Not here: what the parsers understand, and what they say of mistakes (``parsers.py``); the examples (``examples.py``).
"""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

INDENT, MARGIN = 2, 26  # of the options' names, and of what is said about them
NARROWEST, WIDEST = 50, 120
# What stands for the value of an option that takes text.
VALUES = {
    "config": "RECIPE",
    "pretrained": "WEIGHTS",
    "ckpt_path": "CHECKPOINT",
    "resume": "auto|PATH",
    "images": "SOURCE",
    "source": "SOURCE",
    "out": "PATH",
    "to": "PATH",
    "mask": "FILE",
    "sweep": "FILE",
    "default_root_dir": "FOLDER",
    "device": "DEVICE",
    "accelerator": "DEVICE",
    "device_kind": "KIND",
    "network": "PRESET",
    "palette": "PALETTE",
    "precision": "PRECISION",
    "strategy": "NAME|CLASS",
    "plugins": "CLASS",
    "devices": "N",
    "monitor": "METRIC",
    "nodes": "N",
    "job_name": "NAME",
    "split": "NAME",
    "name": "NAME",
    "time": "TIME",
    "rendezvous": "HOST:PORT",
}


class Entry(NamedTuple):
    """An option, or a positional argument, and what is said of it."""

    name: str
    text: str


class Section(NamedTuple):
    """A heading with what stands under it: entries, or a paragraph."""

    heading: str
    entries: Sequence[Entry] = ()
    text: str = ""


def width_of_terminal() -> int:
    """Columns of the terminal or of the variable COLUMNS, within bounds in which help can be read."""
    return min(WIDEST, max(NARROWEST, shutil.get_terminal_size().columns))


def layout(usage: str, description: str, sections: Sequence[Section], examples: Sequence[str], width: int) -> str:
    """The whole text.

    Args:
        usage: How to call it.
        description: What it does.
        sections: In order; those without entries and text are left out.
        examples: Whole command lines; a long one goes on after a backslash, as shells read it.
        width: Columns.
    """
    called = f"usage: {usage}" if usage else ""
    lines = textwrap.wrap(called, width, subsequent_indent=" " * 7, break_on_hyphens=False)
    lines += ["", *textwrap.wrap(plain(description), width)] if description else []
    for heading, entries, text in sections:
        if entries or text:
            lines += ["", f"{heading}:"]
            lines += [line for entry in entries for line in _entry(entry, width)]
            lines += _paragraph(text, width)
    lines += ["", "examples:", *(line for one in examples for line in _command(one, width))] if examples else []
    return "\n".join(lines).lstrip("\n") + "\n"


def entry_of(action: argparse.Action, *, switches: bool = True) -> Entry:
    """An option as users read it: kind of value, text, default.

    Args:
        action: The option.
        switches: Those that are off may be given without a value.
    """
    kind = getattr(action, "_typehint", None)
    short = sorted((name for name in action.option_strings if not name.endswith("+")), key=len)
    names = ", ".join(short) if short else _positional(action)
    value = "" if not short or (switches and is_switch(action)) else f" {value_of(action)}"
    text = plain(action.help or "")
    default = action.default
    nothing = default in (None, argparse.SUPPRESS, "", -1) or (isinstance(default, list | tuple) and not default)
    if not (nothing or "efault" in text or action.required or (switches and is_switch(action))):
        shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else default
        shown = str(shown).lower() if isinstance(shown, bool) or kind is bool else shown
        text = f"{text} Default: {shown}{'' if shown == '.' else '.'}".strip()
    return Entry(names + value, text)


def _positional(action: argparse.Action) -> str:
    name = action.dest.upper()
    if action.nargs == "?":
        return f"[{name}]"
    return f"{name} ..." if action.nargs in ("+", "*") or _is_list(getattr(action, "_typehint", None)) else name


def is_switch(action: argparse.Action) -> bool:
    """Whether the name alone says yes, and the option is off without it."""
    if getattr(action, "_typehint", None) is bool:
        return action.default is False
    return action.nargs == 0


def value_of(action: argparse.Action) -> str:
    """What stands for the value: the words to choose among, or a name for the kind of thing."""
    name = action.dest.rsplit(".", 1)[-1]
    leaves = list(leaves_of(getattr(action, "_typehint", None) or str))
    words = [str(one).lower() if isinstance(one, bool) else str(one) for one in leaves if not isinstance(one, type)]
    words = [*words, *map(str, action.choices or ())]
    kinds = [one for one in leaves if isinstance(one, type)]
    if bool in kinds:
        words, kinds = ["true", "false", *words], [one for one in kinds if one is not bool]
    if words and not [kind for kind in kinds if kind is not str]:
        return f"{{{','.join(words)}}}"
    several = " ..." if kinds and _is_list(getattr(action, "_typehint", None)) else ""
    first = VALUES.get(name)
    if not first:
        classes = [kind for kind in kinds if kind not in (int, float, str, dict)]
        number = "X" if float in kinds else "N" if int in kinds else "TEXT"
        first = "TEXT" if str in kinds else "CLASS" if classes else number
    return "|".join([*words, f"{first}{several}"])


def plain(text: str) -> str:
    """Text without the marks of reStructuredText, on one line."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda found: found[1].rsplit(".", 1)[-1], text)
    return " ".join(text.replace("``", "").replace("`", "").split())


def leaves_of(kind: Any) -> Iterator[Any]:
    """The types, and the words of Literals, that a type hint is made of."""
    origin = get_origin(kind)
    if origin is Literal:
        yield from get_args(kind)
    elif origin in (Union, UnionType):
        for one in get_args(kind):
            yield from leaves_of(one)
    elif origin in (list, tuple):
        for one in get_args(kind):
            yield from [] if one is Ellipsis else leaves_of(one)
    elif isinstance(kind, type) and kind is not NoneType:
        yield kind


def _is_list(kind: Any) -> bool:
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(_is_list(one) for one in get_args(kind))
    return origin in (list, tuple)


def _entry(entry: Entry, width: int) -> list[str]:
    lines = textwrap.wrap(entry.text, width - MARGIN, break_on_hyphens=False) or [""]
    name = " " * INDENT + entry.name
    if len(name) + 2 <= MARGIN:
        return [f"{name:<{MARGIN}}{lines[0]}".rstrip(), *(" " * MARGIN + line for line in lines[1:])]
    return [name, *(" " * MARGIN + line for line in lines if line)]


def _command(line: str, width: int) -> list[str]:
    wide = f"  {line}"
    if len(wide) <= width:
        return [wide]
    options = {"break_on_hyphens": False, "break_long_words": False}
    lines = textwrap.wrap(wide, width - 2, subsequent_indent=" " * 6, **options)  # type: ignore[arg-type]
    return [f"{part} \\" for part in lines[:-1]] + lines[-1:]


def _paragraph(text: str, width: int) -> list[str]:
    indent = " " * INDENT
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
