"""A checkpoint is a whole file of tensors and plain values on this machine."""

from pathlib import Path

import pytest
import torch

from lightning_igpt.weights.safety import check_intact, check_local, read_torch
from tests.payload import Payload, watched  # noqa: F401

pytestmark = pytest.mark.usefixtures("watched")


@pytest.mark.parametrize("mmap", [True, False])
@pytest.mark.parametrize("new", [True, False])
def test_plain_values_are_read_and_payloads_refused(tmp_path, new, mmap):
    path, values = tmp_path / "x.ckpt", {"a": torch.ones(2), "b": [1, "x", None]}
    torch.save(values, path, _use_new_zipfile_serialization=new)
    assert str(read_torch(path, mmap=mmap)) == str(values)
    torch.save({"a": Payload()}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"x\.ckpt cannot be opened with weights_only=True: it holds Python"):
        read_torch(path, mmap=mmap)


def test_damage_is_noticed_after_an_intact_file_of_the_same_name(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"a": torch.ones(10_000)}, path)
    check_intact(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.ckpt is damaged: .* differs from its checksum; use another copy"):
        check_intact(path)
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match=r"x\.ckpt is damaged or incomplete"):
        check_intact(path)


def test_folders_and_weights_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder; name a checkpoint in it"):
        check_local(tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(ValueError, match=r"list of tensors is a pickle .*save_distributed_checkpoint=False"):
        check_local(tmp_path)
    with pytest.raises(ValueError, match=r"holds weights alone.*pretrained="):
        check_local(tmp_path / "x.safetensors")


ADDRESSES = ["http://127.0.0.1/x", "HTTPS://127.0.0.1/x", "ftp://a/x", "simplecache::https://a/x", Path("https://a/x")]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_are_refused(address):
    with pytest.raises(ValueError, match="not fetched from URLs; download the file and name its path"):
        check_local(address)
