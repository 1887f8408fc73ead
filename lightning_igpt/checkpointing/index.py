"""The list of tensors of a sharded checkpoint, torch's file ``.metadata``, read without running code.

It is a pickle, and torch opens it as such. Here stand-ins take the place of all that it names.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

INDEX = ".metadata"


class Entry(NamedTuple):
    """Where a value of a sharded checkpoint lies, or a part of a tensor."""

    name: str
    file: str
    offset: int
    length: int
    is_tensor: bool
    path: tuple[str | int, ...] = ()  # keys and list positions that lead to the value; empty where nothing says so
    dtype: torch.dtype | None = None
    shape: tuple[int, ...] = ()  # of the whole tensor
    start: tuple[int, ...] = ()  # where in it the part begins
    size: tuple[int, ...] = ()  # of the part


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
        self.fields = {"dtype": state[0]}


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
    kinds, paths = _mapping(fields.get("state_dict_metadata")), fields.get("planner_data")
    tensors = {name: _tensor(kind, name) for name, kind in kinds.items() if type(kind) is _Tensor}
    for key, value in _mapping(fields.get("storage_data")).items():
        name, place = _text(_fields(key, _Index).get("fqn")), _fields(value, _Place)
        if place.get("transform_descriptors"):
            raise ValueError(f"{name} is compressed, which Lightning does not do")
        if type(kinds.get(name)) not in (_Tensor, _Bytes):
            raise ValueError(f"it does not say what {name} is")
        offset, length = _whole(place.get("offset")), _whole(place.get("length"))
        path = _path(paths.get(name), name) if type(paths) is dict else ()
        entry = Entry(name, _text(place.get("relative_path")), offset, length, name in tensors, path)
        yield _part(entry, tensors[name], _sizes(key.fields.get("offset"))) if name in tensors else entry


class _Shape(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: dict[tuple[int, ...], tuple[int, ...]]  # start: size


def _tensor(kind: Any, name: Any) -> _Shape:
    fields = _fields(kind, _Tensor)
    dtype, chunks = _fields(fields.get("properties"), _Properties).get("dtype"), fields.get("chunks")
    if not isinstance(dtype, torch.dtype) or type(chunks) is not list:
        raise ValueError(f"it does not say what the tensor {name} is made of")
    parts = [_fields(chunk, _Chunk) for chunk in chunks]
    sizes = {_sizes(part.get("offsets")): _sizes(part.get("sizes")) for part in parts}
    return _Shape(dtype, _sizes(fields.get("size")), sizes)


def _part(entry: Entry, whole: _Shape, start: tuple[int, ...]) -> Entry:
    if start not in whole.parts:
        raise ValueError(f"it does not say how large the part of {entry.name} at {start} is")
    size = whole.parts[start]
    inside = zip(start, size, whole.shape, strict=True)
    if any(first + count > most for first, count, most in inside):
        raise ValueError(f"a part of {entry.name}, {size} at {start}, lies outside of its shape {whole.shape}")
    if math.prod(size) * whole.dtype.itemsize > entry.length:
        raise ValueError(f"it promises more of {entry.name} than the {entry.length} bytes in {entry.file}")
    return entry._replace(dtype=whole.dtype, shape=whole.shape, start=start, size=size)


def _path(value: Any, name: str) -> tuple[str | int, ...]:
    """The keys that lead to a value, where torch noted them: joined by dots they are its name."""
    if value is None:
        return ()
    if type(value) is not tuple or not all(type(key) in (str, int) for key in value):
        raise ValueError(f"the way to {name} is made of no plain values")
    if ".".join(map(str, value)) != name:
        raise ValueError(f"the way to {name} leads elsewhere")
    return value


def _sizes(value: Any) -> tuple[int, ...]:
    if type(value) is not torch.Size:
        raise ValueError(f"in the place of sizes is a {type(value).__name__}")
    return tuple(value)


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
