"""Nothing that torch or Lightning opens with plain pickle is opened before it was looked at."""

import contextlib
import io
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from lightning.fabric.utilities.load import _lazy_load
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lightning_igpt.weights.safety import check_opens_safely, read_index
from tests.payload import Payload, was_run, watched  # noqa: F401

pytestmark = [
    pytest.mark.usefixtures("watched"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
]


def write(folder, extra=None, **values):
    """A sharded checkpoint as Lightning's strategies write it, from one process."""
    optimizer = {"state": {"a": {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.5, "betas": (0.9, 0.95)}]}
    state = {"state_dict": {"a": torch.arange(6.0).view(2, 3)} | values, "optimizer_0": optimizer}
    dcp.save(state, checkpoint_id=folder)
    torch.save({"epoch": 1} if extra is None else extra, folder / "meta.pt")
    return folder


def load(folder):
    """As Lightning's strategies load it."""
    state = {"state_dict": {"a": torch.zeros(2, 3)}, "optimizer_0": {"param_groups": [{"lr": 0.0}]}}
    dcp.load(state, checkpoint_id=folder)
    return state


def change(folder, edit):
    """Change the list of tensors."""
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(edit(metadata) or metadata))


def put(folder, name, content):
    """Put a value of its own file into a sharded checkpoint."""
    (folder / "more.distcp").write_bytes(content)

    def edit(metadata):
        index = next(index for index in metadata.storage_data if index.fqn == name)
        place = metadata.storage_data[index]
        place.relative_path, place.offset, place.length = "more.distcp", 0, len(content)

    change(folder, edit)


def saved(value, **options):
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def append_archive(path):
    """Append what torch saves of a payload, with places in it that count from the start of the whole file."""
    with zipfile.ZipFile(io.BytesIO(saved({"state_dict": Payload()}))) as source, zipfile.ZipFile(path, "a") as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    return path.stat().st_size


LR = "optimizer_0.param_groups.0.lr"


class TestFolders:
    def test_what_torch_writes_is_taken(self, tmp_path):
        dtypes = (torch.float64, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.uint16, torch.bool)
        values = {str(dtype): torch.zeros(2).to(dtype) for dtype in dtypes}
        folder = write(tmp_path / "x.ckpt", words="text", nested=[{"b": torch.ones(1)}, None, 1], **values)
        check_opens_safely(folder)
        check_opens_safely(str(folder))
        entries = {entry.name: entry for entry in read_index(folder)}
        assert set(entries) == set(pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata)
        assert entries["state_dict.a"].is_tensor and not entries[LR].is_tensor
        assert load(folder)["optimizer_0"]["param_groups"][0]["lr"] == 0.5

    def test_a_member_of_an_enum_as_python_3_11_0_wrote_it_is_taken(self, tmp_path, monkeypatch):
        folder = write(tmp_path / "x.ckpt")
        kind = type(dcp.metadata._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT)
        monkeypatch.setattr(kind, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self._name_)))
        change(folder, lambda metadata: None)
        assert b"getattr" in (folder / ".metadata").read_bytes()
        check_opens_safely(folder)

    def test_a_payload_in_the_list_of_tensors(self, tmp_path):
        folder = write(tmp_path / "x.ckpt")
        change(folder, lambda metadata: setattr(metadata, "planner_data", Payload()))
        with pytest.raises(ValueError, match=r"x\.ckpt/\.metadata .* could run code: it names io\.open"):
            check_opens_safely(folder)
        assert not was_run()
        load(folder)
        assert was_run()  # which is why

    def test_a_payload_among_the_values_of_a_shard(self, tmp_path):
        folder = write(tmp_path / "x.ckpt")
        put(folder, LR, saved(Payload()))
        with pytest.raises(ValueError, match=rf"more\.distcp cannot be opened .* {re.escape(LR)} in it holds Python"):
            check_opens_safely(folder)
        assert not was_run()
        load(folder)
        assert was_run()

    def test_a_payload_behind_two_names_that_are_not_the_same(self, tmp_path):
        """To a reader that takes a path for a text, the value would be a tensor, which torch reads safely."""
        folder = write(tmp_path / "x.ckpt")
        put(folder, LR, saved(Payload()))

        def edit(metadata):
            kinds = metadata.state_dict_metadata
            kinds[Path(LR)] = next(kind for kind in kinds.values() if isinstance(kind, TensorStorageMetadata))

        change(folder, edit)
        with pytest.raises(ValueError, match="holds Python objects"):
            check_opens_safely(folder)
        load(folder)
        assert was_run()

    def test_a_payload_in_the_list_that_torch_falls_back_to(self, tmp_path):
        folder = write(tmp_path / "x.ckpt")
        (folder / "__0.metadata").write_bytes(pickle.dumps(Payload()))
        with pytest.raises(ValueError, match=r"holds __0\.metadata"):
            check_opens_safely(folder)
        change(folder, lambda metadata: setattr(metadata, "storage_meta", "no such thing"))
        with pytest.raises(CheckpointException):  # the payload gives no list of tensors
            load(folder)
        assert was_run()
        (folder / "__0.metadata").unlink()
        with pytest.raises(ValueError, match="in the place of Origin is a str"):
            check_opens_safely(folder)

    def test_a_payload_in_the_other_state(self, tmp_path):
        folder = write(tmp_path / "x.ckpt", extra={"epoch": Payload()})
        with pytest.raises(ValueError, match=r"meta\.pt cannot be opened with weights_only=True"):
            check_opens_safely(folder)

    @pytest.mark.parametrize(
        "pickled",
        [
            b"\x80\x04ctorch.distributed.checkpoint.filesystem\nos.system\n(X\x05\x00\x00\x00touch\x85R.",
            b"\x80\x04ctorch\nfloat32.__class__\n.",
            b"\x80\x04ctorch\nload\n.",
            b"\x80\x04cos\nsystem\n.",
            b"\x80\x02c__builtin__\neval\n(X\x01\x00\x00\x001tR.",
            # getattr(Metadata, "__init__"), the start of the way to __globals__
            b"\x80\x04cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\nMetadata\nX\x08\x00\x00\x00__init__tR.",
            b"\x80\x04cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING\n"
            b"X\x0b\x00\x00\x00__members__tR.",
            # state for a class and for a function, which would change them for the whole process
            b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\nN}X\x05\x00\x00\x00wrongK\x01s\x86b.",
            b"\x80\x02ctorch.serialization\n_get_layout\n}X\x05\x00\x00\x00wrongK\x01sb.",
            b"\x80\x02cpathlib\nPosixPath\nN}X\x05\x00\x00\x00wrongK\x01s\x86b.",
            b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}X\x0c\x00\x00\x00__setstate__K\x01sb.",
            b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81N}X\x05\x00\x00\x00wrongK\x01s\x86b.",
            b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n(K\x01tR.",
            b"\x80\x02ctorch\nSize\n(](X\x01\x00\x00\x00ae\x85R.",
            b"",
            b"\x80\x04",
            b"\x80\x04N.",
        ],
    )
    def test_crafted_lists_change_and_call_nothing(self, tmp_path, pickled):
        folder = write(tmp_path / "x.ckpt")
        (folder / ".metadata").write_bytes(pickled)
        with pytest.raises(ValueError, match=r"\.metadata is damaged, or could run code"):
            check_opens_safely(folder)
        assert not any(hasattr(thing, "wrong") for thing in (Metadata, torch.serialization._get_layout, Path()))

    @pytest.mark.parametrize(
        ("field", "value", "message"),
        [
            ("relative_path", "../x.ckpt/__0_0.distcp", "leads out of its folder"),
            ("relative_path", "/etc/passwd", "leads out of its folder"),
            ("relative_path", "..", "holds no .."),
            ("relative_path", 5, "in the place of a name is a int"),
            ("offset", -1, "a size is -1"),
            ("length", 10**9, "is cut short"),
            ("length", "all", "a size is 'all'"),
            ("transform_descriptors", ["stream.zstd/1"], "compressed"),
        ],
    )
    def test_places_stay_in_the_folder(self, tmp_path, field, value, message):
        folder = write(tmp_path / "x.ckpt")
        change(folder, lambda metadata: setattr(next(iter(metadata.storage_data.values())), field, value))
        with pytest.raises(ValueError, match=message):
            check_opens_safely(folder)

    @pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
    def test_missing_and_short_files_are_named(self, tmp_path, name):
        folder = write(tmp_path / "x.ckpt")
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=re.escape(name)):
            check_opens_safely(folder)
        (folder / name).unlink()
        with pytest.raises(ValueError, match=f"no whole sharded checkpoint: it holds no {re.escape(name)}"):
            check_opens_safely(folder)

    def test_other_folders_say_what_was_expected(self, tmp_path):
        with pytest.raises(ValueError, match=r"no \.metadata and no meta\.pt.* FSDPStrategy or ModelParallelStrategy"):
            check_opens_safely(tmp_path)
        (tmp_path / "version_0").mkdir()
        torch.save({}, tmp_path / "version_0" / "step=4.ckpt")
        with pytest.raises(ValueError, match=r"a folder that holds some; name one, such as .*step=4\.ckpt, .*--resume"):
            check_opens_safely(tmp_path)


class TestFiles:
    def test_plain_values_are_taken(self, tmp_path):
        for name, options in (("new.ckpt", {}), ("old.ckpt", {"_use_new_zipfile_serialization": False})):
            torch.save({"a": torch.ones(2), "b": [1, "x", None]}, tmp_path / name, **options)
            check_opens_safely(tmp_path / name)

    @pytest.mark.parametrize("new", [True, False])
    def test_payloads_are_refused(self, tmp_path, new):
        torch.save({"a": Payload()}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=new)
        with pytest.raises(ValueError, match=r"x\.ckpt cannot be opened with weights_only=True: it holds Python"):
            check_opens_safely(tmp_path / "x.ckpt")

    @pytest.mark.parametrize("start", ["pickle", "safetensors"])
    def test_a_second_archive_behind_a_harmless_file_is_refused(self, tmp_path, start):
        """torch.load decides by the first bytes or the name, FSDPStrategy's reader by the last bytes."""
        path = tmp_path / ("x.ckpt" if start == "pickle" else "x.safetensors")
        if start == "pickle":
            path.write_bytes(saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False))
        else:  # the archive is the last tensor
            size = append_archive(tmp_path / "archive")
            path.write_bytes(safetensors.torch.save({"a": torch.zeros(size, dtype=torch.uint8)})[:-size])
        append_archive(path)
        with contextlib.nullcontext() if start == "pickle" else contextlib.suppress(pickle.UnpicklingError):
            torch.load(path, weights_only=True)  # torch 2.10 takes a .safetensors file for a pickle, and refuses it
        with pytest.raises(ValueError, match=r"two files in one|holds weights alone"):
            check_opens_safely(path)
        assert not was_run()
        _lazy_load(path)
        assert was_run()

    def test_missing_files_are_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"x\.ckpt"):
            check_opens_safely(tmp_path / "x.ckpt")

    @pytest.mark.parametrize(
        "address",
        [
            "http://127.0.0.1/x.ckpt",
            "HTTPS://127.0.0.1/x.ckpt",
            "ftp://127.0.0.1/x.ckpt",
            "simplecache::https://127.0.0.1/x.ckpt",
            Path("https://127.0.0.1/x.ckpt"),
        ],
    )
    def test_addresses_are_refused(self, address):
        with pytest.raises(ValueError, match="not fetched from addresses; download the file and name its path"):
            check_opens_safely(address)

    def test_object_stores_are_left_to_the_loader(self, tmp_path):
        check_opens_safely("s3://bucket/x.ckpt")
        (tmp_path / "s3:" / "bucket").mkdir(parents=True)  # what FSDPStrategy takes that address for
        torch.save(Payload(), tmp_path / "s3:" / "bucket" / "x.ckpt")
        with pytest.raises(ValueError, match="holds Python objects"):
            check_opens_safely("s3://bucket/x.ckpt")


def test_copies_are_as_good(tmp_path):
    folder = write(tmp_path / "x.ckpt")
    check_opens_safely(shutil.copytree(folder, tmp_path / "y.ckpt"))
