"""Files that a user keeps are written whole or not at all; an error names the file and the room that it needs."""

import contextlib
import csv
import errno
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(path: str | Path, temporary: Path | None = None) -> Iterator[Path]:
    """A temporary file in the folder of ``path``, which is made, renamed to ``path`` once it is written.

    A pipe or a device such as ``/dev/stdout`` is written directly; a link keeps its place. OSError says why the file
    is as it was; on a full disk the message has the bytes written and those free.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():
        yield target
        return
    temporary = temporary or target.with_name(f".{uuid.uuid4().hex}{target.suffix[-16:]}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:  # safetensors makes its files readable by their owner alone
            temporary.chmod(mode)
        temporary.replace(target)
    except Exception as error:
        cause = os_error(error)
        if cause is None:
            raise
        raise _explained(cause, target, temporary) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Replace a text file, in UTF-8 with the line ends of ``text``."""
    with replacing(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))


def write_csv(path: str | Path, rows: Iterable[Sequence[Any]]) -> None:
    """Replace a CSV file; text that a spreadsheet would run as a formula gets an apostrophe in front."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8", errors="replace") as file:
        csv.writer(file).writerows([[_harmless(cell) for cell in row] for row in rows])


def os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error behind another; torch makes a RuntimeError of a write that failed."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return error


def _explained(error: OSError, target: Path, temporary: Path) -> OSError:
    kept = "; the existing file is unchanged" if target.exists() else ""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        written = temporary.stat().st_size if temporary.exists() else 0
        free = shutil.disk_usage(target.parent).free
        reason = f"{reason}: {written:,} bytes of it were written, {free:,} are free; make room, or save elsewhere"
    return OSError(error.errno, f"{target} could not be saved{kept}. {reason}")


def _harmless(cell: Any) -> Any:
    with contextlib.suppress(TypeError, ValueError):
        float(cell)
        return cell
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell


def shown(text: object) -> str:
    """A name as messages show it: escapes of terminals, line ends and bytes that are not UTF-8 as backslash escapes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def counted(n: int, noun: str) -> str:
    """A number with its noun: 1 image, 2 images, 1,201 processes."""
    return f"{n:,} {noun}" + ("" if n == 1 else "es" if noun.endswith("s") else "s")
