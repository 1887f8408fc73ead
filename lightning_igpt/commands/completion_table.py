"""All verbs and their options as a table, from which completion scripts are made without importing torch.

``python -m lightning_igpt.commands.completion_table`` writes it anew.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Mapping
from typing import Any

from jsonargparse import ArgumentParser, capture_parser
from lightning.pytorch import callbacks as of_lightning

from lightning_igpt import callbacks
from lightning_igpt.commands.completion import TABLE
from lightning_igpt.commands.help_text import VALUES, is_switch, leaves_of, plain, value_of
from lightning_igpt.commands.parsers import VerbParser, subcommands, visible
from lightning_igpt.data import FineTuneDataModule, PretrainDataModule, ProbeDataModule
from lightning_igpt.modules import FineTuneModule, PretrainModule, ProbeModule

SECTIONS: Mapping[str, tuple[type, ...]] = {
    "model": (PretrainModule, ProbeModule, FineTuneModule),
    "data": (PretrainDataModule, ProbeDataModule, FineTuneDataModule),
}
NAMES = {
    "config": "recipes",
    "name": "recipes",
    "network": "presets",
    "palette": "palettes",
    "device_kind": "devices",
    "device": ["auto", "cpu", "cuda", "mps"],
    "accelerator": ["auto", "cpu", "gpu", "mps"],
}
FILES = {"WEIGHTS", "CHECKPOINT", "SOURCE", "PATH", "FILE", "auto|PATH"}
CALLBACKS = sorted(
    name
    for name in {*callbacks.__all__, *of_lightning.__all__} - {"Callback"}
    if isinstance(getattr(callbacks, name, getattr(of_lightning, name, None)), type)
)
FLAGS = {
    "--dry_run": (None, "print what would run"),
    "--trust": ("", "a package that the recipe may name"),
    "--trainer.help": (None, "every option of the trainer explained"),
    "--trainer.callbacks": (CALLBACKS, "class of a callback"),
    "--trainer.callbacks.help": (CALLBACKS, "the options of a callback"),
}


def table(lightning: Mapping[str, str], own: Mapping[str, str]) -> dict[str, Any]:
    """The table.

    Args:
        lightning: Lightning's verbs, and what each is for.
        own: Ours.
    """
    root = importlib.import_module("lightning_igpt.cli").parser()
    verbs = {name: _part(part, lightning[name]) for name, (part, _) in subcommands(root).items()}
    for part in verbs.values():
        part["options"] = dict(sorted({**part["options"], **FLAGS, **_of_classes()}.items()))
    verbs |= {name: _part(parser_of(name), text) for name, text in own.items()}
    return {"options": {"--help": (None, "show this help"), "--version": (None, "show the version")}, "verbs": verbs}


def parser_of(verb: str) -> VerbParser:
    """The parser of one of our verbs."""
    module = importlib.import_module(f"lightning_igpt.commands.{verb}")
    found: VerbParser = capture_parser(lambda: module.run(["show"] if verb == "data" else []))
    return found


def _part(parser: argparse.ArgumentParser, text: str) -> dict[str, Any]:
    """The table of one verb."""
    options: dict[str, Any] = {"--help": (None, "show this help")}
    arguments: dict[str, Any] = {}
    for action in visible(parser):
        names = [name for name in action.option_strings if name.startswith("--") and not name.endswith("+")]
        for name in names or [action.dest]:
            (options if names else arguments)[name] = (_takes(action), _short(action.help or ""))
    verbs = {name: _part(part, about) for name, (part, about) in subcommands(parser).items()}
    return {"help": _short(text), "options": options, "arguments": arguments, "verbs": verbs}


def _of_classes() -> dict[str, Any]:
    """The options of models and data modules, which are known once a class is."""
    found: dict[str, Any] = {}
    for section, kinds in SECTIONS.items():
        names = [kind.__name__ for kind in kinds]
        found[f"--{section}"] = (names, f"class of the {section}")
        found[f"--{section}.help"] = (names, f"the options of a class of the {section}")
        for kind in kinds:
            parser = ArgumentParser()
            parser.add_class_arguments(kind, section, fail_untyped=False)
            for name, entry in _part(parser, "")["options"].items():
                if name.startswith(f"--{section}."):
                    found.setdefault(name, entry)
                    found.setdefault(name.replace(".", ".init_args.", 1), entry)
    return found


def _takes(action: argparse.Action) -> Any:
    """None for a switch, words to choose among, or the name of what is completed; empty for anything else."""
    kind, name = getattr(action, "_typehint", None), action.dest.rsplit(".", 1)[-1]
    if action.option_strings and is_switch(action) and kind is None:
        return None
    if name in NAMES and (action.option_strings or name == "name"):
        return NAMES[name]
    words = [str(one).lower() for one in leaves_of(kind) if not isinstance(one, type)]
    words += [str(one) for one in action.choices or ()] + ["true", "false"] * (bool in leaves_of(kind))
    if words:
        return words
    if VALUES.get(name) == "FOLDER" or (action.help or "").startswith("Folder"):
        return "folders"
    return "files" if VALUES.get(name) in FILES or value_of(action) in FILES else ""


def _short(text: str) -> str:
    """The first sentence, without what shells could take for marks of their own."""
    first = plain(text).partition(". ")[0].partition(": ")[0].rstrip(".")
    return "".join(letter for letter in first if letter not in "'\"`$\\[](){}%:;")[:60].strip()


def main() -> None:
    """Write the table into the package."""
    program = importlib.import_module("lightning_igpt.__main__")
    found = table(program.LIGHTNING_VERBS, program.OWN_VERBS)
    TABLE.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {TABLE}\n")


if __name__ == "__main__":
    main()
