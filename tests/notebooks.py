"""Runs the notebooks of the documentation. ``python -m tests.notebooks docs/notebooks/*.ipynb`` updates their outputs.

A notebook stores the digest of the code that made its outputs, so that a test notices a change of the code alone.
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
    """The notebook after a run in ``folder``, with ``changes`` appended to the cell tagged parameters."""
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    source = parameters.source
    parameters.source += f"\n{changes}"
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    client = NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}})
    client.execute(env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, places))})
    parameters.source = source
    return notebook


def main():
    """Run the notebooks as they are and write their outputs into them."""
    for path in map(Path, sys.argv[1:]):
        with tempfile.TemporaryDirectory() as folder:
            notebook = execute(path, folder)
        notebook.metadata.language_info = {"name": "python"}
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)
            if "outputs" in cell:  # without log messages
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.get("outputs", []):
                output.get("data", {}).pop("image/jpeg", None)  # a copy of the PNG
                output.get("data", {}).pop("text/plain", None) if "image/png" in output.get("data", {}) else None
        notebook.metadata[DIGEST] = digest(notebook)
        nbformat.write(notebook, path)
        print(path, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
