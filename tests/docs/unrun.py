"""What pages show and tests do not run: why, and what is checked in its stead."""

import re
from pathlib import Path

from tests.docs.pages import ROOT

PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def installable(command, environments):
    assert command.words[1] == "install", "only pip install is understood"
    extras = re.search(r"^\[project\.optional-dependencies\]\n(.*?)^\[", PROJECT, re.MULTILINE | re.DOTALL)[1]
    for word in command.words[2:]:
        if word.startswith("-"):
            continue
        name, _, wanted = word.rstrip("]").partition("[")
        local = name in (".", "lightning-igpt") or name.endswith((".whl", ".tar.gz"))
        assert local or name in TOOLS or f'"{re.split("[=<>]", name)[0]}' in PROJECT, (
            f"{name} is nothing that this project installs"
        )
        for extra in filter(None, wanted.split(",")):
            assert re.search(rf"^{extra} = \[", extras, re.MULTILINE), f"pyproject.toml has no extra {extra}"


def has_events(command, environments):
    folder = command.words[command.words.index("--logdir") + 1]
    assert list(Path(folder).rglob("events.out.tfevents*")), f"nothing in {folder} is for TensorBoard"


def configured(command, environments):
    tool = command.words[0].partition("-")[0]
    sections = {"pytest": "tool.pytest", "ruff": "tool.ruff", "mypy": "tool.mypy", "sphinx": "docs = ["}
    assert sections[tool] in PROJECT, f"pyproject.toml says nothing of {tool}"


def in_the_checkout(*names):
    def check(command, environments):
        for name in names:
            assert (ROOT / name).exists(), f"the checkout has no {name}"

    return check


def cloned(command, environments):
    assert command.words[1] == "clone", "only git clone is understood"
    environments.add(Path(command.words[2]).stem)  # cd there changes nothing: this is the checkout's reader


def made_before(command, environments):
    assert Path(command.words[1]).parts[0] in environments, "no line above makes this environment"


def nothing(command, environments):
    pass


TOOLS = ("jupyterlab", "pre-commit")  # which the project has no need of itself

# Programs that are not run: why, and what is checked in their stead.
NOT_RUN = {
    "pip": ("changes the environment that tests run in", installable),
    "git": ("there is no network", cloned),
    "source": ("the environment was not made", made_before),
    "pytest": ("these are the tests", configured),
    "ruff": ("CI runs it", configured),
    "mypy": ("CI runs it", configured),
    "sphinx": ("CI runs it", configured),
    "sphinx-build": ("CI runs it", configured),
    "pre-commit": ("fetches its tools", in_the_checkout(".pre-commit-config.yaml")),
    "build": ("takes an isolated environment; tests/test_package.py builds", in_the_checkout("pyproject.toml")),
    "jupyter": ("serves until it is stopped", in_the_checkout("docs/notebooks")),
    "tensorboard": ("serves until it is stopped", has_events),
}

# Verbs of ours of which only the words are parsed.
PARSED_ONLY = {"demo": "serves until it is stopped; tests/commands/test_demo_browser.py has a browser use it"}
