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


def test_resolve_takes_names_mappings_and_configs():
    config = ImageGPTConfig(n_layer=2, n_head=2, n_embd=8)
    assert ImageGPTConfig.resolve(config) is config
    assert ImageGPTConfig.resolve("igpt_l").n_embd == 1536
    assert ImageGPTConfig.resolve(config.to_dict()) == config


def test_resolve_names_what_exists():
    with pytest.raises(ValueError, match=r"no preset 'igpt_small'.*igpt_tiny, igpt_s"):
        ImageGPTConfig.resolve("igpt_small")
    with pytest.raises(ValueError, match=r"'widht'.*n_embd"):
        ImageGPTConfig.resolve({"widht": 3})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_embd": 10, "n_head": 4}, "n_embd 10 is not divisible by n_head 4"),
        ({"n_layer": 0}, "n_layer is 0"),
        ({"n_layer": "2"}, "whole number from 1 to"),
        ({"image_size": 8.5}, "whole number from 1 to"),
        ({"objective": "diffusion"}, "'autoregressive' or 'bert'"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"n_inner": 0}, "n_inner is 0"),
    ],
)
def test_wrong_shapes_say_so(wrong, message):
    with pytest.raises(ValueError, match=message):
        ImageGPTConfig(**wrong)
