"""A pickle that shows whether it was run, for tests of what opens files by strangers."""

from pathlib import Path

import pytest


class Payload:
    """Unpickled, it makes the file ``executed`` in the current folder."""

    def __reduce__(self):
        return (open, ("executed", "w"))


def was_run():
    """Whether a payload was run; forgets it."""
    path = Path("executed")
    found = path.exists()
    path.unlink(missing_ok=True)
    return found


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """Work in a folder of the test's own, in which no payload may have left its trace in the end."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "executed").exists()
