"""Runs the notebooks of the documentation. ``python -m tests.notebooks docs/notebooks/*.ipynb`` renews their outputs.

Outputs carry the digest of the code that they came from, so that a test sees when one was changed without the other.
"""

import hashlib
import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
DIGEST = "outputs_of"  # key of the notebook's metadata


def digest(notebook):
    """SHA-256 of all code."""
    code = "\0".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def execute(path, folder, *, changes=""):
    """The notebook after a run with ``folder`` as current directory, ``changes`` made behind the parameters' cell."""
    notebook = nbformat.read(path, as_version=4)
    marked = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(marked) == 1, f"{path} has {len(marked)} cells with the tag parameters"
    marked[0].source += "\n" + changes
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))})
    return notebook


def main():
    """Run the notebooks as they are and write their outputs into them."""
    for path in map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, folder)
        notebook.metadata.language_info = {"name": "python"}
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            for output in cell.get("outputs", []):
                output.get("data", {}).pop("image/jpeg", None)  # beside the same as PNG
                output.get("data", {}).pop("text/plain", None) if "image/png" in output.get("data", {}) else None
        marked = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        marked[0].source = marked[0].source.rstrip("\n")
        notebook.metadata[DIGEST] = digest(notebook)
        nbformat.write(notebook, path)
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
