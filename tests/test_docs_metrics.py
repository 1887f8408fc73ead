"""The page of metrics lists every number that is logged, with its unit, and no other."""

import ast
import itertools
import re
from pathlib import Path

import lightning_igpt
from tests.docs.pages import table

PACKAGE = Path(lightning_igpt.__file__).parent
LOGS = ("self", "module", "pl_module")
VALUES = {  # of expressions between braces in a logged name
    "stage": ["val", "test"],
    "ending": [""],  # of the loader, where there are several
    "{stage}/{name}{ending}": ["accuracy", "cross_entropy"],
    "layer": ["<l>"],
    "self._layer": ["<l>"],
    "prefix": ["probe", "test"],
    "throughput/{name}": ["images_per_second", "tokens_per_second", "mfu"],
}


def names_of(node):
    """All names that a string, or an f-string, may have."""
    if isinstance(node, ast.Constant):
        return [node.value]
    template = "".join(
        part.value if isinstance(part, ast.Constant) else f"{{{ast.unparse(part.value)}}}" for part in node.values
    )
    parts = re.split(r"\{(.*?)\}", template)
    choices = [VALUES.get(part) or VALUES[template] if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(choice) for choice in itertools.product(*choices)]


def logged():
    """The first arguments of all calls of ``self.log`` and the like."""
    for path in [*(PACKAGE / "modules").rglob("*.py"), *(PACKAGE / "callbacks").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func
            if called and called.attr in ("log", "log_dict") and ast.unparse(called.value) in LOGS:
                yield from names_of(node.args[0])


def test_every_metric_is_on_the_page_with_its_unit_and_no_other():
    rows = table("docs/reference/metrics.md", "`.*")
    assert all(unit and where and what for _, unit, where, what in rows)
    shown = [name for names, *_ in rows for name in re.findall(r"`([^`]+)`", names)]
    assert sorted(shown) == sorted({*logged()})
