"""README and documentation agree with the code: names, links, numbers, pictures. ``tests/docs`` runs their snippets."""

import ast
import importlib.util
import itertools
import os
import re
from pathlib import Path

import pytest
import torch
import yaml

import lightning_igpt
from lightning_igpt.__main__ import LIGHTNING_VERBS, OWN_VERBS
from lightning_igpt.commands import recipes
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.planning import find_device, parameter_count, train_flops_per_token, usual_mfu
from tests.docs.pages import GENERATED, PAGES, ROOT, table

SPEC = importlib.util.spec_from_file_location("other_parts", ROOT / "docs" / "other_parts.py")
SPEC.loader.exec_module(other_parts := importlib.util.module_from_spec(SPEC))

EXAMPLES = (ROOT / "docs" / "_ext" / "examples.py").read_text(encoding="utf-8")
TEXTS = PAGES | {path.name: path.read_text(encoding="utf-8") for path in recipes.folder().glob("*.yaml")}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_inline_commands_exist(page):
    for verb in re.findall(r"`lightning-igpt ([\w-]+)", PAGES[page]):
        assert verb in {*LIGHTNING_VERBS, *OWN_VERBS} or verb.startswith("--")


def test_no_text_names_a_path_of_one_machine():
    path = re.compile(r"(?:^|[\s`\"'(=])/(?!bin/bash)\w[\w.-]*/", re.MULTILINE)
    assert path.search("see `/home/me/x`") and not path.search("a / b, `test/...`, runs/mine, https://host/x")
    assert [name for name, text in TEXTS.items() if path.search(text)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        path = Path(os.path.normpath((ROOT / page).parent / target))
        generated = path.is_relative_to(ROOT) and GENERATED.fullmatch(path.relative_to(ROOT).as_posix())
        assert target.startswith("https://") or path.exists() or generated, target


def test_recipes_named_exist():
    for name, text in TEXTS.items():
        named = re.findall(
            r"\b((?:cifar10|digits|emoji|imagenet\d+|photos)_\w+_(?:pretrain|bert|probe|finetune))\b", text
        )
        assert {*named} <= {*recipes.names()}, name


def test_every_picture_is_shown_and_small():
    shown = {
        (page, path) for page, text in PAGES.items() for path in re.findall(r'[("]([\w./-]*pictures/[^)"]+)', text)
    }
    files = {Path(os.path.normpath((ROOT / page).parent / path)) for page, path in shown}
    assert files == {*(ROOT / "docs" / "pictures").iterdir()}
    assert max(path.stat().st_size for path in files) < 120_000


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lightning_igpt.__version__ in PAGES["CHANGELOG.md"]


def test_the_ten_facts_have_their_tests():
    known = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_model.py").read_text(), re.MULTILINE)
    named = re.findall(r"`(test_\w+)`", PAGES["docs/reference_model.md"])
    assert len(named) >= 10 and {*named} <= {*known}


def test_the_presets_are_those_of_the_package():
    shown = {
        row[0].strip("`"): [int(cell.replace(",", "")) for cell in row[1:]]
        for row in table("docs/reference/api.md", "`igpt.*")
    }
    assert shown == {name: [c.n_layer, c.n_head, c.n_embd, parameter_count(c)] for name, c in PRESETS.items()}


def test_every_public_name_and_verb_is_documented():
    headings = re.findall(r"^# %% (\w+)$", EXAMPLES, re.MULTILINE)
    assert {*headings} == {*lightning_igpt.__all__} - {"__version__"}
    assert {*re.findall(r"\(api/(\w+)\.md\)", PAGES["docs/reference/api.md"])} == {*headings}
    verbs = " ".join(row[0] for row in table("docs/reference/cli.md", "`.*"))
    assert {*re.findall(r"`(\w+)", verbs)} >= {*LIGHTNING_VERBS, *OWN_VERBS}


@pytest.mark.parametrize("cost", [row for row in table("docs/reproduction.md", r"`\w+`") if len(row) == 3])
def test_costs_of_reproduction_are_those_of_planning(cost):
    recipe = yaml.safe_load(recipes.find(cost[0].strip("`")).read_text(encoding="utf-8"))
    options = recipe["model"]["init_args"]
    config = ImageGPTConfig.resolve(options["network"]).to_dict()
    config = ImageGPTConfig(**config | {"objective": options.get("objective", config["objective"])})
    images = 64 * 2_000_000 if "_xl_" in cost[0] else 128 * recipe["trainer"]["max_steps"]
    flops = train_flops_per_token(config) * config.n_positions * images
    hours = flops / usual_mfu(config) / find_device("h100").peak("bf16-mixed") / 3600
    assert cost[1:] == [f"{flops:.1e}", f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"]


# Metrics

PACKAGE = ROOT / "lightning_igpt"
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


def test_the_table_of_other_parts_is_whole():
    assert [row[0] for row in table("docs/how-to/other-peoples-parts.md", ".*: .*")] == [*other_parts.PARTS]


def test_a_part_is_tried(monkeypatch, tmp_path):
    tried = {"torch: it": lambda folder: None, "torch: that": lambda folder: 1 / 0, "nowhere: it": None}
    monkeypatch.setattr(other_parts, "PARTS", tried)
    page = tmp_path / "page.md"
    page.write_text("before\n\n| part | version | verdict |\n|---|---|---|\n| old | | |\n\nafter\n")
    other_parts.main(["--write", str(page)])
    rows = [f"| torch: it | {torch.__version__.partition('+')[0]} | works |", "| nowhere: it |  | not installed |"]
    fails = f"| torch: that | {torch.__version__.partition('+')[0]} | fails: ZeroDivisionError: division by zero |"
    head = "before\n\n| part | version | verdict |\n|---|---|---|\n"
    assert page.read_text() == head + "\n".join([rows[0], fails, rows[1]]) + "\n\nafter\n"
