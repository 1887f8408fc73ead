"""What README and documentation say holds: names, tables, links and numbers agree with the code.

That their snippets run is shown in tests/docs.
"""

import os
import re
from pathlib import Path

import pytest
import yaml

import lightning_igpt
from lightning_igpt.__main__ import LIGHTNING_VERBS, OWN_VERBS
from lightning_igpt.commands import recipes
from lightning_igpt.config import PRESETS
from lightning_igpt.planning import parameter_count
from tests.docs.pages import GENERATED, PAGES, ROOT, blocks, table
from tests.test_layers import FLOORS

DEMO, TEST = "pip install . && lightning-igpt quickstart", 'pip install -e ".[test]" && pytest -n auto'


@pytest.mark.parametrize("page", PAGES)
def test_inline_commands_exist(page):
    for verb in re.findall(r"`lightning-igpt ([\w-]+)", PAGES[page]):
        assert verb in {*LIGHTNING_VERBS, *OWN_VERBS} or verb.startswith("--")


def test_the_two_commands_are_the_readmes_and_ci_runs_the_same():
    assert {DEMO, TEST} <= {line for block in blocks("README.md", "bash") for line in block.text.splitlines()}
    assert TEST in (ROOT / ".ci" / "run").read_text()


def texts():
    return PAGES | {path.name: path.read_text(encoding="utf-8") for path in recipes.folder().glob("*.yaml")}


def test_no_measurement_is_missing():
    assert [name for name, text in texts().items() if "MEASURE_ME" in text] == []


def test_nothing_is_tied_to_one_machine():
    path = re.compile(r"(?:^|[\s`\"'(=])/\w[\w.-]*/", re.MULTILINE)
    assert path.search("see `/home/me/x`") and not path.search("a / b, `test/...`, runs/mine, https://host/x")
    assert [name for name, text in texts().items() if path.search(text)] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES[page]):
        path = Path(os.path.normpath((ROOT / page).parent / target))
        made = path.is_relative_to(ROOT) and path.relative_to(ROOT).as_posix().startswith(GENERATED)
        assert target.startswith("https://") or path.exists() or made, target  # sphinx -W looks at those it makes


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == lightning_igpt.__version__ in PAGES["CHANGELOG.md"]


def test_the_floors_are_those_that_test_layers_enforces():
    rows = table("docs/architecture.md", r"\d+")
    shown = {int(number): re.findall(r"`(\w+)`", units) for number, units in rows}
    assert [shown[number] for number in sorted(shown)] == FLOORS
    assert list(shown) == sorted(shown, reverse=True), "the ground floor is at the bottom"


def test_the_ten_facts_have_their_tests():
    assert [row[0] for row in table("docs/reference_model.md", r"\d+")] == [str(number) for number in range(1, 11)]
    known = re.findall(r"^def (test_\w+)", (ROOT / "tests" / "test_model.py").read_text(), re.MULTILINE)
    assert set(re.findall(r"`(test_\w+)`", PAGES["docs/reference_model.md"])) <= set(known)


def test_the_presets_are_those_of_the_package():
    shown = {
        row[0].strip("`"): [int(cell.replace(",", "")) for cell in row[1:]]
        for row in table("docs/reference/api.md", "`igpt.*")
    }
    assert shown == {name: [c.n_layer, c.n_head, c.n_embd, parameter_count(c)] for name, c in PRESETS.items()}


def test_every_public_name_and_verb_has_its_place():
    for name in lightning_igpt.__all__[1:]:
        assert re.search(rf"\b{name}\b", PAGES["docs/reference/api.md"]), name
    verbs = " ".join(row[0] for row in table("docs/reference/cli.md", "`.*"))
    assert set(re.findall(r"`(\w+)", verbs)) >= {*LIGHTNING_VERBS, *OWN_VERBS}


def test_what_survives_what_names_tests_that_exist():
    rows = [row for row in table("docs/what-survives-what.md", r"(?!fault$|file$|-+$).*")]
    assert len(rows) > 45
    for fault, lost, tests in rows:
        assert lost, fault
        names = re.findall(r"`(tests/[^`:]+)::(?:(\w+)::)?(\w+)`", tests)
        assert names, f"no test holds: {fault}"
        for path, group, name in names:
            text = (ROOT / path).read_text(encoding="utf-8")
            assert re.search(rf"^{'    ' if group else ''}def {name}\(", text, re.MULTILINE), (path, name)
            assert not group or f"class {group}:" in text, (path, group)
