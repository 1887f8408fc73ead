"""The budget and the floors of docs/architecture.md: lines, files, imports that go down, private names in one place."""

import ast
import importlib
import inspect
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_igpt"
FLOORS = [
    ["bases", "config", "files", "lookup", "pictures", "private"],
    ["model", "palette", "kmeans", "images", "optim", "planning"],
    ["sampling", "decoding", "features", "objectives", "scaling"],
    ["weights", "distances"],
    ["modules", "data", "callbacks", "checkpointing"],
    ["trainer", "strategies", "report"],
    ["__main__", "cli", "commands", "benchmarks"],
]
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units}
FILES = sorted(PACKAGE.rglob("*.py"))
LIGHTNING = {"modules", "data", "callbacks", "checkpointing", "trainer", "strategies", *FLOORS[-1], "private", "bases"}
HOMES = {  # where a third party may be imported
    "datasets": {"data", "benchmarks"},
    "fastapi": {"commands"},
    "starlette": {"commands"},
    "uvicorn": {"commands"},
    "matplotlib": {"pictures"},
    "transformers": {"weights", "benchmarks", "distances"},
    "tensorflow": {"weights"},
    "lightning": LIGHTNING,
    "jsonargparse": {"cli", "commands", "__main__", "private"},
}
PRIVATE_PLACES = 15


def unit_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def lines_of(files):
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def test_the_budget():
    program = [path for path in FILES if unit_of(path) in ("__main__", "cli", "commands")]
    assert len(FILES) <= 110
    assert lines_of(FILES) <= 16_500
    assert lines_of(program) <= 3_300
    assert lines_of((ROOT / "tests").rglob("*.py")) <= 17_300


def test_files_and_functions_stay_short():
    for path in FILES:
        limit = 150 if unit_of(path) == "callbacks" else 200 if unit_of(path) == "commands" else 350
        assert lines_of([path]) <= limit, f"{path.name} is longer than {limit} lines"
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node, clean=False) or ""
                length = node.end_lineno - node.lineno + 1 - docstring.count("\n") - bool(docstring)
                assert length <= 60, f"{path.name}: {node.name} has {length} lines"


def imports_of(path):
    """(module, line, inside a function?) of every import."""
    tree = tree_of(path)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    nested = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path.name}:{node.lineno}: relative import; write the full name"
            own = node.module == "lightning_igpt"
            for name in [f"lightning_igpt.{alias.name}" for alias in node.names] if own else [node.module]:
                yield name, node.lineno, id(node) in nested
        elif isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, id(node) in nested


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    unit = unit_of(path)
    if unit == "__init__":
        return
    assert unit in FLOOR, f"{unit} has no floor; give it one here and in docs/architecture.md"
    for name, line, nested in imports_of(path):
        parts = name.split(".")
        if parts[0] != "lightning_igpt":
            home = HOMES.get(parts[0])
            assert home is None or unit in home, f"{path.name}:{line} imports {name}"
        elif len(parts) > 1 and parts[1] != "__version__":
            target = parts[1]
            assert not nested or unit == "__main__", f"{path.name}:{line} hides an import of {target} in a function"
            assert FLOOR[target] <= FLOOR[unit], f"{path.name}:{line}: {unit} may not import {target}"
            assert {unit, target} != {"modules", "data"}, f"{path.name}:{line}: modules and data do not know each other"


def test_no_circles():
    graph = {unit: set() for unit in FLOOR}
    for path in FILES:
        for name, _, nested in imports_of(path):
            parts = name.split(".")
            if unit_of(path) in graph and parts[0] == "lightning_igpt" and not nested and parts[1] in graph:
                graph[unit_of(path)].add(parts[1])
    left = {unit: targets - {unit} for unit, targets in graph.items()}
    while leaves := [unit for unit, targets in left.items() if not targets & left.keys()]:
        for unit in leaves:
            del left[unit]
    assert not left, f"a circle of imports among {sorted(left)}"


def test_the_table_of_floors_is_the_architectures():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) [^|]*\| ([^|]+) \|", page, re.MULTILINE)
    assert {int(number): set(re.findall(r"`(\w+)`", units)) for number, units in rows} == {
        number: set(units) for number, units in enumerate(FLOORS)
    }


def test_planning_needs_neither_torch_nor_numpy():
    assert not {name.split(".")[0] for name, _, _ in imports_of(PACKAGE / "planning.py")} & {"torch", "numpy"}


NAMED_TUPLE = {"_asdict", "_fields", "_replace"}  # documented, with an underscore so that no field has the name


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE


def private_uses(path, own):
    """(line, name) of private names that the package does not define itself."""
    for node in ast.walk(tree_of(path)):
        names = [node.attr] if isinstance(node, ast.Attribute) else []
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "setattr", "hasattr"):
            names = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] != "lightning_igpt":
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        yield from ((node.lineno, name) for name in names if is_private(str(name)) and name not in own)


def own_names():
    """Private names that the package gives: functions, classes, variables, attributes of self and of classes."""
    names = set()
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.arg)):
                names.add(getattr(node, "name", None) or node.arg)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) in ("self", "cls"):
                names |= {node.attr} if isinstance(node.ctx, ast.Store) else set()
    return names


def test_private_names_of_others_are_in_one_file():
    own, private = own_names(), PACKAGE / "private.py"
    for path in FILES:
        uses = list(private_uses(path, own))
        assert path == private or not uses, f"{path.name}: private names of others: {uses}"
    uses = list(private_uses(private, own))
    assert len(uses) <= PRIVATE_PLACES, uses


def test_no_private_method_of_others_is_overridden():
    for path in FILES:
        if unit_of(path) in ("__main__", "benchmarks"):
            continue
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for cls in vars(importlib.import_module(name)).values():
            if not inspect.isclass(cls) or cls.__module__ != name:
                continue
            foreign = {
                attribute for base in cls.__mro__ if "lightning_igpt" not in base.__module__ for attribute in vars(base)
            }
            functions = {attribute for attribute, value in vars(cls).items() if inspect.isfunction(value)}
            overridden = {attribute for attribute in functions & foreign if is_private(attribute)}
            assert not overridden, f"{name}.{cls.__name__} overrides {overridden}"
