"""The notebooks run from top to bottom, and their outputs belong to their code."""

import nbformat
import pytest
from PIL import Image

from tests.notebooks import DIGEST, ROOT, digest, execute

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
TOY = {  # changes for a run of seconds on a folder
    "complete-your-photos": "photos, steps = 'photos', 2",
    "probe-layers": "source = 'labelled'",
}


def pictures(notebook):
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_belong_to_this_code(path):
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.get(DIGEST) == digest(notebook), f"run: python -m tests.notebooks {path.relative_to(ROOT)}"
    assert pictures(notebook) > 0 and path.stat().st_size < 150_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_on_a_folder(path, tmp_path):
    for number in range(24):
        image = Image.effect_noise((24, 20), 60 + number).convert("RGB")
        for place in ("photos", "labelled/train", "labelled/test"):
            folder = tmp_path / place / ("cat", "dog")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number}.png")
    ran = execute(path, tmp_path, changes=TOY[path.stem])
    assert pictures(ran) == pictures(nbformat.read(path, as_version=4))
