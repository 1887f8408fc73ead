"""What every test shares."""

import functools
import gc
import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of several processes of tests would wait for each other

if sys.version_info < (3, 11):  # transformers for Python 3.10 ends at 5.20, which cuts the root that scales attention
    import transformers.utils

    transformers.utils.torch_float = float


def pytest_collection_finish():
    """Leave the million objects of the imports out of every garbage collection, and so out of every fork's copies."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep the tests of a file in one process, which then trains once the network that they share."""
    if config.getvalue("dist") != "load":  # somebody asked for another
        return None
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


def pytest_addoption(parser):
    parser.addoption(
        "--bfloat16",
        action="store_true",
        help="report a CPU that multiplies bfloat16 (AMX, AVX512-BF16) to every test; default: one that does not",
    )


@pytest.fixture(autouse=True, scope="session")
def same_processor_everywhere(request):
    """Report the same CPU to all tests of a session, so that no verdict depends on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:
            report_bfloat16(patch, request.config.getoption("bfloat16"))
        yield


@pytest.fixture(params=[False, True], ids=["no bfloat16", "bfloat16"])
def bfloat16(request, monkeypatch):
    """Run a test on both kinds of CPU: whether it is reported to multiply bfloat16."""
    report_bfloat16(monkeypatch, request.param)
    return request.param


def report_bfloat16(patch, present):
    for instructions in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        patch.setattr(f"torch.cpu.{instructions}", lambda: present)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Keep what is cached out of the user's folder, and build each colour table once for all processes of a session."""
    folder = tmp_path_factory.getbasetemp()
    shared = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "palettes"
    shared.mkdir(exist_ok=True)
    own = tmp_path_factory.mktemp("cache")
    (own / "palettes").symlink_to(shared, target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_IGPT_CACHE", str(own))
        yield


@pytest.fixture(autouse=True, scope="session")
def asked_once():
    """Spare the thousand runs of a session what is the same in all of them; together that is a quarter of their time.

    Modules that no test imports stay so: tests of a light unit start in a second.
    """
    constants = {
        "lightning.fabric.utilities.registry": ("entry_points", functools.cache),  # of every installed package
        "inspect": ("stack", lambda stack: functools.partial(stack, 0)),  # jsonargparse needs no lines of source code
    }
    with pytest.MonkeyPatch.context() as patch:
        for module, (name, replacement) in constants.items():
            if module in sys.modules:
                patch.setattr(f"{module}.{name}", replacement(getattr(sys.modules[module], name)))
        yield
