"""``lightning-igpt recipes``: the YAML recipes that come with the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lightning_igpt.commands.arguments import run_function
from lightning_igpt.commands.places import check_file
from lightning_igpt.spelling import there_is_no

PACKAGE = Path(__file__).parents[1]
ABOUT = "List, show or copy the recipes that come with the package."


def folder() -> Path:
    """Where the recipes lie: inside an installed package, beside it in a checkout."""
    return next(path for path in (PACKAGE / "recipes", PACKAGE.parent / "recipes") if path.is_dir())


def names() -> list[str]:
    """Names of all shipped recipes."""
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(name: str) -> Path:
    """The file of a shipped recipe.

    Raises:
        FileNotFoundError: There is none of that name; the message offers the closest.
    """
    stem = name.removesuffix(".yaml")
    if stem in names():
        return folder() / f"{stem}.yaml"
    kind = "recipe" if stem == Path(name).name else "file or recipe"
    raise FileNotFoundError(there_is_no(kind, name, names(), "See lightning-igpt recipes list"))


def read(name: str) -> DictConfig:
    """The sections of a recipe, by the path of its file or by the name of a shipped one.

    Raises:
        FileNotFoundError: There is no such file, and no shipped recipe of the name.
        ValueError: The file is no YAML, or has no sections.
    """
    path = Path(name) if Path(name).exists() else find(name)
    try:
        loaded = OmegaConf.load(path)
    except OSError:
        raise
    except Exception as error:  # PyYAML's and OmegaConf's, of many classes
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ValueError(f"{path} is no recipe: it is not made of sections such as data and model")
    return loaded


def summary(path: Path) -> str:
    """The first line of a recipe's header, without the comment sign."""
    return path.read_text().splitlines()[0].lstrip("# ")


def list_recipes() -> None:
    """List the shipped recipes with a line each."""
    for name in names():
        print(f"{name:<26}{summary(folder() / f'{name}.yaml')}")


def show(name: str) -> None:
    """Print a recipe.

    Args:
        name: The recipe's name, as ``recipes list`` shows it.
    """
    print(find(name).read_text(), end="")


def copy(name: str, to: str = ".", overwrite: bool = False) -> None:
    """Copy a recipe, to change it.

    Args:
        name: The recipe's name.
        to: A folder, or the new file's path. Missing folders are made.
        overwrite: Replace a file that is there already.
    """
    target = Path(to)
    target = target / f"{find(name).stem}.yaml" if target.is_dir() or not target.suffix else target
    check_file(target, "--to", "recipe.yaml")
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; pass --overwrite true to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(find(name).read_text())
    print(f"{target}: edit it, then lightning-igpt fit --config {target}")


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    verbs = {"list": list_recipes, "show": show, "copy": copy}
    return run_function(verbs, words, "recipes", positional=True, about=ABOUT)
