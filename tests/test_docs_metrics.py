"""The page of metrics names every number that is logged, with its unit, and no other."""

import ast
import itertools
import re
from pathlib import Path

import lightning_igpt
from tests.docs.pages import PAGES, table

PACKAGE = Path(lightning_igpt.__file__).parent
LOGS = ("self", "module", "pl_module")
DRAWS = ("add_image", "add_figure")
VALUES = {  # of what stands between braces in a logged name
    "stage": ["val", "test"],
    "layer": ["<l>"],
    "self._layer": ["<l>"],
    "prefix": ["probe", "test"],
    "throughput/{name}": ["images_per_second", "mfu"],
    "test/{name}": ["confusion", "worst"],
}


def names_of(node):
    """All names that a string, or one with values in braces, may stand for."""
    if isinstance(node, ast.Constant):
        return [node.value]
    template = "".join(
        part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}" for part in node.values
    )
    parts = re.split(r"\{(.*?)\}", template)
    choices = [VALUES.get(part) or VALUES[template] if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def logged(calls, receivers=None):
    found = set()
    for path in [*(PACKAGE / "modules").rglob("*.py"), *(PACKAGE / "callbacks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func
            if called and called.attr in calls and (not receivers or ast.unparse(called.value) in receivers):
                assert isinstance(node.args[0], ast.Constant | ast.JoinedStr), f"{path}:{node.lineno}: name it here"
                found |= {*names_of(node.args[0])}
    return found


def test_every_metric_is_on_the_page_with_its_unit_and_no_other():
    rows = table("docs/reference/metrics.md", "`.*")
    assert all(unit and where and what for _, unit, where, what in rows)
    shown = [name for names, *_ in rows for name in re.findall(r"`([^`]+)`", names)]
    assert len(shown) == len({*shown})
    assert {*shown} == logged(["log"], LOGS)


def test_every_picture_is_on_the_page():
    for name in logged(DRAWS):
        assert f"`{name}`" in PAGES["docs/reference/metrics.md"]


def test_dictionaries_of_metrics_are_not_logged():
    assert logged(["log_dict"]) == set(), "their names are not seen here"
