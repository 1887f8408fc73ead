"""Workflows, forms and hooks are well-formed, and agree with pyproject.toml and with one another."""

import re
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def jobs(path):
    return read(path)["jobs"]


def commands(path):
    return [step["run"] for job in jobs(path).values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_read_only_and_runs_nothing_that_can_be_moved(path):
    assert read(path)["permissions"] == {"contents": "read"}
    for name, job in jobs(path).items():
        assert job["timeout-minutes"] <= 60, name
        assert job.get("permissions", {}) in ({}, {"id-token": "write"}), name
        for step in job["steps"]:
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step.get("uses", "a/b@" + 40 * "0")), step
            if "checkout" in step.get("uses", ""):
                assert step["with"] == {"persist-credentials": False}
    expressions = re.findall(r"\$\{\{ *(.*?) *\}\}", " ".join(commands(path)))
    assert all(expression.startswith("matrix.") for expression in expressions), "others' text could become commands"


def test_the_matrix_is_what_the_project_promises():
    promised = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PROJECT)
    fast = jobs(ROOT / ".github" / "workflows" / "tests.yml")["fast"]["strategy"]["matrix"]
    assert fast["python"] == promised and fast["resolution"] == ["lowest-direct", "highest"]
    assert f'requires-python = ">={promised[0]}"' in PROJECT
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in promised


def test_workflows_run_what_ci_runs():
    """The commands of .ci/run, but for where the documentation goes."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    ran = "\n".join(commands(ROOT / ".github" / "workflows" / "tests.yml"))
    assert ".ci/lowest" in ran and "pytest -n auto" in (ROOT / ".ci" / "lowest").read_text(encoding="utf-8")
    for command in ("ruff check . && ruff format --check .", "mypy"):
        assert command in ci and command in ran, command
    for pattern in (r'pytest -n 2 -m "[^"]+"', r"sphinx-build .* -b html docs"):
        found = re.search(pattern, ci)
        assert found and found[0] in ran, pattern


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_asks_for_something(path):
    form = read(path)
    assert form["name"] and form["description"] and form["labels"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["type"] in {"input", "textarea", "dropdown", "checkboxes"} for field in fields)
    assert all(field["attributes"]["label"] for field in fields)
    names = [field["id"] for field in fields]
    assert len(set(names)) == len(names) and any(field.get("validations", {}).get("required") for field in fields)


def test_hooks_run_what_is_installed():
    """Versions have one home; nothing is fetched from other repositories."""
    (local,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local"
    assert {hook["language"] for hook in local["hooks"]} == {"system", "pygrep"}
    assert {"ruff", "ruff-format", "mypy"} < {hook["id"] for hook in local["hooks"]}
