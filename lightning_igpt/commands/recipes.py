"""``lightning-igpt recipes``: the YAML recipes that come with the package; what no recipe may say."""

import re
import textwrap
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_igpt.commands.arguments import check_file
from lightning_igpt.commands.help import PACKAGE, columns, did_you_mean
from lightning_igpt.files import write_text


def folder() -> Path:
    """Folder of the recipes: inside an installed package, next to the package in a checkout."""
    return next(path for path in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if path.is_dir())


def names() -> list[str]:
    """Names of all shipped recipes."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a shipped recipe; FileNotFoundError, which offers the closest name, if there is none."""
    stem = name.removesuffix(".yaml")
    if stem in names():
        return folder() / f"{stem}.yaml"
    hint = did_you_mean(stem, names(), n=3) or "."
    raise FileNotFoundError(f"there is no file or recipe {name!r}{hint} See lightning-igpt recipes list")


def check_texts(config: Namespace, typed: Sequence[str], trusted: Sequence[str]) -> None:
    """Raise ValueError where a configuration has an empty name, or an address (which is opened) that nobody gave."""
    for name, text in _texts("", config):
        whole = rf"(?<![^\s=,\"'\[{{]){re.escape(text)}(?![^\s,\"'\]}}])"  # not a part of another address
        known = any(f"{text}/".startswith(f"{address.rstrip('/')}/") for address in trusted)
        if "://" in text.removeprefix("file://") and not known and not any(re.search(whole, word) for word in typed):
            raise ValueError(f"{name} is the URL {text}; if you trust it, add --trust {text}")
        if "http" in text.partition("://")[0] and "://" in text and name.endswith(("root_dir", "save_dir", "dirpath")):
            raise ValueError(f"{name} is {text}, where nothing can be saved; name a folder")
        if not text.strip() and name.endswith(("resume", "ckpt_path", "root_dir", "pretrained", "source", "palette")):
            raise ValueError(f"{name} is empty; give it a value (perhaps a shell variable is not set)")


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """All texts of a configuration, with their names."""
    if isinstance(value, str):
        yield name, value
    parts = vars(value) if isinstance(value, Namespace) else value
    if isinstance(parts, Mapping):
        for key, part in parts.items():
            yield from _texts(f"{name}.{key}".removeprefix("."), part)
    elif isinstance(parts, (list, tuple)):
        for part in parts:
            yield from _texts(name, part)


def list_recipes() -> None:
    """List the shipped recipes with a line each."""
    for name in names():
        summary = find(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(textwrap.fill(f"{name:<26}{summary}", columns(), subsequent_indent=" " * 26))


def show(name: str) -> None:
    """Print a recipe.

    Args:
        name: The recipe's name, as ``recipes list`` shows it.
    """
    print(find(name).read_text(encoding="utf-8"), end="")


def copy(name: str, to: str = ".", overwrite: bool = False) -> None:
    """Copy a recipe, to change it.

    Args:
        name: The recipe's name.
        to: A folder, or the new file's path. Missing folders are made.
    """
    target = Path(to)
    target = target / f"{find(name).stem}.yaml" if target.is_dir() or not target.suffix else target
    check_file(target, "--to", "recipe.yaml", ".yaml")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; pass --overwrite to replace it")
    write_text(target, find(name).read_text(encoding="utf-8"))
    print(f"{target}: edit it, then lightning-igpt fit --config {target}")


VERBS = {"list": list_recipes, "show": show, "copy": copy}
