"""Workflows and hooks agree with pyproject.toml and .ci/run."""

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/workflows").glob("*.yml")}


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


def test_workflows_run_what_ci_runs():
    ci, ran = (ROOT / ".ci" / "run").read_text(encoding="utf-8"), "\n".join(commands("tests"))
    for pattern in (
        "ruff check .*format --check .",
        r"\bmypy\b",
        r'pytest -n 2 -m "[^"]+"',
        "sphinx-build .* -b html docs",
    ):
        assert re.search(pattern, ci)[0] in ran, pattern


def test_hooks_run_what_is_installed():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert local["repo"] == "local"
    assert {"ruff", "ruff-format", "mypy"} < {hook["id"] for hook in local["hooks"]}
