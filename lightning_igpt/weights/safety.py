"""Whether a checkpoint opens without running code, told before anything opens it.

Lightning 2.6 leaves some checkpoints to plain pickle, which does whatever a file says, whatever ``weights_only`` says:
a whole file under FSDPStrategy, and of the folders that FSDPStrategy and ModelParallelStrategy write both the file
``.metadata`` and each value in the shards that is no tensor.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lightning_igpt.weights.files import read_torch

INDEX, EXTRA = ".metadata", "meta.pt"  # of a sharded checkpoint: torch's list of tensors; Lightning's other state
ADDRESS = re.compile(r"(^|::)(https?|ftps?|sftp):/", re.IGNORECASE)  # fsspec chains file systems with ::


class Entry(NamedTuple):
    """Where a value of a sharded checkpoint lies."""

    name: str
    file: str
    offset: int
    length: int
    is_tensor: bool


def check_opens_safely(path: str | Path) -> None:
    """Raise where opening a checkpoint could run code, as every strategy of Lightning opens it.

    A file must be one that torch's safe unpickler takes. A folder must be a whole sharded checkpoint: its list of
    tensors, its other state and each value in its shards are read without calling anything that they name. Object
    stores, such as ``s3://``, are not looked into: Lightning reads them only through torch's loader, which has to be
    told ``weights_only=True``.

    This protects from files made by strangers. It does not protect from a stranger who can write to the folder, and
    exchanges a file between the check and the loading.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is fetched from an address, could run code, or is damaged.
    """
    text = str(path)
    if ADDRESS.search(text):
        raise ValueError(f"{text}: checkpoints are not fetched from addresses; download the file and name its path")
    path = Path(path)
    if "://" in text and not path.exists():
        return
    if path.is_dir():
        check_shards(path)
    else:
        _check_file(path)


def check_shards(folder: Path) -> list[Entry]:
    """What a sharded checkpoint holds, once it is known to be whole and to open without running code.

    Raises:
        ValueError: As check_opens_safely.
    """
    absent = [name for name in (INDEX, EXTRA) if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            f"{folder} is no whole sharded checkpoint: it holds no {' and no '.join(absent)}. Name a checkpoint that "
            "FSDPStrategy or ModelParallelStrategy wrote to its end; folders of other kinds, such as DeepSpeed's, are "
            "opened by plain pickle and therefore not at all"
        )
    others = sorted(path.name for path in folder.glob(f"*{INDEX}") if path.name != INDEX)
    if others:  # torch's reader falls back to these
        raise ValueError(f"{folder} holds {others[0]}, which Lightning does not write and pickle would open")
    read_torch(folder / EXTRA)
    found = read_index(folder)
    files: dict[str, list[Entry]] = {}
    for entry in found:
        files.setdefault(entry.file, []).append(entry)
    for name, entries in files.items():
        _check_shard(folder / name, entries)
    return found


def read_index(folder: Path) -> list[Entry]:
    """The values of a sharded checkpoint, from its file ``.metadata``, read without running code.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, names what torch does not write there, or leads out of its folder.
    """
    path = folder / INDEX
    with path.open("rb") as file:
        try:
            index = _IndexReader(file).load()
            entries = list(_entries(index))
        except Exception as error:  # damage ends in any kind of error
            raise ValueError(f"{path} is damaged, or could run code: {error}") from error
    for entry in entries:
        if Path(entry.file).name != entry.file or "\\" in entry.file:
            raise ValueError(f"{path} leads out of its folder: {entry.file!r}")
    return entries


def _check_file(path: Path) -> None:
    if path.suffix == ".safetensors":  # torch.load would read such a file by other means than the strategies do
        raise ValueError(f"{path} holds weights alone, no state of a run; start from it with pretrained=")
    read_torch(path)
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    # torch.load looks at the start of a file, but FSDPStrategy at its end, where a second archive may hide.
    if not is_zip and _ends_in_archive(path):
        raise ValueError(f"{path} is two files in one, of which the second could run code")


def _ends_in_archive(path: Path) -> bool:
    try:
        torch.PyTorchFileReader(str(path))
    except RuntimeError:
        return False
    return True


def _check_shard(path: Path, entries: list[Entry]) -> None:
    if not path.is_file():
        raise ValueError(f"{path.parent} is no whole sharded checkpoint: it holds no {path.name}")
    size, needed = path.stat().st_size, max(entry.offset + entry.length for entry in entries)
    if size < needed:
        raise ValueError(f"{path} is cut short: it has {size} bytes of at least {needed}")
    with path.open("rb") as file:
        for entry in entries:
            if entry.is_tensor:  # torch reads those with weights_only=True itself
                continue
            file.seek(entry.offset)
            try:
                torch.load(io.BytesIO(file.read(entry.length)), map_location="cpu", weights_only=True)
            except Exception as error:  # as in read_torch
                raise ValueError(
                    f"{path} cannot be opened with weights_only=True: {entry.name} in it holds Python objects, which "
                    "could run code, or is damaged"
                ) from error


class _Closed(type):
    """A class that pickle may call; but it may not set anything on the class itself."""

    def __getattribute__(cls, name: str) -> Any:
        if name == "__setstate__":  # asked for first where pickle is about to change something
            raise pickle.UnpicklingError(f"it changes {cls.__name__}")
        return super().__getattribute__(name)


class _Record(metaclass=_Closed):
    """In the place of a dataclass of torch's: its fields, and nothing that acts."""

    __slots__ = ("fields",)
    fields: dict[str, Any]

    def __new__(cls) -> _Record:
        record = super().__new__(cls)
        record.fields = {}
        return record

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, dict) or not all(isinstance(key, str) and key[:1] != "_" for key in state):
            raise pickle.UnpicklingError(f"the state of a {type(self).__name__} is {type(state).__name__}")
        self.fields = self.fields | state


class _Metadata(_Record): ...


class _Tensor(_Record): ...


class _Bytes(_Record): ...


class _Chunk(_Record): ...


class _Index(_Record): ...


class _Place(_Record): ...


class _Origin(_Record): ...


class _Properties(_Record):
    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise pickle.UnpicklingError("the properties of a tensor are not five")


class _Size(metaclass=_Closed):
    def __new__(cls, values: Any = ()) -> Any:
        return torch.Size([_whole(value) for value in values])


class _Word(metaclass=_Closed):
    """In the place of what is made of words or numbers: paths, layouts, formats of memory. Equal to nothing else."""

    __slots__ = ()

    def __new__(cls, *words: Any) -> Any:
        if not all(type(word) in (str, int) for word in words):
            raise pickle.UnpicklingError("a path, layout or memory format is made of no plain values")
        return super().__new__(cls)


class _Format(_Word):
    __slots__ = ()


class _Attribute(metaclass=_Closed):
    """In the place of ``getattr``, by which Python 3.11.0 to 3.11.3 write a member of an Enum."""

    def __new__(cls, owner: Any, name: Any) -> Any:
        if owner is not _Format or type(name) is not str or name[:1] == "_":
            raise pickle.UnpicklingError("it asks for an attribute of something")
        return _Format(name)


_TORCH = "torch.distributed.checkpoint"
_NAMES: dict[tuple[str, str], type] = {
    (f"{_TORCH}.metadata", "Metadata"): _Metadata,
    (f"{_TORCH}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{_TORCH}.metadata", "BytesStorageMetadata"): _Bytes,
    (f"{_TORCH}.metadata", "ChunkStorageMetadata"): _Chunk,
    (f"{_TORCH}.metadata", "TensorProperties"): _Properties,
    (f"{_TORCH}.metadata", "MetadataIndex"): _Index,
    (f"{_TORCH}.metadata", "StorageMeta"): _Origin,
    (f"{_TORCH}.metadata", "_MEM_FORMAT_ENCODING"): _Format,
    (f"{_TORCH}.filesystem", "_StorageInfo"): _Place,
    ("torch", "Size"): _Size,
    ("torch.serialization", "_get_layout"): _Word,
    ("pathlib", "PosixPath"): _Word,
    ("pathlib", "WindowsPath"): _Word,
    ("pathlib._local", "PosixPath"): _Word,  # Python 3.13
    ("pathlib._local", "WindowsPath"): _Word,
    ("builtins", "getattr"): _Attribute,
}


class _IndexReader(pickle.Unpickler):
    """Reads ``.metadata`` with stand-ins for all that it names, so that nothing real is called or changed.

    It takes the same steps as ``pickle.load`` takes later, and is stricter at each: what it accepts can name nothing
    there but these few classes, which keep what they are given.
    """

    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) in _NAMES:
            return _NAMES[module, name]
        if module == "torch" and isinstance(value := vars(torch).get(name), torch.dtype):
            return value
        raise pickle.UnpicklingError(f"it names {module}.{name}, which torch does not write there")


def _entries(index: Any) -> Iterator[Entry]:
    fields = _fields(index, _Metadata)
    if fields.get("storage_meta") is not None:  # anything else here would send torch to the file that it falls back to
        _fields(fields["storage_meta"], _Origin)
    kinds = _mapping(fields.get("state_dict_metadata"))
    for key, value in _mapping(fields.get("storage_data")).items():
        name, place = _text(_fields(key, _Index).get("fqn")), _fields(value, _Place)
        if place.get("transform_descriptors"):
            raise ValueError(f"{name} is compressed, which Lightning does not do")
        if type(kinds.get(name)) not in (_Tensor, _Bytes):
            raise ValueError(f"it does not say what {name} is")
        offset, length = _whole(place.get("offset")), _whole(place.get("length"))
        yield Entry(name, _text(place.get("relative_path")), offset, length, type(kinds[name]) is _Tensor)


def _fields(value: Any, kind: type[_Record]) -> dict[str, Any]:
    if type(value) is not kind:
        raise ValueError(f"in the place of {kind.__name__.lstrip('_')} is a {type(value).__name__}")
    fields: dict[str, Any] = value.fields
    return fields


def _mapping(value: Any) -> dict[Any, Any]:
    if type(value) is not dict:
        raise ValueError(f"in the place of a mapping is a {type(value).__name__}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"in the place of a name is a {type(value).__name__}")
    return value


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"a size is {value!r}")
    return value
