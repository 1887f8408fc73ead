"""``lightning-igpt completion``: a script with which a shell completes verbs, options, recipes, presets and files.

The script is static, so that a TAB starts no Python, and is made of a table, so that making it imports nothing heavy.
Not here: the making of the table (``completion_table.py``), to be repeated when a verb or an option changes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_igpt.commands import recipes
from lightning_igpt.commands.arguments import one_line_errors
from lightning_igpt.commands.parsers import VerbParser
from lightning_igpt.config import PRESETS
from lightning_igpt.planning import DEVICES

PROGRAM = "lightning-igpt"
TABLE = Path(__file__).parents[1] / "assets" / "completion.json"
SHELLS = ("bash", "zsh", "fish")
ABOUT = (
    "Print a script with which a shell completes verbs, options, recipes, presets and files. Put it into the shell's "
    'start file, for bash as eval "$(lightning-igpt completion bash)" in ~/.bashrc.'
)
# Names beside files, which shtab cannot offer together.
FUNCTIONS = {
    "bash": '_lightning_igpt_{kind}() {{ compgen -W "{words}" -- "$1"; compgen -f -- "$1"; }}',
    "zsh": "_lightning_igpt_{kind}() {{ _alternative '{kind}:{kind}:({words})' 'files:file:_files' }}",
    "fish": "function _lightning_igpt_{kind}; string split ' ' '{words}'; __fish_complete_path (commandline -ct); end",
}
PATHS = {
    "files": {
        "bash": "_shtab_compgen_files",
        "zsh": "_files",
        "fish": "(__fish_complete_path (commandline -ct))",
    },
    "folders": {
        "bash": "_shtab_compgen_dirs",
        "zsh": "_files -/",
        "fish": "(__fish_complete_directories (commandline -ct))",
    },
}
CALLS = {"bash": "_lightning_igpt_{kind}", "zsh": "_lightning_igpt_{kind}", "fish": "(_lightning_igpt_{kind})"}


def script(shell: str) -> str:
    """The script for a shell.

    Args:
        shell: bash, zsh or fish.

    Raises:
        ModuleNotFoundError: shtab is not installed.
    """
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("completion needs the package shtab: pip install shtab") from error
    words = {"recipes": recipes.names(), "presets": list(PRESETS), "palettes": ["openai", "gray:16"]}
    words["devices"] = [*DEVICES, "cpu"]
    preamble = "\n".join(
        FUNCTIONS[shell].format(kind=kind, words=" ".join(names).replace(":", r"\:" if shell == "zsh" else ":"))
        for kind, names in words.items()
    )
    parser = argparse.ArgumentParser(prog=PROGRAM, add_help=False)
    _add(parser, json.loads(TABLE.read_text(encoding="utf-8")), words)
    made: str = shtab.complete(parser, shell=shell, preamble=preamble)
    return made


def _add(parser: argparse.ArgumentParser, table: Mapping[str, Any], words: Mapping[str, Sequence[str]]) -> None:
    """Put options, positional arguments and verbs of the table into a parser."""
    for name, (takes, text) in table.get("options", {}).items():
        if takes is None:
            parser.add_argument(name, action="store_true", help=text)
        else:
            _complete(parser.add_argument(name, help=text), takes)
    for name, (takes, text) in table.get("arguments", {}).items():
        _complete(parser.add_argument(name, help=text), takes)
    verbs = table.get("verbs", {})
    if verbs:
        parts = parser.add_subparsers()
        for name, part in verbs.items():
            _add(parts.add_parser(name, help=part["help"], add_help=False), part, words)


def _complete(action: argparse.Action, takes: str | Sequence[str]) -> None:
    if not isinstance(takes, str):
        action.choices = list(takes)
    elif takes in ("recipes", "presets", "palettes", "devices"):
        action.complete = {shell: call.format(kind=takes) for shell, call in CALLS.items()}  # type: ignore[attr-defined]
    elif takes in PATHS:
        action.complete = PATHS[takes]  # type: ignore[attr-defined]


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    parser = VerbParser(prog=f"{PROGRAM} completion", description=ABOUT)
    parser.add_argument("shell", choices=SHELLS, help=f"Which: {', '.join(SHELLS)}.")
    with one_line_errors(f"{PROGRAM} completion"):
        print(script(parser.parse_args(list(words)).shell))
    return 0
