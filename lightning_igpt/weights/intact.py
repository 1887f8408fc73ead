"""Whether a file still holds the bytes that were written: truncated or with flipped bits, it is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path


def check_intact(path: Path) -> None:
    """Raise where a zip archive, as ``torch.save`` and NumPy write them, is not whole.

    Every entry is read and compared with its checksum; torch itself compares none. Files that are no zip archives
    (torch before 1.6 wrote such) have nothing to compare.

    Raises:
        ValueError: The file is truncated, or an entry differs from its checksum.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile has many errors for damage
        raise ValueError(f"{path} is damaged or incomplete: {error}") from error
    if damaged is not None:
        raise ValueError(f"{path} is damaged: {damaged} in it differs from its checksum")
