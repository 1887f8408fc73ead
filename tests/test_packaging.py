"""What is released: wheel and sdist as they are built from this tree, types that others see, what workflows may do."""

import ast
import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import lightning_igpt

ROOT = Path(__file__).parents[1]
VERSION = lightning_igpt.__version__
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/workflows").glob("*.yml")}


def build(source, out):
    """(wheel, sdist) of a tree, made without network."""
    targets = ["-t", "wheel", "-t", "sdist"]
    subprocess.run([sys.executable, "-m", "hatchling", "build", *targets, "-d", str(out)], cwd=source, check=True)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def files_below(folder):
    return {
        path.relative_to(folder.parent).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(ROOT, tmp_path_factory.mktemp("dist"))


def test_the_wheel_holds_package_recipes_and_licences_and_nothing_else(built):
    expected = files_below(ROOT / "lightning_igpt")
    expected |= {f"lightning_igpt/{name}": text for name, text in files_below(ROOT / "recipes").items()}
    wheel = contents(built[0])
    info = {name: text for name, text in wheel.items() if name.startswith(f"lightning_igpt-{VERSION}.dist-info/")}
    assert {name: text for name, text in wheel.items() if name not in info} == expected
    assert {"lightning_igpt/py.typed", "lightning_igpt/assets/emoji_data.parquet"} < set(expected)
    licences = {name.partition("/licenses/")[2]: text for name, text in info.items() if "/licenses/" in name}
    names = ("LICENSE", *(f"lightning_igpt/assets/LICENSE.{name}.md" for name in ("emoji_data", "openai")))
    assert licences == {name: (ROOT / name).read_bytes() for name in names}


def test_the_sdist_makes_the_very_same_wheel(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.3 and older have none
        archive.extractall(tmp_path)
    source = tmp_path / f"lightning_igpt-{VERSION}"
    assert contents(build(source, tmp_path / "dist")[0]) == contents(built[0])
    for name in ("README.md", "CHANGELOG.md", "CITATION.cff", "tests/conftest.py", ".github/workflows/tests.yml"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes(), name
    assert not [path for path in source.rglob("*") if path.suffix in {".ckpt", ".pyc"}]


def test_the_dependencies_are_what_is_imported(built):
    """But for what Lightning, jsonargparse and FastAPI import for us."""
    wheel = contents(built[0])
    told = email.message_from_bytes(wheel[f"lightning_igpt-{VERSION}.dist-info/METADATA"])
    declared = {
        re.match(r"[\w-]+", requirement)[0]
        for requirement in told.get_all("Requires-Dist")
        if not re.search("extra == '(test|docs)'", requirement)
    }
    trees = [ast.parse(path.read_bytes()) for path in (ROOT / "lightning_igpt").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    imported = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"lightning_igpt"}
    renamed = {"PIL": "pillow", "sklearn": "scikit-learn"}
    imported = {renamed.get(name, name).replace("_", "-") for name in imported}
    assert imported == {name.replace("_", "-") for name in declared} - {
        "shtab",
        "starlette",
        "tensorboard",
        "torch-fidelity",
    }


def test_type_checkers_see_every_public_name():
    """The imports under TYPE_CHECKING are those made at run time, and the program that mypy reads uses each."""
    tree = ast.parse((ROOT / "lightning_igpt" / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_igpt.")
        for alias in node.names
    }
    assert seen == {name: f"lightning_igpt.{home}.{name}" for name, home in lightning_igpt._HOME_OF.items()}
    program = (ROOT / "tests" / "typing" / "public_api.py").read_text(encoding="utf-8")
    assert set(lightning_igpt.__all__) <= set(re.findall(r"\bigpt\.(\w+)", program))


def commands(name):
    return [step["run"] for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_read_only_and_pins_its_actions(name):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    for job in WORKFLOWS[name]["jobs"].values():
        assert job.get("permissions", {}) in ({}, {"id-token": "write"})
        assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step["uses"]) for step in job["steps"] if "uses" in step)
    expressions = re.findall(r"\$\{\{ *(.*?) *\}\}", " ".join(commands(name)))
    assert all(expression.startswith("matrix.") for expression in expressions), "others' text could become commands"


def test_the_matrix_is_what_the_project_promises():
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    fast = WORKFLOWS["tests"]["jobs"]["fast"]["strategy"]["matrix"]
    assert fast["python"] == promised and f'requires-python = ">={promised[0]}"' in PROJECT
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in promised
