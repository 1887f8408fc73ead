"""What every test shares."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Keep colour tables out of the user's cache, and build each once for the whole session."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LIGHTNING_IGPT_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()
