import json

import pytest
import torch
from transformers import ImageGPTConfig as TheirConfig
from transformers import ImageGPTForCausalImageModeling, ImageGPTImageProcessorPil

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.palette import Palette
from lightning_igpt.weights import load_pretrained, save_pretrained
from tests.networks import SMALL, SMALL_BERT, random_network, random_tokens


@pytest.fixture
def palette():
    return Palette(torch.rand(20, 3, generator=torch.manual_seed(0)) * 2 - 1)


def test_transformers_loads_what_we_save(tmp_path, palette):
    network = random_network()
    save_pretrained(tmp_path, network, palette)
    theirs, info = ImageGPTForCausalImageModeling.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = random_tokens()
    with torch.no_grad():
        expected = theirs.eval()(torch.cat([torch.full((2, 1), 20), tokens[:, :-1]], 1)).logits
        torch.testing.assert_close(network(tokens), expected, rtol=1e-5, atol=1e-5)
    processor = ImageGPTImageProcessorPil.from_pretrained(tmp_path)
    images = torch.randint(256, (3, 3, 4, 4), dtype=torch.uint8, generator=torch.manual_seed(1))
    found = torch.as_tensor(
        processor(list(images.numpy()), return_tensors="pt", input_data_format="channels_first").input_ids
    )
    assert torch.equal(found.view(3, -1), palette.quantize(images))


@pytest.mark.parametrize(
    "config",
    [SMALL, SMALL_BERT, ImageGPTConfig(2, 2, 16, 20, 4, n_inner=24), ImageGPTConfig(2, 2, 16, 20, 4, bias=True)],
)
def test_round_trip_is_bit_exact(tmp_path, palette, config):
    network = random_network(config)
    save_pretrained(tmp_path, network, palette)
    loaded = load_pretrained(tmp_path)
    assert loaded.config == config and loaded.palette == palette
    for (name, mine), other in zip(network.state_dict().items(), loaded.network.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name


def test_their_folder_with_a_pickled_file_loads_safely(tmp_path, palette):
    torch.manual_seed(0)
    config = TheirConfig(vocab_size=21, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    theirs = ImageGPTForCausalImageModeling(config)
    config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"clusters": palette.to_list()}))
    old = {f"transformer.h.{i}.attn.{name}": torch.ones(1) for i in range(2) for name in ("bias", "masked_bias")}
    torch.save(theirs.state_dict() | old, tmp_path / "pytorch_model.bin")  # the hub's files still hold the masks
    loaded = load_pretrained(tmp_path)
    assert loaded.config == ImageGPTConfig(2, 4, 32, 20, 4)
    assert torch.equal(loaded.network.sos, theirs.transformer.wte.weight[-1])


class Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_a_payload_in_a_pickled_file_is_not_executed(tmp_path, palette, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pretrained(tmp_path, random_network(), palette)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"transformer.wte.weight": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_wrong_folders_say_so(tmp_path, palette):
    save_pretrained(tmp_path / "a", random_network(), palette)
    config = json.loads((tmp_path / "a" / "config.json").read_text())

    def with_config(**changes):
        (tmp_path / "a" / "config.json").write_text(json.dumps(config | changes))
        return tmp_path / "a"

    with pytest.raises(ValueError, match="model_type 'gpt2'"):
        load_pretrained(with_config(model_type="gpt2"))
    with pytest.raises(ValueError, match="reorder_and_upcast_attn"):
        load_pretrained(with_config(reorder_and_upcast_attn=True))
    with pytest.raises(ValueError, match=r"layer_norm_epsilon 0\.1"):
        load_pretrained(with_config(layer_norm_epsilon=0.1))
    with pytest.raises(ValueError, match="activation_function"):
        load_pretrained(with_config(activation_function="gelu"))
    with pytest.raises(ValueError, match=r"(?s)missing \(-\) or unexpected \(\+\).*- transformer.h.3.*"):
        load_pretrained(with_config(n_layer=4))
    with pytest.raises(ValueError, match="palette has 16 colours, the network 20"):
        save_pretrained(tmp_path / "b", random_network(), Palette.load("gray:16"))
    (tmp_path / "a" / "preprocessor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        load_pretrained(with_config())
