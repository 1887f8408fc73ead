"""Files by strangers are opened so that nothing in them runs, and damage names the file."""

import datetime
import errno
import json
import operator
import os
import pickle
import re
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import lru_cache
from numbers import Integral, Number
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from lightning_igpt.files import replacing

ADDRESS = re.compile(r"(^|::)(https?|ftps?|sftp):/", re.IGNORECASE)  # fsspec chains file systems with ::
SHARDS = (
    "a folder of shards as FSDP writes it, whose list of tensors is a pickle that could run code; save checkpoints as "
    "one file (save_distributed_checkpoint=False), or join it by torch.distributed.checkpoint.format_utils"
)


def read_torch(path: Path, map_location: Any = "cpu", *, mmap: bool = True) -> Any:
    """Tensors and plain values of a file by ``torch.save``, archives mapped; ValueError for damage and objects."""
    try:
        return torch.load(path, map_location, weights_only=True, mmap=mmap and _starts(path, b"PK"))
    except Exception as error:  # damage ends in any kind of error, also in an OSError
        if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError)):
            raise
        if not _starts(path, b"PK", b"\x80"):
            raise ValueError(f"{path} is no checkpoint (torch.save did not write it), or it is damaged") from error
        reason = f"it is damaged or incomplete ({str(error)[:300]})"
        if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to switch its protection off
            reason = f"it holds Python objects, which could run code{_objects_in(path)}"
        raise ValueError(f"{path} cannot be opened with weights_only=True: {reason}") from error


PLAIN = {type(None), bool, int, float, complex, str, bytes, bytearray}
PLAIN |= {Tensor, torch.Size, torch.dtype, torch.device, torch.layout}
PLAINER: tuple[tuple[Any, Callable[[Any], Any]], ...] = (  # of the kinds that an object has, the first counts
    (Enum, lambda value: value.value),
    ((np.generic, np.ndarray), lambda value: value.tolist()),
    (os.PathLike, os.fspath),
    ((Namespace, SimpleNamespace), vars),
    ((datetime.date, datetime.time), lambda value: value.isoformat()),
    (datetime.timedelta, lambda value: value.total_seconds()),
    ((str, UUID), str),
    (Integral, int),
    (Number, float),
    (Mapping, dict),
    ((tuple, Set), tuple),  # named tuples and frozen sets may be keys
    (Sequence, list),
)


def plain(value: Any, report: Callable[[str, Any], Any], key: str = "") -> Any:
    """A value without objects; where no plain value says the same, what ``report`` makes of key ``a.b`` and object."""
    kind = type(value)
    if kind in PLAIN or isinstance(value, Tensor) or kind in torch.serialization.get_safe_globals():
        return value
    if kind in (dict, OrderedDict, Counter):
        names = [plain(name, report, key) for name in value]
        items = [plain(item, report, f"{key}.{name}".lstrip(".")) for name, item in value.items()]
        same = all(map(operator.is_, [*names, *items], [*value, *value.values()]))
        return value if same else kind(dict(zip(names, items, strict=True)))
    if kind in (list, tuple, set):
        return kind(plain(item, report, f"{key}.{number}") for number, item in enumerate(value))
    simpler = value
    with suppress(Exception):  # OmegaConf's configs may lack values
        if is_dataclass(value):
            value = {field.name: getattr(value, field.name) for field in fields(value)}
        simpler = next((convert(value) for known, convert in PLAINER if isinstance(value, known)), value)
    return report(key, value) if type(simpler) is kind else plain(simpler, report, key)


def _objects_in(path: Path) -> str:
    """For the message: which objects a file holds, where as far as that can be seen, and what to do. None is made."""
    places, keys = list[str](), list[str]()
    with suppress(Exception):  # a hostile file may end this anywhere
        places = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        idle = dict.fromkeys(("__init__", "__setstate__"), lambda *args: None)
        with torch.serialization.safe_globals([(type(name, (), idle), name) for name in places]):
            content = torch.load(path, "meta", weights_only=True)
        plain(content, lambda key, value: keys.append(f"{getattr(value, '__name__', type(value).__name__)} in {key}"))
    if not places:
        return ", or is damaged"
    texts = [ascii(text)[1:-1][:100] for text in (keys or places)[:3]]
    cure = "if you wrote it, and only then, torch.load it with weights_only=False, put plain values there and save it"
    return f": {', '.join(texts)}; {cure}"


def tensors_in(content: Any, where: Path) -> dict[str, Tensor]:
    """A mapping of names to tensors out of a torch file, of which no tensor is larger than what the file holds."""
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{where} holds no mapping of names to tensors")
    for name, value in content.items():
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # by a stride of 0
            raise ValueError(f"{where}: {name} of the shape {tuple(value.shape)} is larger than what is stored of it")
    return dict(content)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file, mapped, and the metadata in its header; ValueError where it is damaged."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} cannot be opened as a safetensors file: {error}") from error


def save_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write contiguous CPU tensors, and one text for the header, where safetensors shuffles several."""
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(dict(tensors), temporary, metadata=dict(metadata))
        except safetensors.SafetensorError as error:  # what it makes of a full disk
            raise OSError(errno.EIO, str(error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError where it is damaged or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def check_local(path: str | Path) -> None:
    """Raise a ValueError where ``path`` is an address to fetch from, or names no file of a run's whole state."""
    text, path = str(path), Path(path)
    if ADDRESS.search(text):
        raise ValueError(f"{text}: checkpoints are not fetched from URLs; download the file and name its path")
    if path.is_dir():
        kind = SHARDS if (path / ".metadata").exists() else "a folder; name a checkpoint in it"
        raise ValueError(f"{path} is {kind}")
    if path.suffix == ".safetensors":
        raise ValueError(f"{path} holds weights alone, no state of a run; start from it with pretrained=")


def check_intact(path: Path) -> None:
    """Raise a ValueError unless a file equals its checksums, which torch ignores; what did not change is read once."""
    check_local(path)
    status = path.stat()
    _compare_checksums(path, status.st_size, status.st_mtime_ns)


@lru_cache
def _compare_checksums(path: Path, size: int, modified: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            has_sums = any(entry.CRC for entry in archive.infolist())  # none after set_crc32_options(False)
            broken = archive.testzip() if has_sums else None
    except Exception as error:  # zipfile has many errors for damage
        raise ValueError(f"{path} is damaged or incomplete ({str(error)[:300]}); use another copy") from error
    if broken is not None:
        raise ValueError(f"{path} is damaged: {broken} in it differs from its checksum; use another copy")


def _starts(path: Path, *beginnings: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(4).startswith(beginnings)
