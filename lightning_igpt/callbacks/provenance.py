"""What a run depends on beside its settings: the words that started it, versions, hardware, the state of the code.

Everything here is plain values that JSON and torch's safe loader take, and None where the machine does not tell.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_igpt import __version__

PACKAGE = Path(__file__).parents[1]
LIBRARIES = ("lightning", "torchmetrics", "datasets", "numpy", "pillow", "transformers")
TIMEOUT = 5  # seconds for each answer of git, which on a network file system may take minutes
LARGEST = 2**30  # bytes of the largest file that is hashed, which takes a few seconds
MASK = "***"

_GIT_PLACES = {"GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"}  # set where git itself, in a hook, started the process
_SECRET = r"[\w.-]*(?:token|passw|secret|key|credential)[\w.-]*"
_OPTION = re.compile(rf"-{{1,2}}{_SECRET}", re.IGNORECASE)
_PAIR = re.compile(rf"({_SECRET}[\"']?\s*[:=]\s*)(?:\"[^\"]*\"|'[^']*'|[^\s,;&}}]+)", re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")


def command_line(words: Sequence[str]) -> list[str]:
    """The words that started the process, with ``***`` in place of secrets.

    A secret is what follows a name that contains token, password, secret, key or credential, in options and in pairs
    such as ``HF_TOKEN=...`` or ``{"api_key": ...}``; and the user in ``https://user:password@host``.
    """
    shown: list[str] = []
    follows = False  # whether the word before was an option whose value is a secret
    for word in words:
        name, equals, _ = word.partition("=")
        is_secret = _OPTION.fullmatch(name) is not None
        if follows and not word.startswith("-"):
            shown.append(MASK)
        elif is_secret and equals:
            shown.append(f"{name}={MASK}")
        else:
            shown.append(_LOGIN.sub(MASK, _PAIR.sub(rf"\g<1>{MASK}", word)))
        follows = is_secret and not equals
    return shown


def plain(value: Any) -> Any:
    """A value as JSON and checkpoints may hold it; what is not plain becomes the name of its type.

    Numbers that JSON lacks become text, tuples lists, keys text. Texts under the name of a secret are masked.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, np.generic):
        return plain(value.item())
    # Their subclasses, such as those of Enum, are none of the types that a checkpoint may hold.
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(value)
    if isinstance(value, str | Path | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _unless_secret(str(key), plain(one)) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | range):
        return [plain(one) for one in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(one) for one in value), key=repr)
    return name_of(value if isinstance(value, type) or callable(value) else type(value))


def name_of(thing: Any) -> str:
    """Module and name of a class or function."""
    kind = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{kind.__module__}.{kind.__qualname__}"


def now() -> str:
    """The time in UTC, as ISO 8601 writes it."""
    return datetime.now(timezone.utc).isoformat()


def versions() -> dict[str, Any]:
    """Versions of this package and of what computes below it; None for what is not installed."""
    found: dict[str, Any] = {"lightning_igpt": __version__, "python": platform.python_version()}
    found["torch"] = str(torch.__version__)
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["cuda"] = torch.version.cuda if torch.cuda.is_available() else None
    found["cudnn"] = torch.backends.cudnn.version() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
    found["driver"] = _first(r"Kernel Module\D*(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version"))
    return found


def machine() -> dict[str, Any]:
    """The machine and its processors."""
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:  # on macOS and Windows
        usable = os.cpu_count() or 1
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "processor": _first(r"model name\s*: (.*)", Path("/proc/cpuinfo"))
        or platform.processor()
        or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "cores_usable": usable,
        "threads": torch.get_num_threads(),
    }


def arithmetic() -> dict[str, Any]:
    """Switches of torch that decide the last bits."""
    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def code() -> dict[str, Any]:
    """The repositories that the process was started in and that this package lies in; None where there is none."""
    # An installed package may lie in an environment within someone's repository, which does not make it part of that.
    tracked = _git(PACKAGE, "ls-files", "--error-unmatch", "__init__.py") is not None
    return {"working_directory": repository(Path.cwd()), "package": repository(PACKAGE) if tracked else None}


def repository(folder: Path) -> dict[str, Any] | None:
    """Commit and branch of the git repository around a folder, and its tracked files that differ from the commit.

    Returns:
        commit (None before the first), branch (None where detached), dirty, changed (number of files), and changes, a
        digest of what was changed. None without a repository or git, or where git takes more than 5 seconds.
    """
    status = _git(folder, "status", "--porcelain=v2", "--branch", "--untracked-files=no")
    if status is None:
        return None
    lines = status.decode(errors="replace").splitlines()
    heads = dict(line.removeprefix("# branch.").split(" ", 1) for line in lines if line.startswith("# branch."))
    commit, branch = heads.get("oid"), heads.get("head")
    changed = sum(not line.startswith("#") for line in lines)
    changes = _git(folder, "diff", "HEAD", "--full-index", "--no-ext-diff", "--no-textconv") if changed else None
    return {
        "commit": None if commit == "(initial)" else commit,
        "branch": None if branch == "(detached)" else branch,
        "dirty": changed > 0,
        "changed": changed,
        "changes": None if changes is None else hashlib.sha256(changes).hexdigest(),
    }


def file_identity(path: Path) -> dict[str, Any]:
    """A path and, of a file, its size and SHA-256; of one above 1 GiB the time of its last change instead."""
    found: dict[str, Any] = {"path": str(path)}
    if not path.is_file():
        return found
    status = path.stat()
    found["bytes"] = status.st_size
    if status.st_size > LARGEST:
        return found | {"modified": datetime.fromtimestamp(status.st_mtime, timezone.utc).isoformat()}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return found | {"sha256": digest.hexdigest()}


def device_names(device: torch.device, ids: Iterable[int]) -> list[str]:
    """What this machine's devices of a run are called."""
    if device.type == "cuda":
        return [torch.cuda.get_device_name(number) for number in ids]
    return [device.type]


def _unless_secret(name: str, value: Any) -> Any:
    is_text = isinstance(value, str | list | dict)
    return MASK if is_text and re.fullmatch(_SECRET, name, re.IGNORECASE) else value


def _git(folder: Path, *words: str) -> bytes | None:
    """What git says, or None where it says nothing in time. It takes no lock and runs no program of a repository's."""
    environment = {name: value for name, value in os.environ.items() if name not in _GIT_PLACES}
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(folder), *words]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT,
            env=environment | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None


def _first(pattern: str, path: Path) -> str | None:
    """The first group of the first match in a file of the system, where there is such a file."""
    try:
        found = re.search(pattern, path.read_text(errors="replace"))
    except OSError:
        return None
    return found[1].strip() if found else None
