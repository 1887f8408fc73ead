"""Checksums: what a file of ours lost is noticed, what others wrote without any is taken. Promises of headers."""

import io
import json
import pickle
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.palette import Palette
from lightning_igpt.weights import load_pretrained, native, openai, save_pretrained
from lightning_igpt.weights.files import TorchFile
from lightning_igpt.weights.huggingface import to_state_dict
from lightning_igpt.weights.intact import check_intact
from lightning_igpt.weights.sealed import SUMS
from tests.networks import SMALL_BERT, random_network
from tests.weights.test_files import FORMATS, write

PALETTE = Palette.load("gray:20")


def flip(path, at, bit=0):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def place_of(path, tensor):
    """Where the values of a tensor lie in a file."""
    return path.read_bytes().index(tensor.detach().numpy().tobytes())


def rezipped(source, target, compression=zipfile.ZIP_STORED, changes=None):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, (changes or {}).get(name, old.read(name)))


@pytest.mark.parametrize("kind", FORMATS)
def test_one_flipped_bit_of_a_weight_is_noticed(tmp_path, kind):
    network = random_network()
    source, path = write(kind, tmp_path / kind, network, PALETTE)
    flip(path, place_of(path, network.h[1].ln_2.weight) + 2)
    with pytest.raises(ValueError, match=rf"{path.name}.*( differs from its checksum|Bad CRC-32)"):
        load_pretrained(source)


def test_what_is_not_loaded_is_not_compared_but_by_check_intact(tmp_path):
    network = random_network()
    _, path = write("checkpoint", tmp_path / "x", network, PALETTE)
    values = network.h[1].ln_2.weight.detach().numpy().tobytes()
    check_intact(path)
    flip(path, path.read_bytes().rindex(values) + 2)  # in the state of the optimiser
    assert torch.equal(load_pretrained(path).network.h[1].ln_2.weight, network.h[1].ln_2.weight)
    with pytest.raises(ValueError, match=rf"{path.name} cannot be opened: .*Bad CRC-32.*copy or download it again"):
        check_intact(path)


def test_a_damaged_stamp_does_not_choose_the_best_checkpoint(tmp_path, caplog):
    for step in (1, 2):
        _, path = write("checkpoint", tmp_path / str(step), random_network(), PALETTE)
    flip(path, path.read_bytes().index(b"PretrainModule"))
    assert "1/x.ckpt" in load_pretrained(tmp_path).origin and "2/x.ckpt is passed over" in caplog.text


def test_files_without_checksums_are_taken(tmp_path):
    network = random_network()
    state = to_state_dict(network)
    save_pretrained(tmp_path, network, PALETTE)
    safetensors.torch.save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_pretrained(tmp_path).network.sos, network.sos)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=False)  # as torch before 1.6 did
    assert torch.equal(load_pretrained(tmp_path).network.sos, network.sos)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, path)
    finally:
        torch.serialization.set_crc32_options(True)
    check_intact(path)
    assert torch.equal(load_pretrained(tmp_path).network.sos, network.sos)


def test_tensors_that_are_parts_of_one_storage_are_taken(tmp_path):
    network = random_network()
    save_pretrained(tmp_path, network, PALETTE)
    (tmp_path / "model.safetensors").unlink()
    state = to_state_dict(network)
    flat = torch.cat([value.flatten() for value in state.values()])
    parts = flat.split([value.numel() for value in state.values()])
    views = {name: part.view(value.shape) for (name, value), part in zip(state.items(), parts, strict=True)}
    torch.save(views, tmp_path / "pytorch_model.bin")
    loaded = load_pretrained(tmp_path).network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())


def test_values_in_the_other_byte_order_are_compared_too(tmp_path):
    state = {"a": torch.arange(5.0)}
    torch.save(state, tmp_path / "little.bin")
    other = {"little": "big", "big": "little"}[sys.byteorder]
    values = state["a"].numpy().byteswap().tobytes()
    rezipped(
        tmp_path / "little.bin",
        tmp_path / "big.bin",
        changes={"little/byteorder": other.encode(), "little/data/0": values},
    )
    assert torch.equal(TorchFile(tmp_path / "big.bin").read(["a"])["a"], state["a"])
    flip(tmp_path / "big.bin", (tmp_path / "big.bin").read_bytes().index(values) + 5)
    with pytest.raises(ValueError, match="Bad CRC-32"):
        TorchFile(tmp_path / "big.bin")


def test_equal_networks_give_equal_bytes(tmp_path):
    for number in range(8):  # safetensors itself shuffles the metadata
        for kind in ("folder", "native"):
            _, path = write(kind, tmp_path / f"{kind}{number}", random_network(), PALETTE)
            assert path.read_bytes() == next(tmp_path.glob(f"{kind}0/*.safetensors")).read_bytes()


def metadata_of(path):
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("kind", ["folder", "native"])
def test_a_header_that_lost_its_checksums_is_damaged(tmp_path, kind):
    source, path = write(kind, tmp_path / kind, random_network(), PALETTE)
    tensors, metadata = safetensors.torch.load_file(path), metadata_of(path)
    sums = json.loads(metadata.pop(SUMS))
    some = next(iter(tensors))
    for changed in (
        {},
        {SUMS: "[]"},
        {SUMS: "{"},
        {SUMS: json.dumps(sums | {"more": 1})},
        {SUMS: json.dumps({name: value for name, value in sums.items() if name != some})},
    ):
        safetensors.torch.save_file(tensors, path, metadata=metadata | changed)
        with pytest.raises(ValueError, match=rf"{path.name} is damaged.*: its header (differs|has none)"):
            load_pretrained(source)
    safetensors.torch.save_file(tensors, path, metadata=metadata | {SUMS: json.dumps(sums | {some: 1})})
    with pytest.raises(ValueError, match=rf"{some} in it differs from its checksum"):
        load_pretrained(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_head": 2}, "config.json has n_head 2, but model.safetensors was written with 4"),
        ({"lightning_igpt": {}}, "config.json has objective 'autoregressive', but .* was written with 'bert'"),
        ({"n_inner": 128}, "config.json has n_inner 128, but .* was written with None"),
    ],
)
def test_a_config_that_names_another_network_is_noticed(tmp_path, changes, message):
    """Shapes would not tell: the files would load, and every logit be another one."""
    network = random_network(SMALL_BERT)
    save_pretrained(tmp_path, network, PALETTE)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_what_users_may_edit_in_a_folder_they_may(tmp_path):
    save_pretrained(tmp_path, random_network(), PALETTE, head=torch.ones(2, 32), class_names=["a", "b"])
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"id2label": {"0": "cat", "1": "dog"}, "label2id": {"cat": 0, "dog": 1}, "resid_pdrop": 0.5}
    config["lightning_igpt"]["card"] = {"steps": 9, "measured_at": float("inf")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "README.md").write_text("mine")
    loaded = load_pretrained(tmp_path)
    assert loaded.class_names == ["cat", "dog"] and loaded.card.steps == 9


# Promises: nothing may be allocated that a file only claims to hold


@pytest.fixture
def little_memory():
    """No more than 400 MB above what the process has."""
    resource = pytest.importorskip("resource", reason="memory is limited through POSIX")
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("the size of the process is read from Linux's /proc")
    size = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmSize"))
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + 400_000_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def npy(shape, content=b"", dtype="<f4"):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + content


def safetensors_file(header):
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content


PALETTES = {
    "huge.npy": npy((10**12, 3)),
    "overflow.npy": npy((10**20, 3)),
    "negative.npy": npy((-5, 3), bytes(100)),
    "nested.npy": b"\x93NUMPY\x01\x00" + struct.pack("<H", 5000) + b"(" * 5000,
    "objects.npy": npy((2, 3), bytes(48), "|O"),
    "complex.npy": npy((2, 3), bytes(48), "<c8"),
    "large.npy": npy((10**6, 3), bytes(12 * 10**6)),
    "archive.npy": b"PK\x03\x04" + bytes(100),
    "deep.json": b"[" * 1_000_000,
    "long.json": b'{"clusters": [' + b"[0,0,0]," * 1_200_000 + b"[0,0,1]]}",
    "digits.json": b'{"clusters": [[' + b"9" * 6000 + b",0,0],[0,0,1]]}",
    "infinite.json": b'{"clusters": [[1e999,0,0],[0,0,1]]}',
    "far.json": json.dumps({"clusters": [[10**400, 0, 0], [0, 0, 1]]}).encode(),
    "text.json": b'{"clusters": "abc"}',
    "mapping.json": b'{"clusters": {"a": [0, 0, 1]}}',
    "binary.json": bytes(range(256)),
}


@pytest.mark.parametrize("name", PALETTES)
def test_palettes_that_promise_too_much(tmp_path, little_memory, name):
    (tmp_path / name).write_bytes(PALETTES[name])
    with pytest.raises(ValueError, match=name):
        Palette.load(tmp_path / name)


WEIGHTS = {
    "length.safetensors": struct.pack("<Q", 10**18) + b"{}",
    "shape.safetensors": safetensors_file(
        {"wte.weight": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    ),
    "overflow.safetensors": safetensors_file(
        {"wte.weight": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 0]}}
    ),
    "deep.safetensors": safetensors_file(b"[" * 100_000),
    "metadata.safetensors": safetensors_file({"__metadata__": {"lightning_igpt": "[" * 100_000}}),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_safetensors_that_promise_too_much(tmp_path, little_memory, name):
    (tmp_path / name).write_bytes(WEIGHTS[name])
    with pytest.raises(ValueError, match=name):
        load_pretrained(tmp_path / name)


def test_archives_that_promise_too_much(tmp_path, little_memory):
    network, good, bad = random_network(), tmp_path / "good.npz", tmp_path / "bad.npz"
    openai.save_archive(good, network, PALETTE)
    name = "model/h0/attn/q_proj.npy"
    for content in (npy((10**6, 10**6)), npy((10**20,)), npy((4, 8, 32), bytes(5000)), npy((4, 8, 32), bytes(100))):
        rezipped(good, bad, changes={name: content})
        with pytest.raises(ValueError, match=r"bad\.npz .* its header promises"):
            load_pretrained(bad)
    bomb = npy((4, 8, 10**7), bytes(1)) + bytes(50_000_000)
    rezipped(good, bad, zipfile.ZIP_DEFLATED, changes={name: bomb})
    assert bad.stat().st_size < 300_000
    with pytest.raises(ValueError, match=r"bad\.npz .* is compressed"):
        load_pretrained(bad)
    rezipped(good, bad, changes={"model/wpe.npy": b"text"})
    with pytest.raises(ValueError, match=r"bad\.npz cannot be opened"):
        load_pretrained(bad)


def test_zips_whose_entries_overlap_or_are_compressed(tmp_path, little_memory):
    _, path = write("checkpoint", tmp_path / "x", random_network(), PALETTE)
    rezipped(path, tmp_path / "compressed.ckpt", zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match=r"compressed\.ckpt .* is compressed"):
        load_pretrained(tmp_path / "compressed.ckpt")
    content = path.read_bytes()
    end = content.rindex(b"PK\x01\x02")  # the last entry of the directory claims to hold the whole file
    claim = struct.pack("<II", len(content), len(content))
    (tmp_path / "overlap.ckpt").write_bytes(content[: end + 20] + claim + content[end + 28 :])
    for check in (load_pretrained, check_intact):
        with pytest.raises(ValueError, match=r"overlap\.ckpt cannot be opened: .*its entries overlap"):
            check(tmp_path / "overlap.ckpt")


@pytest.mark.parametrize("part", ["palette_colors", "network.wte.weight", "head.weight"])
def test_tensors_larger_than_their_file(tmp_path, little_memory, part):
    """A stride of 0 makes a tensor of any size out of one number."""
    _, path = write("checkpoint", tmp_path / "x", random_network(), PALETTE)
    content = torch.load(path, weights_only=True)
    shape = {"palette_colors": (10**9, 3), "network.wte.weight": (10**6, 10**6), "head.weight": (10**9, 32)}[part]
    content["state_dict"][part] = torch.zeros(1).expand(shape)
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        load_pretrained(path)


def test_biases_larger_than_their_file(tmp_path, little_memory):
    save_pretrained(tmp_path, random_network(), PALETTE)
    state = to_state_dict(random_network()) | {"transformer.h.0.mlp.c_fc.bias": torch.zeros(1).expand(10**12)}
    (tmp_path / "model.safetensors").unlink()
    for zipped in (True, False):
        torch.save(state, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"pytorch_model\.bin holds 4 bytes for a tensor of the shape"):
            load_pretrained(tmp_path)


def test_tensors_without_values(tmp_path):
    save_pretrained(tmp_path, random_network(), PALETTE)
    (tmp_path / "model.safetensors").unlink()
    state, name = to_state_dict(random_network()), "transformer.h.0.mlp.c_fc.weight"
    for value in (state[name].to_sparse(), state[name].to("meta")):
        torch.save(state | {name: value}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin holds a tensor without plain values"):
            load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_layer": 10**9},
        {"n_embd": 10**9, "n_head": 1},
        {"n_embd": 65_536},
        {"n_inner": 1_000_000},
        {"n_positions": 1024**2},
        {"n_positions": 10**400},
        {"vocab_size": 10**9},
        {"n_head": 10**9},
    ],
)
def test_configs_that_promise_too_much(tmp_path, little_memory, changes):
    """Beside weights by others, which do not say what they were written with."""
    network = random_network()
    save_pretrained(tmp_path, network, PALETTE)
    safetensors.torch.save_file(to_state_dict(network), tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ValueError, match=r"config\.json|needs \(.* after conversion"):
        load_pretrained(tmp_path)


def test_json_of_any_size(tmp_path, little_memory):
    save_pretrained(tmp_path, random_network(), PALETTE)
    for content in (b"[" * 1_000_000, b" " * 9_000_000, b'{"n_layer": ' + b"9" * 10_000 + b"}", b"\xff\xfe{}"):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.json is no valid JSON"):
            load_pretrained(tmp_path)


def test_a_pickle_of_a_large_storage(tmp_path, little_memory):
    """torch before 1.6: the sizes stand in the pickle, the bytes behind it."""
    save_pretrained(tmp_path, random_network(), PALETTE)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(3)}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    content = (tmp_path / "pytorch_model.bin").read_bytes()
    small = pickle.dumps(3, protocol=2)[2:-1]
    assert content.count(b"cpuq") == 1
    at = content.index(b"cpuq") + content[content.index(b"cpuq") :].index(small)
    (tmp_path / "pytorch_model.bin").write_bytes(content[:at] + b"J\xff\xff\xff\x7f" + content[at + len(small) :])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be opened"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_smallest_network(tmp_path, kind):
    """Tensors of one value have strides of any kind."""
    network = random_network(ImageGPTConfig(n_layer=1, n_head=1, n_embd=1, vocab_size=2, image_size=1))
    source, _ = write(kind, tmp_path / kind, network, Palette.load("gray:2"))
    loaded = load_pretrained(source).network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in network.state_dict().items())


def test_native_files_keep_their_header(tmp_path):
    native.save_file(tmp_path / "x.safetensors", random_network(), PALETTE, torch.ones(2, 32), ["é", 'a"b\\'], {})
    loaded = load_pretrained(tmp_path / "x.safetensors")
    assert loaded.class_names == ["é", 'a"b\\'] and loaded.palette == PALETTE
