"""Laws that hold for every input: large images, configs."""

import json
import math

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.images import to_rgb

law = settings(max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_large_images_are_those_of_their_parts(mode, monkeypatch):
    """They are converted in strips."""
    pixels = np.random.default_rng(0).bytes(97 * 89 * 4)
    image = Image.frombytes(mode, (97, 89), pixels[: len(Image.new(mode, (97, 89)).tobytes())])
    if mode == "P":
        image.putpalette(pixels[:768])
        image.info["transparency"] = pixels[1000:1256]
    whole = to_rgb(image).tobytes()
    monkeypatch.setattr("lightning_igpt.images._STRIP", 97 * 10)
    assert to_rgb(image).tobytes() == whole


FIELDS = list(ImageGPTConfig().to_dict())
plain = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.floats(), st.text(max_size=5), st.sampled_from(["bert", "igpt"]),
    st.integers(10**3, 10**9), st.integers(5000, 9000).map(lambda digits: 10**digits), st.binary(max_size=3),
)  # fmt: skip
anything = st.recursive(plain, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner))
sound = st.fixed_dictionaries({}, optional={
    "n_layer": st.integers(1, 1000), "n_head": st.sampled_from([1, 2, 4]), "n_embd": st.sampled_from([4, 64, 4096]),
    "vocab_size": st.integers(1, 32768), "image_size": st.integers(1, 1024), "n_inner": st.none() | st.integers(1, 999),
    "objective": st.sampled_from(["autoregressive", "bert"]), "bias": st.booleans(), "dropout": st.floats(0, 0.99),
})  # fmt: skip


@settings(law, max_examples=50)
@given(sound, st.dictionaries(st.sampled_from(FIELDS), anything, max_size=3))
@example({}, {"n_inner": "64"})
@example({}, {"dropout": "0.1"})
@example({}, {"dropout": math.nan})
@example({}, {"objective": ["bert"]})
def test_a_config_is_sound_or_names_the_field(good, changes):
    try:
        config = ImageGPTConfig.resolve(good | changes)
    except ValueError as error:
        assert any(name in str(error) for name in changes) or "n_head" in str(error)
        assert len(str(error)) < 500
        return
    again = json.loads(json.dumps(config.to_dict()))
    assert ImageGPTConfig.resolve(again) == config and ImageGPTConfig.resolve(config) is config
    assert config.n_embd % config.n_head == 0 and config.n_positions == config.image_size**2
