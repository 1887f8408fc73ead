"""Nothing that Lightning opens with plain pickle is opened before it was looked at."""

from pathlib import Path

import pytest
import torch
from lightning.fabric.utilities.load import _lazy_load

from lightning_igpt.weights.safety import check_opens_safely
from tests.payload import Payload, was_run, watched  # noqa: F401

pytestmark = pytest.mark.usefixtures("watched")


def test_plain_values_are_accepted(tmp_path):
    torch.save({"a": torch.ones(2), "b": [1, "x", None]}, tmp_path / "new.ckpt")
    check_opens_safely(tmp_path / "new.ckpt")
    check_opens_safely(str(tmp_path / "new.ckpt"))


@pytest.mark.parametrize("new", [True, False])
def test_payloads_are_refused(tmp_path, new):
    torch.save({"a": Payload()}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=new)
    with pytest.raises(ValueError, match=r"x\.ckpt cannot be opened with weights_only=True: it holds Python"):
        check_opens_safely(tmp_path / "x.ckpt")


def test_a_second_archive_behind_a_harmless_file_is_refused(tmp_path):
    """torch.load decides by the first bytes, FSDPStrategy's reader by the last."""
    torch.save({"a": torch.ones(2)}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": Payload()}, tmp_path / "archive")
    start = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(start + (tmp_path / "archive").read_bytes())
    torch.load(tmp_path / "x.ckpt", weights_only=True)
    with pytest.raises(ValueError, match=r"x\.ckpt is of torch's format from before 1\.6"):
        check_opens_safely(tmp_path / "x.ckpt")
    assert not was_run()
    (tmp_path / "x.ckpt").write_bytes((tmp_path / "archive").read_bytes())
    _lazy_load(tmp_path / "x.ckpt")
    assert was_run()  # which is why


def test_folders_weights_and_missing_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"x\.ckpt"):
        check_opens_safely(tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="is a folder; name a checkpoint in it"):
        check_opens_safely(tmp_path)
    (tmp_path / ".metadata").touch()
    with pytest.raises(ValueError, match=r"list of tensors is a pickle .*save_distributed_checkpoint=False"):
        check_opens_safely(tmp_path)
    (tmp_path / "x.safetensors").touch()
    with pytest.raises(ValueError, match=r"holds weights alone.*pretrained="):
        check_opens_safely(tmp_path / "x.safetensors")


ADDRESSES = ["http://127.0.0.1/x", "HTTPS://127.0.0.1/x", "ftp://a/x", "simplecache::https://a/x", Path("https://a/x")]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_are_refused(address):
    with pytest.raises(ValueError, match="not fetched from addresses; download the file and name its path"):
        check_opens_safely(address)


def test_object_stores_are_left_to_the_loader(tmp_path):
    check_opens_safely("s3://bucket/x.ckpt")
    (tmp_path / "s3:" / "bucket").mkdir(parents=True)  # what FSDPStrategy reads for that address
    torch.save(Payload(), tmp_path / "s3:" / "bucket" / "x.ckpt")
    with pytest.raises(ValueError, match="holds Python objects"):
        check_opens_safely("s3://bucket/x.ckpt")
