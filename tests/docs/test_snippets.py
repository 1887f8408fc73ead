"""Every snippet of README and documentation runs.

A page runs from top to bottom in a folder of its own, see ``workplace.py``: Python in one namespace, commands in this
process, the heavy ones at toy size. Pages with heavy commands do so among the slow tests; here these are parsed.
"""

import os
import warnings

import datasets
import pytest

from tests.docs import workplace
from tests.docs.pages import PAGES, blocks
from tests.docs.running import LANGUAGES, Page
from tests.docs.shell import commands

PYTHON_ALONE = {"README.md"}  # its Python reads nothing that its commands write, and is tried with every change


def heavy(page):
    return [command for block in blocks(page, "bash", "console") for command in commands(block) if command.heavy]


def run_by_parts(page):
    return page in PYTHON_ALONE and heavy(page)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What is found under hub ids: data sets, and weights."""
    folder = tmp_path_factory.mktemp("hub")
    workplace.weights(folder / "weights")
    return workplace.on_the_hub(folder)


@pytest.fixture
def page_of(tmp_path, tmp_path_factory, monkeypatch, hub):
    """Makes a page that is to run in a folder with images, without a network and with nobody to warn."""
    monkeypatch.setattr("huggingface_hub.HfApi", workplace.Uploads)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(hub / "weights"))
    monkeypatch.setattr(datasets, "load_dataset", workplace.opener(datasets.load_dataset, hub))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub / "cache")
    monkeypatch.chdir(tmp_path)
    workplace.images(tmp_path)
    before = dict(os.environ)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield lambda name: Page(name, tmp_path_factory.mktemp("toys"))
    os.environ.clear()
    os.environ.update(before)


def kinds(page):
    return {block.language for block in blocks(page)} - {"text", "bibtex"}


@pytest.mark.parametrize("page", [page for page in PAGES if kinds(page) and not heavy(page)])
def test_page_runs(page, page_of):
    page_of(page).run()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if heavy(page) and not run_by_parts(page)])
def test_heavy_page_runs(page, page_of):
    page_of(page).run()


@pytest.mark.parametrize("page", [page for page in PAGES if run_by_parts(page)])
def test_python_runs_alone(page, page_of):
    page_of(page).run("python")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if run_by_parts(page)])
def test_commands_run_alone(page, page_of):
    page_of(page).run(*(language for language in LANGUAGES if language != "python"))


@pytest.mark.parametrize("page", [page for page in PAGES if heavy(page)])
def test_heavy_commands_parse(page, page_of):
    page_of(page).parse()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_known_kind(page):
    assert {block.language for block in blocks(page)} <= set(LANGUAGES)
