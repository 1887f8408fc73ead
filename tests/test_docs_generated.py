"""Pages that the documentation's build makes from the code: nothing that the code has is missing on them."""

import re
import sys

import jsonargparse
import pytest

from lightning_igpt import callbacks
from lightning_igpt.__main__ import LIGHTNING_VERBS, OWN_VERBS
from lightning_igpt.commands import recipes
from lightning_igpt.planning import parameter_count
from tests.docs.pages import PAGES, ROOT
from tests.test_recipes import header, network_of, read

EXTENSIONS = str(ROOT / "docs" / "_ext")


@pytest.fixture(scope="module")
def made():
    """The extension's modules, found as Sphinx finds them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXTENSIONS)
        import generated

        yield generated
    for name in ("generated", "cli_pages", "recipe_pages"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def cli(made):
    return made.cli_pages.pages()


@pytest.fixture(scope="module")
def of_recipes(made):
    return made.recipe_pages.pages()


def shown(page, section=""):
    """The first words of a page's definition lists, from one of its sections on to the next."""
    start = page.index(f"\n## {section}\n") + 4 if section else 0
    end = page.find("\n## ", start) if section else len(page)
    text = page[start : end if end > 0 else len(page)]
    lines = re.findall(r"^(\*\*`.*)\n: ", text, re.MULTILINE)
    return {name for line in lines for name in re.findall(r"\*`([^`]+)`", line)}


@pytest.mark.parametrize("verb", [*LIGHTNING_VERBS, *OWN_VERBS])
def test_every_verb_has_a_page_with_its_help(verb, cli):
    assert f"usage: lightning-igpt {verb} " in cli[verb]


def test_classes_have_all_their_arguments(made, cli):
    for page, (_, _, classes) in made.cli_pages.CLASSES.items():
        for kind in classes:
            taken = jsonargparse.ArgumentParser().add_class_arguments(kind, fail_untyped=False)
            assert {*taken} <= shown(cli[page], kind.__name__)
    public = {name for name in callbacks.__all__ if name[0].isupper()}
    assert {kind.__name__ for kind in made.cli_pages.CLASSES["callbacks"][2]} == public


def test_every_recipe_has_a_page_with_its_header_file_and_size(of_recipes):
    assert {*of_recipes} == {*recipes.names(), "index"}
    for name in recipes.names():
        page, recipe = of_recipes[name], read(name)
        assert recipes.find(name).read_text().rstrip() in page
        assert header(name)[0] in page and f"[{name}]({name}.md)" in of_recipes["index"]
        for sign in ("device", "measured" if "Result:" in " ".join(header(name)) else "not run in full"):
            assert f"| {sign} | " in page, (name, sign)
        if "network" in recipe["model"]["init_args"]:
            assert f"| parameters | {parameter_count(network_of(recipe)):,} |" in page
        assert "| parameters | " in page or "pretrained" in recipe["model"]["init_args"]


def test_pages_are_written_once_and_stale_ones_go(made, tmp_path, monkeypatch):
    monkeypatch.setattr(made, "MAKERS", {"reference/cli": lambda: {"fit": "# fit"}})
    (tmp_path / "reference" / "cli").mkdir(parents=True)
    stale, page = tmp_path / "reference" / "cli" / "gone.md", tmp_path / "reference" / "cli" / "fit.md"
    stale.write_text("# gone")
    made.write(tmp_path)
    assert page.read_text() == "# fit" and not stale.exists()
    page.touch()
    before = page.stat().st_mtime_ns
    made.write(tmp_path)
    assert page.stat().st_mtime_ns == before


def test_public_names_are_documented_from_their_docstrings():
    import lightning_igpt

    shown = re.findall(r"^\.\. auto(?:class|function|data):: ([\w.]+)", PAGES["docs/reference/api.md"], re.MULTILINE)
    assert {name.rpartition(".")[2] for name in shown} >= {*lightning_igpt.__all__[1:]}
    assert {name.rpartition(".")[2] for name in shown} >= {name for name in callbacks.__all__ if name[0].isupper()}
