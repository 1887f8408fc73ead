"""Pages that the documentation's build makes from the code: nothing that the code has is missing on them."""

import re
import sys

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


def option_strings(parser):
    names = {name for action in parser._actions for name in action.option_strings}
    return {name for name in names if not name.endswith(("help", "+")) and name not in ("-h", "--trainer")}


@pytest.mark.parametrize("verb", [*LIGHTNING_VERBS, *OWN_VERBS])
def test_every_verb_and_option_has_its_place(verb, made, cli):
    parts = made.cli_pages.parts_of(made.cli_pages.parser_of(verb))
    parts = {"": parts[verb]} if verb in LIGHTNING_VERBS else parts
    for name, (parser, _) in parts.items():
        wanted, on_page = option_strings(parser), shown(cli[verb], f"{verb} {name}" if name else "")
        if verb in LIGHTNING_VERBS:
            on_page |= shown(cli["trainer"])
        assert wanted <= on_page, (name, wanted - on_page)
    assert "Not documented" not in cli[verb]
    assert {"--dry_run", "--trust"} <= shown(cli[verb]) or verb not in LIGHTNING_VERBS


def test_classes_have_all_their_arguments(made, cli):
    for page, (_, _, classes) in made.cli_pages.CLASSES.items():
        for kind in classes:
            for option in made.cli_pages.class_options(kind):
                assert {name.removeprefix("--") for name in option.names} <= shown(cli[page], kind.__name__)
    public = {name for name in callbacks.__all__ if name[0].isupper()}
    assert {kind.__name__ for kind in made.cli_pages.CLASSES["callbacks"][2]} == public


def test_types_and_defaults_are_for_readers(made, cli):
    plain = made.cli_pages.plain_type
    assert plain("Optional[Literal['autoregressive', 'bert']]") == "autoregressive | bert"
    assert plain("Union[bool, Literal['auto']]") == "bool | auto"
    assert plain("list[lightning.Callback] | lightning.Callback | null") == "list of Callback | Callback"
    assert plain("tuple[int, ...]") == "tuple of int, ..."
    for name, page in cli.items():
        assert not re.search(r"Unknown|Untyped|SUPPRESS|class '|:\w+:`|``(?!`)(?<!```)", page.replace("```", "")), name


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
