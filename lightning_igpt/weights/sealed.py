"""safetensors files, read and written. The format has no checksums, so ours carry one for every tensor.

They stand in the file's metadata, which other programs pass over; files by others have none and are taken without.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lightning_igpt.weights.files import file_identity, replacing
from lightning_igpt.weights.intact import CURE

OURS = "lightning_igpt"  # what every key of the metadata begins with that this package writes
SUMS = f"{OURS}_crc32"  # the key of the sums: {name of a tensor: sum}
METADATA = ""  # the name of the sum of the other metadata; no tensor of ours is called so


class SafetensorsFile:
    """A file in the safetensors format.

    Raises:
        ValueError: The file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.where, self._path = str(path), path
        self._identity = file_identity(path)
        with self._opened() as file:
            self.names = set(file.keys())
            self.metadata: dict[str, str] = file.metadata() or {}
        self.sums = self._read_sums()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As TensorFile.read."""
        if file_identity(self._path) != self._identity:
            raise ValueError(f"{self._path} was replaced while it was being read; try again")
        with self._opened() as file:
            found = {name: file.get_tensor(name) for name in names}
        for name, value in found.items() if self.sums else ():
            if _sum(name, value) != self.sums[name]:
                raise ValueError(f"{self._path} is damaged: {name} in it differs from its checksum; {CURE}")
        return found

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with safetensors.safe_open(self._path, framework="pt") as file:
                yield file
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self._path} cannot be opened as a safetensors file: {error}") from error

    def _read_sums(self) -> dict[str, int]:
        """The sum of each tensor, the metadata compared with theirs; empty where the file has none."""
        if not any(key.startswith(OURS) for key in self.metadata):
            return {}
        if SUMS not in self.metadata:
            raise ValueError(f"{self._path} is damaged, or older than checksums: its header has none; {CURE}")
        try:
            sums = json.loads(self.metadata[SUMS])
            whole = set(sums) == self.names | {METADATA} and sums[METADATA] == _metadata_sum(self.metadata)
        except (KeyError, TypeError, ValueError, RecursionError):
            whole = False
        if not whole:
            raise ValueError(f"{self._path} is damaged: its header differs from its checksum; {CURE}")
        return dict(sums)


def save_sealed(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with its sums. Equal content gives equal bytes.

    Args:
        path: The file; what lies there is replaced once the new file is whole.
        tensors: Contiguous, on the CPU.
        metadata: What else its header shall say; its keys begin with ``OURS``, and one there must be, so that a file
            whose sums are lost is still known to have had some.

    Raises:
        OSError: It cannot be written.
    """
    metadata = {"format": "pt", **metadata}  # transformers asks for the format
    sums = {name: _sum(name, value) for name, value in tensors.items()} | {METADATA: _metadata_sum(metadata)}
    with replacing(path) as temporary:
        safetensors.torch.save_file(dict(tensors), temporary, metadata=metadata | {SUMS: json.dumps(sums)})
        _sort_header(temporary)


def _sort_header(path: Path) -> None:
    """Put the metadata into the order of their names: safetensors writes them in another one each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(content) == length:  # else safetensors writes its JSON in another way by now; any order will do
            file.seek(8)
            file.write(content)


def _sum(name: str, tensor: Tensor) -> int:
    """CRC-32 of a tensor's name, type, shape and bytes."""
    values = tensor.detach().contiguous()
    # Not reshape(-1): of a single value any stride passes for contiguous, and view() minds.
    content = values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy()
    return zlib.crc32(content.data, zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()))


def _metadata_sum(metadata: Mapping[str, str]) -> int:
    others = {name: text for name, text in metadata.items() if name != SUMS}
    return zlib.crc32(json.dumps(others, sort_keys=True).encode())
