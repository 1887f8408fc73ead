"""Every snippet of README and documentation runs.

A page runs from top to bottom in its own folder, see ``workplace.py``: Python in one namespace, commands in this
process, the heavy ones at toy size. Pages with heavy commands run in the slow tests; the fast tests parse the commands.
"""

import os
import warnings

import datasets
import pytest

from tests.docs import pages, workplace
from tests.docs.pages import PAGES, ROOT, blocks
from tests.docs.running import LANGUAGES, Page, heavy

RUN = ("bash", "python", "yaml")
PYTHON_ALONE = ("README.md",)  # its Python does not read what its commands write


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Datasets and weights under hub ids."""
    folder = tmp_path_factory.mktemp("hub")
    workplace.weights(folder / "weights")
    return workplace.on_the_hub(folder)


@pytest.fixture
def page_of(tmp_path, tmp_path_factory, monkeypatch, hub):
    """Makes a page that runs in a folder with images, without a network."""
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


@pytest.mark.parametrize(
    "page", [page for page in PAGES if {b.language for b in blocks(page)} & {*RUN} and not heavy(page)]
)
def test_page_runs(page, page_of):
    page_of(page).run(*RUN)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if heavy(page) and page not in PYTHON_ALONE])
def test_heavy_page_runs(page, page_of):
    page_of(page).run(*RUN)


@pytest.mark.parametrize("page", PYTHON_ALONE)
def test_python_runs_alone(page, page_of):
    page_of(page).run("python")


@pytest.mark.slow
@pytest.mark.parametrize("page", PYTHON_ALONE)
def test_commands_run_alone(page, page_of):
    page_of(page).run("bash", "yaml")


@pytest.mark.parametrize("page", [page for page in PAGES if heavy(page)])
def test_heavy_commands_parse(page, page_of):
    page_of(page).parse()


def test_the_examples_of_the_api_reference_run(page_of):
    exec((ROOT / "docs" / "_ext" / "examples.py").read_text(encoding="utf-8"), {})


@pytest.mark.parametrize("page", PAGES)
def test_every_block_names_a_known_language(page):
    assert {block.language for block in blocks(page)} <= {*LANGUAGES}


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nlightning-igpt recipes show no\n```\n",
        "```bash\nlightning-igpt fit --config digits_tiny_pretrain --model.no 1 --print_config\n```\n",
        "```bash\nmake it\n```\n",
        "```bash\npip install numpyy\n```\n",
        "```python\nassert False\n```\n",
        "```yaml\nmodel: {class_path: No}\n```\n",
    ],
)
def test_a_wrong_snippet_fails(text, page_of, monkeypatch):
    monkeypatch.setitem(pages.PAGES, "page.md", text)
    with pytest.raises(AssertionError):
        page_of("page.md").run(*RUN)
