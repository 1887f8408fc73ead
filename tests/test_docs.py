"""README and documentation agree with the code: names, links, numbers, pictures. ``tests/docs`` runs their snippets."""

import os
import re
from pathlib import Path

import pytest
import torch
import yaml

import lightning_igpt
from lightning_igpt.__main__ import LIGHTNING_VERBS, OWN_VERBS
from lightning_igpt.commands import recipes
from lightning_igpt.config import PRESETS
from lightning_igpt.planning import parameter_count
from tests import other_parts
from tests.docs.pages import GENERATED, PAGES, ROOT, blocks, table

DEMO, TEST = "pip install . && lightning-igpt quickstart", 'pip install -e ".[test]" && pytest -n auto'
TEXTS = PAGES | {path.name: path.read_text(encoding="utf-8") for path in recipes.folder().glob("*.yaml")}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_inline_commands_exist(page):
    for verb in re.findall(r"`lightning-igpt ([\w-]+)", PAGES[page]):
        assert verb in {*LIGHTNING_VERBS, *OWN_VERBS} or verb.startswith("--")


def test_the_two_commands_are_the_readmes_and_ci_runs_the_same():
    lines = {line for block in blocks("README.md") for line in block.text.splitlines()}
    assert {DEMO, TEST} <= lines
    assert TEST in (ROOT / ".ci" / "run").read_text()


def test_no_text_names_a_path_of_one_machine():
    path = re.compile(r"(?:^|[\s`\"'(=])/(?!bin/bash)\w[\w.-]*/", re.MULTILINE)
    assert path.search("see `/home/me/x`") and not path.search("a / b, `test/...`, runs/mine, https://host/x")
    assert [name for name, text in TEXTS.items() if path.search(text)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        path = Path(os.path.normpath((ROOT / page).parent / target))
        generated = path.is_relative_to(ROOT) and path.relative_to(ROOT).as_posix() in GENERATED
        assert target.startswith("https://") or path.exists() or generated, target


def test_recipes_named_exist():
    for name, text in TEXTS.items():
        named = re.findall(r"\b((?:cifar10|digits|imagenet\d+|photos)_\w+_(?:pretrain|bert|probe|finetune))\b", text)
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
    directives = re.findall(r"^\.\. auto\w+:: ([\w.]+)", PAGES["docs/reference/api.md"], re.MULTILINE)
    assert {*lightning_igpt.__all__} - {name.rpartition(".")[2] for name in directives} == {"__version__"}
    verbs = " ".join(row[0] for row in table("docs/reference/cli.md", "`.*"))
    assert {*re.findall(r"`(\w+)", verbs)} >= {*LIGHTNING_VERBS, *OWN_VERBS}


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
