import json

import pytest
import safetensors.torch
import torch
from transformers import ImageGPTConfig as TheirConfig
from transformers import ImageGPTForCausalImageModeling, ImageGPTForImageClassification, ImageGPTImageProcessorPil

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.modules import FineTuneModule
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


def their_model(kind=ImageGPTForCausalImageModeling, biased=False, **shape):
    torch.manual_seed(0)
    theirs = kind(TheirConfig(**{"vocab_size": 21, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4} | shape))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if not name.endswith(".bias") or biased:
                parameter.normal_(std=0.2)
    return theirs.eval()


def write_processor(folder, palette):
    (folder / "preprocessor_config.json").write_text(json.dumps({"clusters": palette.to_list()}))


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [{}, {"n_inner": 40}, {"n_positions": 36, "n_embd": 24, "n_head": 2, "n_layer": 3}])
def test_their_models_round_trip_bit_exactly(tmp_path, palette, biased, shape):
    """transformers -> ours -> transformers, and the same logits on the way."""
    theirs = their_model(biased=biased, **shape)
    theirs.save_pretrained(tmp_path / "theirs")
    write_processor(tmp_path / "theirs", palette)
    loaded = load_pretrained(tmp_path / "theirs")
    assert loaded.config.bias is biased and loaded.config.n_inner == shape.get("n_inner")
    tokens = torch.randint(20, (2, loaded.config.n_positions), generator=torch.manual_seed(1))
    with torch.no_grad():
        expected = theirs(torch.cat([torch.full((2, 1), 20), tokens[:, :-1]], 1)).logits
        difference = (loaded.network.eval()(tokens) - expected).abs().max()
    assert difference <= 1e-5 * expected.abs().max()
    save_pretrained(tmp_path / "ours", loaded.network, loaded.palette)
    again = ImageGPTForCausalImageModeling.from_pretrained(tmp_path / "ours").state_dict()
    assert list(again) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, again[name]), name


def test_a_model_that_transformers_saved_alone(tmp_path, palette, caplog):
    """``model.save_pretrained`` writes no processor, so the folder has no palette."""
    their_model().save_pretrained(tmp_path / "20")
    with pytest.raises(ValueError, match=r"network of 20 colors but no palette.*--palette"):
        load_pretrained(tmp_path / "20")
    assert load_pretrained(tmp_path / "20", palette=palette).palette == palette
    palette.save(tmp_path / "mine.npy")
    module = FineTuneModule(pretrained=str(tmp_path / "20"), palette=str(tmp_path / "mine.npy"), num_classes=3)
    assert module.palette == palette
    with pytest.raises(ValueError, match=r"network of 20 colors but a palette of 16"):
        load_pretrained(tmp_path / "20", palette="gray:16")
    assert not caplog.records
    their_model(vocab_size=513).save_pretrained(tmp_path / "512")
    (tmp_path / "512" / "preprocessor_config.json").write_text('{"do_resize": true}')  # a processor without clusters
    assert load_pretrained(tmp_path / "512").palette == Palette.load("openai")
    assert "assuming OpenAI's" in caplog.text


def test_a_palette_must_be_that_of_the_weights(tmp_path, palette):
    save_pretrained(tmp_path, random_network(), palette)
    assert load_pretrained(tmp_path, palette=palette.to_list()).palette == palette
    with pytest.raises(ValueError, match=rf"uses the palette {palette.sha256[:12]}.*given is .*\(20 colors\)"):
        load_pretrained(tmp_path, palette="gray:20")


@pytest.mark.parametrize("pickled", [False, True])
def test_sharded_folders(tmp_path, palette, pickled):
    theirs = their_model()
    theirs.save_pretrained(tmp_path, max_shard_size="20kB")
    write_processor(tmp_path, palette)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    assert len(set(places.values())) > 1
    if pickled:
        for place in set(places.values()):
            state = safetensors.torch.load_file(tmp_path / place)
            torch.save(state, tmp_path / place.replace(".safetensors", ".bin"))
        places = {name: place.replace(".safetensors", ".bin") for name, place in places.items()}
        index.unlink()
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    assert torch.equal(load_pretrained(tmp_path).network.sos, theirs.transformer.wte.weight[-1])
    name = next(iter(places))
    index.write_text(json.dumps({"weight_map": places | {name: "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="no weight_map that names files in its folder"):
        load_pretrained(tmp_path)
    index.write_text(json.dumps({"weight_map": places | {name: "gone.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        load_pretrained(tmp_path)


def test_a_classifier_with_its_class_names(tmp_path, palette):
    network, names = random_network(), ["a cat", "b", "c"]
    head = torch.randn(3, 32, generator=torch.manual_seed(2))
    save_pretrained(tmp_path, network, palette, head=head, class_names=names, card={"steps": 7})
    theirs, info = ImageGPTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.id2label == dict(enumerate(names)) and theirs.config.label2id["b"] == 1
    tokens = random_tokens()
    with torch.no_grad():
        expected = theirs.eval()(torch.cat([torch.full((2, 1), 20), tokens[:, :-1]], 1)).logits
        torch.testing.assert_close(network.hidden(tokens).mean(1) @ head.T, expected, rtol=1e-5, atol=1e-5)
    loaded = load_pretrained(tmp_path)
    assert torch.equal(loaded.head, head) and loaded.class_names == names and loaded.card.steps == 7
    assert torch.equal(loaded.network.lm_head.weight, network.lm_head.weight)
    save_pretrained(tmp_path, network, palette)  # over it, without a head: nothing of the classifier may stay
    assert load_pretrained(tmp_path).head is None and not (tmp_path / "lm_head.safetensors").exists()


def test_shapes_types_and_values_are_checked(tmp_path, palette):
    save_pretrained(tmp_path, random_network(), palette)
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    name = "transformer.h.1.mlp.c_fc.weight"  # (32, 128)

    def load_with(value):
        safetensors.torch.save_file(state | {name: value}, tmp_path / "model.safetensors")
        return load_pretrained(tmp_path)

    with pytest.raises(ValueError, match=rf"{name} has the shape \(128, 32\); .* needs \(128, 32\) .* not \(32, 128\)"):
        load_with(state[name].T.contiguous())
    with pytest.raises(ValueError, match=rf"{name} is of type torch\.int8"):
        load_with(state[name].to(torch.int8))
    broken = state[name].clone()
    broken[3, 4] = torch.nan
    with pytest.raises(ValueError, match=rf"{name}: 1 of 4096 values are not finite"):
        load_with(broken)
    assert load_with(state[name].bfloat16()).network.wte.weight.dtype == torch.float32


def test_another_palette_in_the_folder_is_noticed(tmp_path, palette):
    save_pretrained(tmp_path, random_network(), palette)
    other = Palette(-palette.colors)
    write_processor(tmp_path, other)
    with pytest.raises(
        ValueError, match=rf"uses the palette {palette.sha256[:12]}, but this one is {other.sha256[:12]}"
    ):
        load_pretrained(tmp_path)
    write_processor(tmp_path, Palette.load("gray:16"))
    with pytest.raises(ValueError, match=r"network of 20 colors but a palette of 16"):
        load_pretrained(tmp_path)
