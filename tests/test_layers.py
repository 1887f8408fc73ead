"""Imports go down only. docs/architecture.md shows the same floors as a table."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_igpt"
FLOORS = [
    ["spelling", "progress", "private"],
    ["config", "rgb", "pictures", "lookup", "palette_files"],
    ["images"],
    ["tokenizing"],
    ["palette"],
    ["model", "kmeans", "planning", "optim"],
    ["objectives", "decoding"],
    ["sampling", "features"],
    ["weights"],
    ["modules", "data", "callbacks", "checkpointing"],
    ["microbatch", "strategies"],
    ["trainer"],
    ["report"],
    ["commands", "benchmarks"],
    ["cli"],
    ["__main__"],
]
FLOOR = {unit: number for number, units in enumerate(FLOORS) for unit in units}
FILES = sorted(PACKAGE.rglob("*.py"))


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def own_imports(tree: ast.Module):
    """(unit, line number, inside a function?) of every import of this package."""
    nested = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_igpt":
            parts = (node.module or "").split(".")
            units = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"line {node.lineno}: relative import; write the full name")
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            units = [parts[1] for parts in names if parts[0] == "lightning_igpt" and len(parts) > 1]
        else:
            continue
        for unit in units:
            yield unit, node.lineno, id(node) in nested


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    unit = unit_of(path)
    if unit == "__init__":
        return
    assert unit in FLOOR, f"{unit} has no floor; give it one here and in docs/architecture.md"
    for target, line, nested in own_imports(ast.parse(path.read_text())):
        if target not in FLOOR:
            assert target == "__version__", f"{path.name}:{line} imports {target}, which has no floor"
            continue
        assert not nested, f"{path.name}:{line} hides an import of {target} in a function"
        if target != unit:
            assert FLOOR[target] < FLOOR[unit], f"{path.name}:{line}: {unit} may not import {target}"


def test_third_parties_stay_on_their_floors():
    homes = {
        "datasets": {"data", "benchmarks"},
        "fastapi": {"commands"},
        "starlette": {"commands"},
        "uvicorn": {"commands"},
        "matplotlib": {"pictures", "report", "callbacks"},
        "rich": {"progress"},
        "shtab": {"commands"},
        "transformers": {"weights", "benchmarks"},
        "tensorflow": {"weights"},
        "lightning": {
            *(
                "modules",
                "data",
                "callbacks",
                "checkpointing",
                "microbatch",
                "strategies",
                "trainer",
                "commands",
                "benchmarks",
                "cli",
                "__main__",
            )
        },
        "jsonargparse": {"cli", "commands", "__main__"},
    }
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = (
                [alias.name for alias in node.names] if isinstance(node, ast.Import)
                else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            )  # fmt: skip
            for name in names:
                home = homes.get(name.split(".")[0])
                assert home is None or unit_of(path) in home, f"{path.name}:{node.lineno} imports {name}"


def test_planning_needs_no_torch():
    files = [path for path in FILES if unit_of(path) == "planning"]
    assert files
    for path in files:
        assert not re.search(r"^\s*(import|from) (torch|numpy)", path.read_text(), re.MULTILINE)


def test_files_and_functions_stay_short():
    for path in FILES:
        source = path.read_text()
        assert len(source.splitlines()) <= 350, f"{path.name} is longer than 350 lines"
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(node, clean=False) or ""
                length = node.end_lineno - node.lineno + 1 - docstring.count("\n") - bool(docstring)
                assert length <= 60, f"{path.name}: {node.name} has {length} lines"
