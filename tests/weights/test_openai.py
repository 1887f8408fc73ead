import sys
import types

import numpy as np
import pytest
import torch

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.palette import Palette
from lightning_igpt.weights import load_pretrained, openai
from tests.networks import SMALL, SMALL_BERT, random_network
from tests.test_model import GOLDEN


def variables_of(kind):
    arrays = np.load(GOLDEN / f"openai_tf_{kind}.npz", allow_pickle=False)
    found = {
        f"model/{name[7:]}": arrays[name] for name in arrays if name.startswith("weight:") and "_power" not in name
    }
    slots = {"model/wte/Adam": arrays["weight:wte"], "model/h0/mlp/c_fc/w/adam_m": np.ones(3, np.float32)}
    return arrays, found | slots | {"beta1_power": np.ones(()), "global_step": np.ones((), np.int64)}


def check(loaded, arrays, kind):
    """Against logits that OpenAI's own code computed."""
    assert loaded.config.objective == ("autoregressive" if kind == "ar" else "bert")
    assert (loaded.config.n_layer, loaded.config.n_head, loaded.config.n_embd) == (2, 3, 24)
    assert loaded.palette.spec == "openai"
    tokens = torch.from_numpy(arrays["tokens"])
    masked = torch.from_numpy(arrays["keep_uniform"]) <= 0.15 if kind == "bert" else None
    logits = loaded.network(tokens, masked=masked).detach()
    np.testing.assert_allclose(logits, arrays["gen_logits"], rtol=0, atol=1e-5 * np.abs(arrays["gen_logits"]).max())


@pytest.mark.parametrize("kind", ["ar", "bert"])
def test_checkpoints_through_the_readers_interface(tmp_path, monkeypatch, kind):
    """A stand-in serves the golden arrays, so that this runs without TensorFlow."""
    arrays, variables = variables_of(kind)
    reader = types.SimpleNamespace(
        get_variable_to_shape_map=lambda: {name: list(value.shape) for name, value in variables.items()},
        get_tensor=variables.__getitem__,
    )
    train = types.SimpleNamespace(load_checkpoint=lambda prefix: reader)
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(train=train))
    (tmp_path / "model.ckpt-1000000.index").touch()
    check(load_pretrained(tmp_path / "model.ckpt-1000000"), arrays, kind)
    del variables["model/ln_f/g"]
    variables["model/h0/attn/bias"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"(?s)- ln_f/g.*\+ h0/attn/bias"):
        load_pretrained(tmp_path / "model.ckpt-1000000")


@pytest.mark.parametrize("kind", ["ar", "bert"])
def test_real_checkpoints_in_shards(tmp_path, kind):
    tf = pytest.importorskip("tensorflow")
    arrays, variables = variables_of(kind)
    names, shards = sorted(variables), [f"{tmp_path}/part{number}" for number in range(3)]
    for number, shard in enumerate(shards):
        mine = names[number::3]
        tf.raw_ops.SaveV2(
            prefix=shard, tensor_names=mine, shape_and_slices=[""] * len(mine), tensors=[variables[n] for n in mine]
        )
    prefix = tmp_path / "model.ckpt-1000000"
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=shards, destination_prefix=str(prefix))
    assert len(list(tmp_path.glob("*.data-*-of-00003"))) == 3
    check(load_pretrained(prefix), arrays, kind)
    next(tmp_path.glob("*.data-00001-of-00003")).unlink()
    with pytest.raises(ValueError, match="data files is missing"):
        load_pretrained(prefix)


def test_without_tensorflow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (tmp_path / "model.ckpt-1.index").touch()
    with pytest.raises(ModuleNotFoundError, match=r"lightning-igpt\[openai\]"):
        load_pretrained(tmp_path / "model.ckpt-1")


@pytest.mark.parametrize("config", [SMALL, SMALL_BERT, ImageGPTConfig(2, 2, 16, 20, 4, n_inner=24)])
def test_archives_round_trip_bit_exactly(tmp_path, config):
    network, palette = random_network(config), Palette(torch.rand(20, 3, generator=torch.manual_seed(0)))
    openai.save_archive(tmp_path / "x.npz", network, palette)
    loaded = load_pretrained(tmp_path / "x.npz")
    assert loaded.config == config and loaded.palette == palette
    for (name, mine), other in zip(network.state_dict().items(), loaded.network.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name


@pytest.mark.parametrize("kind", ["ar", "bert"])
def test_archives_hold_openais_variables(tmp_path, kind):
    """What was read from OpenAI's names is written under the same names with the same values."""
    arrays, variables = variables_of(kind)
    wanted = {name: value for name, value in variables.items() if name.startswith("model/") and "dam" not in name}
    np.savez(tmp_path / "a.npz", **wanted)
    loaded = load_pretrained(tmp_path / "a.npz")
    check(loaded, arrays, kind)
    openai.save_archive(tmp_path / "b.npz", loaded.network, loaded.palette)
    with np.load(tmp_path / "b.npz", allow_pickle=False) as again:
        assert set(again.files) == {*wanted, "kmeans_centers"}
        for name, value in wanted.items():
            np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_archives_that_do_not_fit_are_refused(tmp_path):
    biased = random_network(ImageGPTConfig(2, 2, 16, 20, 4, bias=True))
    with pytest.raises(ValueError, match="no place for biases"):
        openai.save_archive(tmp_path / "x.npz", biased, Palette.load("gray:20"))
    np.savez(tmp_path / "other.npz", **{"model/wte": np.zeros((3, 3), np.float32)})
    with pytest.raises(ValueError, match="is no Image GPT checkpoint"):
        load_pretrained(tmp_path / "other.npz")
    openai.save_archive(tmp_path / "y.npz", random_network(), Palette.load("gray:20"))
    with np.load(tmp_path / "y.npz") as file:
        np.savez(tmp_path / "y.npz", **(dict(file) | {"kmeans_centers": Palette.load("gray:16").colors.numpy()}))
    with pytest.raises(ValueError, match=r"network of 20 colors but a palette of 16"):
        load_pretrained(tmp_path / "y.npz")
