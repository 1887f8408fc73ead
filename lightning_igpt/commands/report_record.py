"""What made a run, from the ``run.json`` that ``RunRecord`` writes: as much as a page for others should tell.

Not here: hosts, folders and settings, which the file holds too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from lightning_igpt.callbacks.run_record import FILE

_VERSIONS = ("lightning_igpt", "python", "torch", "lightning", "datasets", "cuda")


def read_record(folder: Path, warnings: list[str]) -> dict[str, Any]:
    """The newest entry of a run's file; empty if there is none.

    Args:
        folder: The run's folder.
        warnings: Gets a line if the file is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["runs"][-1])
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        warnings.append(f"{path} is damaged and was skipped: {error!r}")
        return {}


def told(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of what is known: command, time, hardware, versions, code, seeds."""
    machine, hardware, versions, seeds = (_part(record, name) for name in ("machine", "hardware", "versions", "seeds"))
    package = _part(_part(record, "code"), "package")
    devices = hardware.get("devices") or []
    found = {
        "command": _command(record.get("command")),
        "started": str(record.get("started") or "")[:16].replace("T", " "),
        "devices": ", ".join(f"{devices.count(name)} × {name}" for name in dict.fromkeys(devices)),
        "processor": _joined(machine, processor="{}", cores="{} cores", threads="{} threads"),
        "precision": str(hardware.get("precision") or ""),
        "versions": _joined(versions, **{name: f"{name} {{}}" for name in _VERSIONS}),
        "commit": f"{package.get('commit') or ''}{' with changes' if package.get('dirty') else ''}",
        "seeds": _joined(seeds, **{name: f"{name} {{}}" for name in seeds}),
    }
    return [(name, value) for name, value in found.items() if value]


def _command(words: Any) -> str:
    """The words as they were typed, but for the program's folder."""
    if not isinstance(words, list) or not words:
        return ""
    first = PurePath(str(words[0])).name
    return " ".join(["lightning-igpt" if first == "__main__.py" else first, *map(str, words[1:])])


def _joined(values: Mapping[str, Any], **forms: str) -> str:
    return ", ".join(form.format(values[name]) for name, form in forms.items() if values.get(name) is not None)


def _part(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = values.get(name)
    return part if isinstance(part, dict) else {}
