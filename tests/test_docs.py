"""What README and documentation say holds: their Python runs, their commands parse, their tables and numbers agree.

Python blocks run page by page, each page in one namespace and in a folder of its own that holds ``photos/`` and
``snapshots/``.
"""

import re
import shlex
import types
import warnings
from pathlib import Path

import jsonargparse
import pytest
import yaml
from PIL import Image

import lightning_igpt
from lightning_igpt.__main__ import LIGHTNING_VERBS, OWN_VERBS, main
from lightning_igpt.commands import recipes
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.planning import parameter_count
from lightning_igpt.weights import save_pretrained
from tests.test_layers import FLOORS

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    if "_build" not in path.parts
}
DEMO, TEST = "pip install . && lightning-igpt quickstart", 'pip install -e ".[test]" && pytest -n auto'


def blocks(page, language):
    """(line number, text) of every fenced block in a language."""
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", PAGES[page], re.MULTILINE | re.DOTALL):
        yield PAGES[page].count("\n", 0, found.start(1)), found[1]


def commands(page):
    lines = [line for _, text in blocks(page, "bash") for line in text.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("lightning-igpt ")]


def table(page, first_cell):
    """The cells of a page's table rows whose first cell matches."""
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGES[page].splitlines() if line[:1] == "|"
    ]
    return [row for row in rows if re.fullmatch(first_cell, row[0])]


class Uploads:
    """In place of huggingface_hub's HfApi: takes what it is given and asks nobody."""

    def __init__(self, **options):
        pass

    def create_repo(self, *args, **options):
        pass

    def upload_folder(self, *, folder_path, **options):
        assert (Path(folder_path) / "model.safetensors").exists()
        return types.SimpleNamespace(commit_url="https://huggingface.co/me/cats/commit/0")


@pytest.fixture
def workplace(tmp_path, monkeypatch, tmp_path_factory):
    """A folder with labelled ``photos``, ``snapshots`` of every kind, a stand-in for the hub, and nobody to warn."""
    hub = tmp_path_factory.mktemp("hub")
    save_pretrained(hub, ImageGPT(ImageGPTConfig(2, 2, 16, 512, 8)), Palette.load("openai"))
    monkeypatch.setattr("huggingface_hub.HfApi", Uploads)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(hub))
    monkeypatch.chdir(tmp_path)
    for number in range(32):
        path = Path("photos", ("cat", "dog")[number % 2], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((24, 20), 60 + number).convert("RGB").save(path)
    Path("snapshots").mkdir()
    for number, mode in enumerate(["RGB", "L", "RGBA", "I;16", "P", "CMYK"] * 5):
        image = Image.effect_noise((40 + 7 * number, 90 - 2 * number), 60)
        image.convert(mode).save(f"snapshots/{number}.{'jpg' if mode == 'CMYK' else 'png'}")
    Path("snapshots", "broken.jpg").write_bytes(b"<html>404</html>")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if list(blocks(page, "python"))])
def test_python_runs(page, workplace):
    namespace = {"__name__": "__main__"}
    for line, text in blocks(page, "python"):
        exec(compile("\n" * line + text, page, "exec"), namespace)  # errors then name the page's own lines


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_commands_parse(page, workplace, monkeypatch):
    def parse_only(function, *, args, **options):
        jsonargparse.auto_parser(function, **options).parse_args(args)

    for words in commands(page):
        with monkeypatch.context() as patch:
            if words[0] in LIGHTNING_VERBS:
                with pytest.raises(SystemExit) as stop:
                    main(words if "--print_config" in words else [*words, "--print_config"])
                assert stop.value.code == 0, words
                continue
            if words[0] != "recipes":  # those run: a later line may use the copy that an earlier one made
                patch.setattr(jsonargparse, "auto_cli", parse_only)
            assert main(words) == 0, words


@pytest.mark.parametrize("page", PAGES)
def test_inline_commands_exist(page):
    for verb in re.findall(r"`lightning-igpt ([\w-]+)", PAGES[page]):
        assert verb in {*LIGHTNING_VERBS, *OWN_VERBS} or verb.startswith("--")


def test_the_two_commands_are_the_readmes_and_ci_runs_the_same():
    assert {DEMO, TEST} <= {line for _, text in blocks("README.md", "bash") for line in text.splitlines()}
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
        assert target.startswith("https://") or (ROOT / page).parent.joinpath(target).exists(), target


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
