"""Whether a file still holds the bytes that were written: truncated or with flipped bits, it is refused.

Zip archives, as ``torch.save`` and NumPy write them, hold a CRC-32 of every entry, of which torch compares none.
Not here: safetensors files, which hold none of their own (``sealed.py``).
"""

from __future__ import annotations

import io
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

CURE = "copy or download it again"
_CHUNK = 1 << 20
ZIP = b"PK\x03\x04"  # how an archive begins


def check_intact(path: Path) -> None:
    """Raise where a zip archive, as ``torch.save`` and NumPy write them, is not whole.

    Every entry is read and compared with its checksum. Files that are no zip archives (torch before 1.6 wrote such)
    have nothing to compare, nor have those that torch was told to write without checksums.

    Raises:
        ValueError: The file is truncated, or an entry differs from its checksum.
    """
    if _is_zip(path):
        _compare_entries(path, lambda name: True)


def check_archive(content: bytes, where: str) -> None:
    """Raise where a zip archive in memory, as ``torch.save`` writes it, is not whole.

    Raises:
        ValueError: It is truncated, an entry differs from its checksum, or it could unfold into more than it has.
    """
    if not content.startswith(ZIP):
        return
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            _check_sizes(entries, len(content))
            broken = archive.testzip() if _has_sums(entries) else None
    except Exception as error:  # zipfile has many errors for damage
        raise ValueError(f"{where} is damaged or incomplete ({error}); {CURE}") from error
    if broken is not None:
        raise ValueError(f"{where} is damaged: it differs from its checksum; {CURE}")


def tensor_sums(path: Path) -> frozenset[tuple[int, int]] | None:
    """The sums that a file by ``torch.save`` has of its tensors; all else in it is compared with its sums at once.

    So what is not used, such as the state of an optimiser, is not read either.

    Returns:
        (bytes, CRC-32) of every storage of tensors; None where there is nothing to compare.

    Raises:
        ValueError: The file is truncated, or an entry that holds no tensor differs from its checksum.
    """
    if not _is_zip(path):
        return None
    entries, byteorder = _compare_entries(path, lambda name: not _holds_tensor(name))
    if byteorder != sys.byteorder:  # torch turns the values around as it loads them
        check_intact(path)
        return None
    tensors = [entry for entry in entries if _holds_tensor(entry.filename)]
    return frozenset((entry.file_size, entry.CRC) for entry in tensors) if _has_sums(entries) else None


def check_storages(tensors: Iterable[Tensor], sums: frozenset[tuple[int, int]] | None, path: Path) -> None:
    """Raise unless the storage of each tensor is one of those that :func:`tensor_sums` gave for its file.

    Raises:
        ValueError: A tensor is damaged, or larger than what the file holds of it.
    """
    compared: set[int] = set()
    for tensor in tensors:
        if tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{path} holds a tensor without plain values ({tensor.layout}, {tensor.device})")
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise ValueError(f"{path} holds {storage.nbytes()} bytes for a tensor of the shape {tuple(tensor.shape)}")
        if sums is None or storage.data_ptr() in compared:  # many tensors may be parts of one storage
            continue
        compared.add(storage.data_ptr())
        content = torch.empty(0, dtype=torch.uint8).set_(storage)
        if (len(content), zlib.crc32(content.numpy().data)) not in sums:
            raise ValueError(f"{path} is damaged: a tensor in it differs from its checksum; {CURE}")


def check_stored(entries: Iterable[zipfile.ZipInfo], path: Path) -> None:
    """Raise where an archive could unfold into more than the bytes it has.

    Raises:
        ValueError: An entry is compressed, which torch would also map as it lies there, or entries overlap.
    """
    _check_sizes(entries, path.stat().st_size)


def _check_sizes(entries: Iterable[zipfile.ZipInfo], size: int) -> None:
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{entry.filename} in it is compressed; torch.save and numpy.savez compress nothing")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its entries overlap")


def _compare_entries(path: Path, wanted: Callable[[str], bool]) -> tuple[list[zipfile.ZipInfo], str]:
    """(all entries, the byte order that torch notes) of an archive whose wanted entries equal their checksums."""
    byteorder: str = sys.byteorder
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            check_stored(entries, path)
            has_sums = _has_sums(entries)
            for entry in entries:
                with archive.open(entry) as file:  # compares the names in the directory with those at the entries
                    if has_sums and entry.filename.endswith("/byteorder"):
                        byteorder = file.read(100).decode()
                    while has_sums and wanted(entry.filename) and file.read(_CHUNK):
                        pass  # the end compares
    except Exception as error:  # zipfile has many errors for damage
        raise ValueError(f"{path} cannot be opened: it is damaged or incomplete ({error}); {CURE}") from error
    return entries, byteorder


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == ZIP


def _holds_tensor(name: str) -> bool:
    return name.split("/")[1:2] == ["data"]


def _has_sums(entries: Iterable[zipfile.ZipInfo]) -> bool:
    """torch.serialization.set_crc32_options(False) leaves all of them at 0."""
    return any(entry.CRC for entry in entries)
