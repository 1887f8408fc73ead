import sys
import types

import numpy as np
import pytest
import torch

from lightning_igpt.weights import load_pretrained
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
    with pytest.raises(ValueError, match=r"model\.ckpt-1000000 is damaged or no Image GPT: .*data-00001-of-00003"):
        load_pretrained(prefix)
