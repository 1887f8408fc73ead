"""What every test shares."""

import functools
import gc
import sys

import pytest


def pytest_collection_finish():
    """Leave the million objects of the imports out of every garbage collection, and so out of every fork's copies."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Keep colour tables out of the user's cache, and build each once for the whole session."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LIGHTNING_IGPT_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(autouse=True, scope="session")
def asked_once():
    """Spare the thousand runs of a session what is the same in all of them; together that is a quarter of their time.

    Modules that no test imports stay so: tests of a light unit start in a second.
    """
    constants = {
        "lightning.fabric.utilities.registry": ("entry_points", functools.cache),  # of every installed package
        "lightning_igpt.data.locations": ("load_digits", once),  # 1,797 PNG files
        "inspect": ("stack", lambda stack: functools.partial(stack, 0)),  # jsonargparse needs no lines of source code
    }
    with pytest.MonkeyPatch.context() as patch:
        for module, (name, replacement) in constants.items():
            if module in sys.modules:
                patch.setattr(f"{module}.{name}", replacement(getattr(sys.modules[module], name)))
        yield


def once(load):
    """A function that returns new mappings of the same data sets."""
    loaded = functools.cache(load)
    return lambda: type(loaded())(loaded())
