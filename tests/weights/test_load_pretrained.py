import os
import sys
import types

import numpy as np
import pytest
import torch

from lightning_igpt.modules import FineTuneModule, PretrainModule
from lightning_igpt.weights import load_pretrained, openai
from tests.modules.helpers import TINY, loader, quiet_trainer
from tests.test_model import GOLDEN


@pytest.fixture
def checkpoint(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(PretrainModule(TINY, "gray:8"), loader())
    return trainer.checkpoint_callback.best_model_path


def test_a_checkpoint_gives_network_and_palette(checkpoint):
    loaded = load_pretrained(checkpoint)
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert loaded.config == TINY and loaded.palette.spec == "gray:8" and checkpoint in loaded.origin
    for name, value in loaded.network.state_dict().items():
        assert torch.equal(value, state[f"network.{name}"])
    assert all(parameter.requires_grad for parameter in loaded.network.parameters())


def test_the_loaded_network_does_not_hang_on_to_the_file(checkpoint):
    loaded = load_pretrained(checkpoint)
    before = loaded.network.wte.weight.clone()
    with open(checkpoint, "r+b") as file:
        file.write(b"\0" * 100_000)
    assert torch.equal(loaded.network.wte.weight, before)


def test_a_finetuned_checkpoint_gives_its_network(tmp_path):
    module = FineTuneModule(num_classes=3, network=TINY, palette="gray:8")
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader())
    loaded = load_pretrained(trainer.checkpoint_callback.best_model_path)
    assert torch.equal(loaded.network.wte.weight, module.network.wte.weight)


def test_a_run_folder_gives_the_newest(tmp_path, checkpoint):
    older = tmp_path / "older.ckpt"
    older.write_bytes(b"not a checkpoint")
    os.utime(older, (0, 0))
    loaded = load_pretrained(tmp_path)
    assert "newest" in loaded.origin and checkpoint in loaded.origin


class Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_hostile_damaged_and_foreign_files_are_refused(tmp_path, checkpoint, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {}, "lightning_igpt": Payload()}, bad)
    with pytest.raises(ValueError, match=r"bad\.ckpt cannot be opened"):
        load_pretrained(bad)
    assert not (tmp_path / "executed").exists()
    with open(checkpoint, "rb") as file:
        bad.write_bytes(file.read()[:-1000])
    with pytest.raises(ValueError, match=r"bad\.ckpt cannot be opened"):
        load_pretrained(bad)
    torch.save({"state_dict": {}}, bad)
    with pytest.raises(ValueError, match="not written by a lightning_igpt module"):
        load_pretrained(bad)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("https://example.org/model.ckpt", ValueError, "not fetched from addresses"),
        ("nowhere.ckpt", FileNotFoundError, "does not exist"),
        ("runs/nowhere.ckpt", FileNotFoundError, "does not exist"),
    ],
)
def test_wrong_sources_say_so(tmp_path, monkeypatch, source, error, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        load_pretrained(source)


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither config\.json .* nor a \.ckpt"):
        load_pretrained(tmp_path)


def test_an_unreachable_hub_id_says_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="owner/nothing is neither a path here nor a hub repository"):
        load_pretrained("owner/nothing")


@pytest.mark.parametrize("kind", ["ar", "bert"])
def test_openai_checkpoints(tmp_path, monkeypatch, kind):
    """Through the real reader's interface, which a stand-in serves from the golden arrays."""
    arrays = np.load(GOLDEN / f"openai_tf_{kind}.npz", allow_pickle=False)
    variables = {
        f"model/{name[7:]}": arrays[name] for name in arrays if name.startswith("weight:") and "_power" not in name
    }
    variables |= {"model/wte/Adam": arrays["weight:wte"], "beta1_power": np.ones(()), "global_step": np.ones(())}
    reader = types.SimpleNamespace(
        get_variable_to_shape_map=lambda: {name: value.shape for name, value in variables.items()},
        get_tensor=variables.__getitem__,
    )
    train = types.SimpleNamespace(load_checkpoint=lambda prefix: reader)
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(train=train))
    (tmp_path / "model.ckpt-1000000.index").touch()
    loaded = load_pretrained(tmp_path / "model.ckpt-1000000")
    assert loaded.config.objective == ("autoregressive" if kind == "ar" else "bert")
    assert (loaded.config.n_layer, loaded.config.n_head, loaded.config.n_embd) == (2, 3, 24)
    assert loaded.palette.spec == "openai"
    tokens = torch.from_numpy(arrays["tokens"])
    masked = torch.from_numpy(arrays["keep_uniform"]) <= 0.15 if kind == "bert" else None
    np.testing.assert_allclose(
        loaded.network(tokens, masked=masked).detach(), arrays["gen_logits"], rtol=1e-4, atol=1e-5
    )


def test_openai_checkpoints_without_tensorflow_name_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    (tmp_path / "model.ckpt-1.index").touch()
    with pytest.raises(ModuleNotFoundError, match=r"lightning-igpt\[openai\]"):
        load_pretrained(tmp_path / "model.ckpt-1")


def test_variables_of_another_model_are_refused():
    with pytest.raises(ValueError, match="no Image GPT checkpoint"):
        openai.from_variables({"wte": np.zeros((3, 3), np.float32)})


def test_a_changed_palette_or_a_missing_part_is_noticed(tmp_path, checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    bad = tmp_path / "bad.ckpt"
    torch.save({**content, "state_dict": {**content["state_dict"], "palette_colors": torch.rand(8, 3)}}, bad)
    with pytest.raises(ValueError, match=r"damaged: it holds 8 colours with the hash"):
        load_pretrained(bad)
    for part in ("state_dict", "lightning_igpt"):
        torch.save({**content, part: {}}, bad)
        with pytest.raises(ValueError, match=r"bad\.ckpt is damaged: it lacks"):
            load_pretrained(bad)
