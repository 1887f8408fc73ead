"""What every format has in common: round trips, no code runs, damage is named, nothing is allocated on a promise."""

import json
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.palette import Palette
from lightning_igpt.weights import load_pretrained, native, save_pretrained
from lightning_igpt.weights.huggingface import to_state_dict
from lightning_igpt.weights.safety import check_intact
from tests.networks import random_network
from tests.payload import Payload, watched  # noqa: F401

FORMATS = ["folder", "pickled", "checkpoint", "native"]
PALETTE = Palette.load("gray:20")


def write(kind, folder, network, palette=PALETTE):
    """The network in one of the formats; gives what load_pretrained takes and the file with the weights."""
    folder.mkdir(parents=True)
    if kind in ("folder", "pickled"):
        save_pretrained(folder, network, palette)
    if kind == "folder":
        return folder, folder / "model.safetensors"
    if kind == "pickled":
        (folder / "model.safetensors").unlink()
        torch.save(to_state_dict(network), folder / "pytorch_model.bin")
        return folder, folder / "pytorch_model.bin"
    path = folder / {"checkpoint": "x.ckpt", "native": "x.safetensors"}[kind]
    if kind == "native":
        native.save_file(path, network, palette)
    else:
        state = {f"network.{name}": value for name, value in network.state_dict().items()}
        moments = [{name: value.clone() for name, value in state.items()} for _ in range(2)]
        stamp = {"class": "PretrainModule", "network": network.config.to_dict(), "palette_sha256": palette.sha256}
        content = {"state_dict": state | {"palette_colors": palette.colors}, "lightning_igpt": stamp}
        torch.save(content | {"optimizer_states": moments}, path)
    return path, path


def assert_equal(mine, other):
    for (name, value), loaded in zip(mine.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, loaded), name


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_network(tmp_path, kind):
    network = random_network()
    loaded = load_pretrained(write(kind, tmp_path / kind, network)[0])
    assert loaded.config == network.config and loaded.palette == PALETTE
    assert_equal(network, loaded.network)
    smallest = random_network(ImageGPTConfig(n_layer=1, n_head=1, n_embd=1, vocab_size=2, image_size=1))
    source, _ = write(kind, tmp_path / "smallest", smallest, Palette.load("gray:2"))  # strides of any kind
    assert_equal(smallest, load_pretrained(source).network)


def test_equal_networks_give_equal_bytes(tmp_path):
    for number in range(8):
        for kind in ("folder", "native"):
            _, path = write(kind, tmp_path / f"{kind}{number}", random_network())
            assert path.read_bytes() == (tmp_path / f"{kind}0" / path.name).read_bytes()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("damage", ["empty", "cut", "text", "payload"])
def test_damage_and_payloads_end_in_an_error_that_names_the_file(watched, tmp_path, kind, damage):  # noqa: F811
    source, path = write(kind, tmp_path / kind, random_network())
    content = path.read_bytes()
    if damage == "payload":
        torch.save({"state_dict": Payload(), "lightning_igpt": {}, "transformer.wte.weight": Payload()}, path)
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"<html>not found</html>"}[damage])
    with pytest.raises(ValueError, match=re.escape(path.name)):
        load_pretrained(source)


def test_pickled_files_of_any_kind(tmp_path):
    """Of torch before 1.6, without checksums, and with tensors that are parts of one storage."""
    network = random_network()
    folder, path = write("pickled", tmp_path / "x", network)
    state = to_state_dict(network)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    assert_equal(network, load_pretrained(folder).network)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    check_intact(path)
    assert_equal(network, load_pretrained(folder).network)
    parts = torch.cat([value.flatten() for value in state.values()]).split([v.numel() for v in state.values()])
    torch.save({name: part.view(state[name].shape) for name, part in zip(state, parts, strict=True)}, path)
    assert_equal(network, load_pretrained(folder).network)


def test_a_damaged_config_is_named(tmp_path):
    save_pretrained(tmp_path, random_network(), PALETTE)
    good = json.loads((tmp_path / "config.json").read_text())
    for content, message in [
        ("{", r"config\.json is no valid JSON"),
        ("[]", r"config\.json holds no JSON object"),
        ("[" * 200_000, r"config\.json is no valid JSON"),
        (json.dumps(good | {"n_layer": "3"}), "n_layer is '3'"),
        (json.dumps(good | {"n_positions": 17}), "n_positions 17 is no square"),
        (json.dumps(good | {"n_head": 5}), "n_embd 32 is not divisible by n_head 5"),
        (json.dumps(good | {"n_layer": 10**8}), "n_layer is 100000000"),
        (json.dumps(good | {"n_embd": 10**9, "n_head": 1}), "n_embd is 1000000000"),
        (json.dumps(good | {"n_inner": 64.0}), r"n_inner is 64\.0"),
        (json.dumps(good | {"lightning_igpt": {"objective": "bart"}}), "objective is 'bart'"),
        (json.dumps(good | {"lightning_igpt": {"palette_sha256": 3}}), "uses the palette 3"),
    ]:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["native", "folder"])
def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, kind):
    source, path = write(kind, tmp_path / kind, random_network())
    before = path.read_bytes()

    def full(tensors, target, **options):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        (save_pretrained if kind == "folder" else native.save_file)(source, random_network(seed=1), PALETTE)
    assert path.read_bytes() == before
    assert [one for one in path.parent.iterdir() if one.name.startswith(".")] == []


def test_files_are_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").touch()
    for kind in ("folder", "native"):
        _, path = write(kind, tmp_path / kind, random_network())
        assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("other", ["run/x.ckpt", "README.md", "config.json"])
def test_other_things_are_not_overwritten(tmp_path, other):
    (tmp_path / other).parent.mkdir(exist_ok=True)
    (tmp_path / other).write_text("{}")
    with pytest.raises(FileExistsError, match=r"write into another"):
        save_pretrained(tmp_path, random_network(), PALETTE)
    assert (tmp_path / other).read_text() == "{}" and not (tmp_path / "model.safetensors").exists()


def test_a_native_file_keeps_its_header_and_one_by_another_program_is_refused(tmp_path):
    native.save_file(tmp_path / "x.safetensors", random_network(), PALETTE, torch.ones(2, 32), ["é", 'a"b\\'], {})
    assert load_pretrained(tmp_path / "x.safetensors").class_names == ["é", 'a"b\\']
    _, path = write("folder", tmp_path / "x", random_network())
    safetensors.torch.save_file({}, tmp_path / "deep.safetensors", {"lightning_igpt": "[" * 100_000})
    for foreign in (path, tmp_path / "deep.safetensors"):
        with pytest.raises(ValueError, match="for transformers' files, name the folder"):
            load_pretrained(foreign)


@pytest.mark.parametrize("part", ["palette_colors", "network.wte.weight", "head.weight"])
def test_tensors_larger_than_their_file(tmp_path, part):
    """A stride of 0 makes a tensor of any size out of one number."""
    _, path = write("checkpoint", tmp_path / "x", random_network())
    content = torch.load(path, weights_only=True)
    shape = {"palette_colors": (10**9, 3), "network.wte.weight": (10**6, 10**6), "head.weight": (10**9, 32)}[part]
    content["state_dict"][part] = torch.zeros(1).expand(shape)
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"x\.ckpt: {part} .* is larger than what is stored of it"):
        load_pretrained(path)
