"""Where results go, looked at before any work is done: the same rules for every verb.

Folders that are missing are made, with those above them, but none at the root of the file system: a path that begins
there with a new name is most likely misspelt.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path


def check_file(path: str | Path, option: str, example: str, suffix: str = "") -> None:
    """Raise unless a file can be written, or replaced.

    Args:
        path: The file.
        option: What names it, such as ``--out``.
        example: Name of such a file, for who gave a folder.
        suffix: What its name must end in, where another end would most likely be that of a file to keep.

    Raises:
        ValueError: It is a folder, or of another suffix.
        OSError: It cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; {option} wants the name of a file, such as {path / example}")
    if not path.name.lower().endswith(suffix):
        raise ValueError(f"{option} is {path}; what is written there is a {suffix} file, such as {example}")
    if not path.exists():
        _check_room(path, path.parent)
    elif not os.access(path, os.W_OK):
        raise PermissionError(f"{path} may not be written; make it writable, or name another file by {option}")


def check_folder(path: str | Path, option: str) -> None:
    """Raise unless files can be written into a folder, which need not be there.

    Args:
        path: The folder.
        option: What names it, such as ``--out``.

    Raises:
        NotADirectoryError: It is a file.
        OSError: Nothing can be written in it.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; {option} wants a folder, so name another")
    _check_room(path, path)


def check_places(places: Sequence[str | Path]) -> None:
    """Raise unless runs can be saved in folders, which need not be there.

    Raises:
        NotADirectoryError: A file is in the way; the message names it.
        OSError: Nothing can be written in one.
    """
    for place in map(Path, places):
        _check_room(place, place)


def _check_room(place: Path, folder: Path) -> None:
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"nothing can be saved in {place}: {there} is a file; name another folder")
    if there != folder and str(there) == "/":
        first = Path(*folder.absolute().parts[:2])
        raise FileNotFoundError(
            f"nothing is saved in {place}: there is no folder {first}, and none is made at the root of the file "
            "system; make it first, or name another place"
        )
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = error.strerror or "it takes no files"
        raise OSError(f"nothing can be saved in {place}: {there}: {reason}; name another place") from error
