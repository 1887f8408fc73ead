"""The notebooks run from top to bottom, and what they show came from the code beside it."""

from pathlib import Path

import nbformat
import pytest
from PIL import Image

from tests.notebooks import DIGEST, ROOT, digest, execute

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
TOY = {  # what is changed for a run of seconds; own folders stand in for what is embedded
    "complete-your-photos": "photos, image_size, n_colors, steps = 'photos', 8, 8, 2",
    "probe-layers": "source, image_size, palette, steps = 'labelled', 8, 'openai', 2",
}


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == list(TOY)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_there_small_and_of_this_code(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.get(DIGEST) == digest(notebook), f"run: python -m tests.notebooks {path.relative_to(ROOT)}"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run from top to bottom, once"
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert all(output.output_type != "error" for output in outputs(notebook))
    assert path.stat().st_size < 150_000
    texts = " ".join(output.get("text", "") for output in outputs(notebook))
    assert str(Path.home()) not in texts and "site-packages" not in texts


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_on_a_folder_of_ones_own(path, tmp_path):
    for number in range(24):
        image = Image.effect_noise((24, 20), 60 + number).convert("RGB")
        for place in ("photos", "labelled/train", "labelled/test"):
            folder = tmp_path / place / ("cat", "dog")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{number}.png")
    ran = execute(path, tmp_path, changes=TOY[path.stem])
    pictures = [
        sum("image/png" in output.get("data", {}) for output in outputs(one))
        for one in (ran, nbformat.read(path, as_version=4))
    ]
    assert pictures[0] == pictures[1] > 0 and (tmp_path / "runs" / path.stem).is_dir()
