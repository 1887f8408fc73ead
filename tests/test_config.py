import dataclasses

import pytest

from lightning_igpt.config import PRESETS, ImageGPTConfig


def test_presets_are_the_papers_and_frozen():
    small = PRESETS["igpt_s"]
    assert small == ImageGPTConfig(n_layer=24, n_head=8, n_embd=512, vocab_size=512, image_size=32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        small.n_layer = 1
    with pytest.raises(TypeError):
        PRESETS["igpt_s"] = small


def test_resolve_names_what_exists():
    with pytest.raises(ValueError, match=r"no preset 'igpt_small'.*igpt_tiny, igpt_s"):
        ImageGPTConfig.resolve("igpt_small")
    with pytest.raises(ValueError, match=r"'widht'.*n_embd"):
        ImageGPTConfig.resolve({"widht": 3})
