"""Palettes outside of this process: where a name leads, and how colours lie in files there.

Not here: what a palette is and which colours make one (``palette.py``).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_igpt.spelling import there_is_no

HF_FILE = "preprocessor_config.json"
SHA256 = "palette_sha256"  # the key beside "clusters" in files by this package
MAX_BYTES = 8_000_000  # of any file of colours or of settings; the largest palette takes 4 MB as JSON
FORMS = "A palette is 'openai', 'gray:K', a .npy file, a Hugging Face folder, a hub id 'owner/name' or colours"


class Stored(NamedTuple):
    """Colours as they lie in a file, unchecked, and the digest that they must have where the file tells it."""

    colors: Any
    sha256: str | None
    where: str


def read_colors(spec: str) -> Stored:
    """The colours in a file, a folder or a repository of the hub.

    Raises:
        FileNotFoundError: It looks like a path, but nothing is there.
        ValueError: There is no such repository, or the file is damaged or no palette.
    """
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / HF_FILE
        if not path.is_file():
            raise FileNotFoundError(f"the folder {spec} has no {HF_FILE}, where Hugging Face keeps the palette")
    if path.is_file():
        return _read_file(path)
    if "://" in spec:
        raise ValueError(f"{spec} is not downloaded; give a hub id 'owner/name' or a file that you have")
    if spec.startswith((".", "/", "~")) or path.suffix in (".npy", ".json") or spec.count("/") > 1 or "\\" in spec:
        raise FileNotFoundError(f"there is no palette file or folder {spec}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        return _read_file(_download(spec))
    raise ValueError(there_is_no("palette", spec, ["openai", "gray:16"], FORMS))


def write_colors(path: Path, colors: NDArray[np.float32]) -> None:
    """Write a ``.npy`` file and its SHA-256 after it, where NumPy does not look."""
    file = io.BytesIO()
    np.save(file, colors, allow_pickle=False)
    path.write_bytes(file.getvalue() + hashlib.sha256(file.getvalue()).digest())


def npy_layout(file: BinaryIO) -> tuple[tuple[int, ...], int]:
    """What the header of a ``.npy`` file promises, with nothing read or allocated beyond it.

    Args:
        file: At the start of the ``.npy`` file.

    Returns:
        (shape, bytes of the whole file).

    Raises:
        ValueError: It is no header, or one of Python objects. NumPy raises other errors, too, for damage.
    """
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"it is of the .npy version {version}, which is not read here")
    shape, _, dtype = _HEADERS[version](file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which could run code")
    return shape, file.tell() + math.prod(shape) * dtype.itemsize


_HEADERS: dict[tuple[int, int], Callable[[BinaryIO], tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def _read_file(path: Path) -> Stored:
    if path.suffix not in (".npy", ".json"):
        raise ValueError(f"{path} is no palette; a palette file ends in .npy or is Hugging Face's {HF_FILE}")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than any palette")
    try:
        content = path.read_bytes()
        if path.suffix == ".npy":
            return Stored(_read_npy(content), None, str(path))
        values = json.loads(content.decode("utf-8"))
    except PermissionError:
        raise
    except Exception as error:  # NumPy and json each have many errors for damage
        reason = str(error)[:300] or type(error).__name__
        raise ValueError(f"{path} cannot be read as plain numbers: {reason}") from error
    if not isinstance(values, dict) or "clusters" not in values:
        raise ValueError(f"{path} has no 'clusters', so it describes no ImageGPT palette")
    return Stored(values["clusters"], values.get(SHA256), str(path))


def _read_npy(content: bytes) -> NDArray[Any]:
    """The array, in a file of its own or with the digest of ``write_colors`` after it."""
    _, size = npy_layout(io.BytesIO(content))
    if size > len(content):
        raise ValueError(f"its header promises {size:,} bytes, but there are {len(content):,}; it is not whole")
    if content[size:] and content[size:] != hashlib.sha256(content[:size]).digest():
        raise ValueError("it is damaged: it differs from the checksum at its end")
    array: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
    return array


def _download(repository: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, HF_FILE))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"there is no file or folder {repository!r} here, and {HF_FILE} of the hub repository of that "
            f"name could not be fetched; if it exists, download it and give the folder "
            f"({type(error).__name__}: {error})"
        ) from error
