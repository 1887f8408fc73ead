"""What the tests of benchmarks share."""

import pytest

from lightning_igpt.benchmarks import harness


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """A small product and copy stand for the machine's limits."""
    monkeypatch.setitem(harness.MATRIX, "cpu", 64)
    monkeypatch.setitem(harness.COPIED_BYTES, "cpu", 2**16)
