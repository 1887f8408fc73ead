import datasets
import huggingface_hub.constants
import pytest


@pytest.fixture(scope="session", autouse=True)
def _quiet_and_offline(tmp_path_factory):
    """Caches go to a temporary folder, and nothing asks the hub."""
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("hf")
        patch.setattr(datasets.config, "HF_CACHE_HOME", str(cache))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache / "datasets")
        patch.setattr(datasets.config, "HF_MODULES_CACHE", str(cache / "modules"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield
