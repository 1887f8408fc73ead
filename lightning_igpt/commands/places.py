"""Where results go, checked before any work is done: the same rules for every verb.

Missing folders are made, with their parents, but none at the root of the file system: a path that begins there with a
new name is most likely misspelt.
"""

import os
import tempfile
from pathlib import Path

NAME_BYTES = 255  # of a file or folder, in the usual file systems


def check_file(path: str | Path, option: str, example: str, suffix: str = "") -> None:
    """Raise ValueError or OSError unless a file can be written, or replaced, and its name ends in ``suffix``.

    ``option`` is what names it, such as ``--out``, and ``example`` such a file's name, both for the message.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; {option} takes the name of a file, such as {path / example}")
    if not path.name.lower().endswith(suffix):
        raise ValueError(f"{option} is {path}; it must be a {suffix} file, such as {example}")
    if not path.exists():
        _check_writable(path, path.parent)
    elif not os.access(path, os.W_OK):
        raise PermissionError(f"{path} is not writable; change its permissions, or name another file by {option}")


def check_folder(path: str | Path, option: str) -> None:
    """Raise OSError unless files can be written into a folder, which need not exist and which ``option`` names."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; {option} takes a folder, so name another")
    _check_writable(path, path)


def _check_writable(place: Path, folder: Path) -> None:
    longest = max(len(os.fsencode(part)) for part in place.parts or (".",))
    if longest > NAME_BYTES:
        raise OSError(f"{place} has a name of {longest} bytes, more than {NAME_BYTES}; choose a shorter one")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"nothing can be saved in {place}: {existing} is a file; name another folder")
    if existing != folder and str(existing) == "/":
        first = Path(*folder.absolute().parts[:2])
        raise FileNotFoundError(
            f"nothing is saved in {place}: the folder {first} does not exist, and none is made at the root of the file "
            "system; make it first, or name another place"
        )
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        reason = error.strerror or "it takes no files"
        raise OSError(f"nothing can be saved in {place}: {existing}: {reason}; name another place") from error
