"""Tensors out of files, a few at a time and without running code, and a network put together from them.

A network of 1.4 billion parameters takes 5.4 GB; a file of it read whole beside it would take as much again. So files
are only mapped, and mapped anew for every few tensors: what was copied out of a mapping that is gone takes no memory.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import safetensors
import torch
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.weights.intact import check_storages, check_stored, tensor_sums

TELLING = ("wte.weight", "wpe.weight", "h.0.mlp.c_fc.weight")  # their shapes tell those of all others
MAX_BYTES = 8_000_000  # of a file of settings
PIECES = 16  # a network is put together in about as many steps; one step's tensors are in memory twice
SMALLEST_PIECE = 1 << 20  # values; every step opens the file anew, which a small network would do for nothing


class TensorFile(Protocol):
    """Named tensors on a disk."""

    where: str  # for messages
    names: set[str]

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, valid until the next call."""
        ...


class Ingredient(NamedTuple):
    """What one parameter is made of."""

    theirs: tuple[str, ...]
    convert: Callable[..., Tensor]


class TorchFile:
    """A file written by ``torch.save``, opened with the safe loader: tensors and plain values only, no code runs.

    Args:
        path: The file.
        pick: What of its content is the mapping of names to tensors.

    Raises:
        ValueError: The file is damaged, or holds Python objects or tensors larger than itself.
    """

    def __init__(self, path: Path, pick: Callable[[Any], Any] = lambda content: content) -> None:
        self.where, self._path, self._pick = str(path), path, pick
        self._identity = file_identity(path)
        self._sums = tensor_sums(path)
        self._compared: set[str] = set()
        state = pick(read_torch(path))
        if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{path} holds no mapping of names to tensors")
        self.names = set(state)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As TensorFile.read."""
        state = self._pick(read_torch(self._path))
        if file_identity(self._path) != self._identity:
            raise ValueError(f"{self._path} was replaced while it was being read; try again")
        found = {name: state[name] for name in names}
        check_storages([found[name] for name in found.keys() - self._compared], self._sums, self._path)
        self._compared |= found.keys()
        return found


class NumpyFile:
    """An .npz file of plain arrays, not compressed.

    NumPy compares an array with its checksum once it has read all of its bytes, so none may have more than it reads.

    Raises:
        ValueError: The file is damaged, compressed, or holds Python objects.
    """

    def __init__(self, path: Path) -> None:
        self.where, self._path = str(path), path
        try:
            with zipfile.ZipFile(path) as file:
                entries = file.infolist()
                check_stored(entries, path)
                self.shapes = {entry.filename.removesuffix(".npy"): _npy_shape(file, entry) for entry in entries}
        except Exception as error:  # zipfile and NumPy each have their own errors for damage
            raise ValueError(f"{path} cannot be opened as an .npz file: {_brief(error)}") from error
        self.names = set(self.shapes)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As TensorFile.read."""
        try:
            with np.load(self._path, allow_pickle=False) as file:
                return {name: torch.from_numpy(np.asarray(file[name])) for name in names}
        except Exception as error:
            raise ValueError(f"{self._path} cannot be read as plain arrays: {_brief(error)}") from error


class ShardedFile:
    """Several files in a folder that an index gives the tensors' places in, as transformers writes large networks.

    Args:
        index: The .index.json file.
        opener: Opens one of the files.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The index is damaged or leads out of its folder.
    """

    def __init__(self, index: Path, opener: Callable[[Path], TensorFile]) -> None:
        self.where = str(index)
        places = read_json(index).get("weight_map")
        if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
            raise ValueError(f"{index} has no weight_map")
        for place in set(places.values()):
            if Path(place).name != place:
                raise ValueError(f"{index} leads out of its folder: {place!r}")
            if not (index.parent / place).is_file():
                raise FileNotFoundError(f"{index.parent} holds no {place}, which {index.name} names")
        self._files = {place: opener(index.parent / place) for place in set(places.values())}
        self._places: dict[str, str] = places
        self.names = set(places)
        absent = sorted(name for name, place in places.items() if name not in self._files[place].names)
        if absent:
            raise ValueError(f"{index} names parameters that its files do not hold: {absent}")

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As TensorFile.read."""
        wanted = list(names)
        return {
            name: value
            for place, file in self._files.items()
            for name, value in file.read([name for name in wanted if self._places[name] == place]).items()
        }


def assemble(config: ImageGPTConfig, ingredients: Mapping[str, Ingredient], file: TensorFile) -> ImageGPT:
    """A network in float32 from what a file holds, in little more memory than the network takes.

    Args:
        config: The network's shape.
        ingredients: What each of our parameters is made of.
        file: Where that is.

    Raises:
        ValueError: A tensor has the wrong shape or type, or holds values that are not finite.
    """
    with torch.device("meta"):
        network = ImageGPT(config)
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    raw = file.read({name for ours in TELLING for name in ingredients[ours].theirs})
    for ours in TELLING:  # before memory is reserved for a network that the file does not hold
        _converted(raw, ingredients[ours], shapes[ours], file.where)
    # All reserved before anything is read: between temporary tensors they would leave holes that stay with the process.
    state = {name: torch.empty(shape) for name, shape in shapes.items()}
    for piece in _pieces(shapes):
        del raw
        raw = file.read({name for ours in piece for name in ingredients[ours].theirs})
        for ours in piece:
            state[ours].copy_(_converted(raw, ingredients[ours], shapes[ours], file.where))
            _check_finite(state[ours], " + ".join(ingredients[ours].theirs), file.where)
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(True)


def read_torch(path: Path) -> Any:
    """The content of a file written by ``torch.save``, mapped, with the safe loader.

    Raises:
        ValueError: The file is damaged or holds Python objects.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
        return torch.load(path, map_location="cpu", weights_only=True)  # torch before 1.6 wrote no zip to map
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:  # damage anywhere in the file ends in any kind of error
        if not _may_be_torch(path):
            raise ValueError(f"{path} is no checkpoint (torch.save did not write it), or it is damaged") from error
        reason = f"it is damaged or incomplete ({_brief(error)})"
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to switch its protection off
            reason = "it holds Python objects, which could run code, or is damaged"
        raise ValueError(f"{path} cannot be opened with weights_only=True: {reason}") from error


def _may_be_torch(path: Path) -> bool:
    """Whether a file begins as zip archives and pickles do."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: It is damaged, or no object.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, more than any that is read here")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place once it is whole.

    Raises:
        OSError: It cannot be written; what lay at ``path`` is still there.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")  # NumPy appends a suffix that is missing
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors would make it readable by its owner alone
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    except safetensors.SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def file_identity(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def check_head(head: Any, n_embd: int, where: str) -> Tensor:
    """A class head as float32 (C, D), copied.

    Raises:
        ValueError: It has another shape or type, or holds values that are not finite.
    """
    if not isinstance(head, Tensor) or head.ndim != 2 or head.shape[1] != n_embd or not len(head):
        shape = tuple(head.shape) if isinstance(head, Tensor) else type(head).__name__
        raise ValueError(f"{where}: the class head is {shape}; it must be a tensor (classes, {n_embd})")
    if not head.is_floating_point() or head.is_meta or head.layout != torch.strided:
        raise ValueError(f"{where}: the class head is of type {head.dtype}; it must hold floating-point numbers")
    copy = head.detach().to("cpu", torch.float32, copy=True)
    if not copy.isfinite().all():
        raise ValueError(f"{where}: the class head holds values that are not finite")
    return copy


_NPY_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _npy_shape(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> tuple[int, ...]:
    """The shape of an array whose header promises what its entry holds."""
    if not entry.filename.endswith(".npy"):
        raise ValueError(f"{entry.filename} in it is no array as numpy.savez writes it")
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in _NPY_HEADERS:
            raise ValueError(f"{entry.filename} in it is of the .npy version {version}; save it with numpy.savez")
        shape, _, dtype = _NPY_HEADERS[version](file)
        size = file.tell() + math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise ValueError(f"{entry.filename} in it holds Python objects, which could run code")
    if size != entry.file_size:
        raise ValueError(f"{entry.filename} in it has {entry.file_size:,} bytes, but its header promises {size:,}")
    return shape


def _pieces(shapes: Mapping[str, torch.Size]) -> Iterator[list[str]]:
    """The names in groups of about a PIECES-th of all values, of small networks in fewer."""
    limit = max(SMALLEST_PIECE, sum(shape.numel() for shape in shapes.values()) / PIECES)
    piece: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if piece and size + shape.numel() > limit:
            yield piece
            piece, size = [], 0
        piece.append(name)
        size += shape.numel()
    yield piece


def _converted(raw: Mapping[str, Tensor], ingredient: Ingredient, shape: torch.Size, where: str) -> Tensor:
    names, values = " + ".join(ingredient.theirs), [raw[name] for name in ingredient.theirs]
    for value in values:
        if not value.is_floating_point():
            raise ValueError(f"{where}: {names} is of type {value.dtype}; weights must be floating-point numbers")
    try:
        converted: Tensor = ingredient.convert(*values)
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"{where}: {names} has the shape {_shapes(values)}, which does not fit: {error}") from error
    if converted.shape != shape:
        raise ValueError(
            f"{where}: {names} has the shape {_shapes(values)}; the network described there needs "
            f"{tuple(shape)} after conversion, not {tuple(converted.shape)}"
        )
    return converted


def _check_finite(values: Tensor, names: str, where: str) -> None:
    if not torch.linalg.vector_norm(values, ord=torch.inf).isfinite():  # one pass, no copy
        count = int((~values.isfinite()).sum())
        raise ValueError(
            f"{where}: {count} of {values.numel()} values of {names} are not finite; the training diverged, "
            "or the file is damaged"
        )


def _brief(error: Exception) -> str:
    """For messages: some errors repeat what a damaged file holds, all of it."""
    text = str(error) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} ..."


def _shapes(values: list[Tensor]) -> str:
    return " + ".join(str(tuple(value.shape)) for value in values)
