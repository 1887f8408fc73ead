"""Exact nearest-colour tables: one palette id for each of the 2^24 colours, and their cache on disk.

Not here: what a palette is and how images become tokens (``palette.py``).

The table equals a float64 brute-force search, rounding and ties included, but is built in about a second. A
tree of cells over the colour cube (edges of 64, 16 and 4 bytes) carries the centres that can still win in
each cell. Between two centres a and b the difference of squared distances is linear in the colour, so
inside a cell of width w it differs from its value in the middle by at most ``w * sum(|a - b|)``; a centre
that loses by more than that to the one nearest to the middle wins nowhere in the cell. The few that remain
are compared colour by colour.
"""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_igpt.progress import track

log = logging.getLogger(__name__)

N_COLORS = 1 << 24
_FORMAT = "v1"  # changes whenever the rule or the layout of the file does
_LEVELS = np.arange(256) / 127.5 - 1  # (256,) float64, the value of each byte
_SPLIT = np.indices((4, 4, 4)).reshape(3, 64)  # the 64 parts of a cell
_SLACK = 1e-12  # rounding moves a squared distance (at most 12) by some 1e-14; near ties stay in the race
_CHUNK = 512  # leaf cells compared at a time, so that their distances stay in the CPU's cache

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class _Cells(NamedTuple):
    """Cells of one size, each with the centres that can still win in it; M = counts.sum()."""

    corners: Ints  # (3, N) lowest byte of each channel
    counts: Ints  # (N,)
    ids: Ints  # (M,) centres of cell 0, then of cell 1, ...; ascending within a cell

    @property
    def starts(self) -> Ints:
        return np.cumsum(self.counts) - self.counts  # (N,)


def build_table(colors: NDArray[np.float32]) -> NDArray[np.int16]:
    """The nearest centre of every 24-bit colour, by the rule of ``Palette.quantize``.

    With v = byte / 127.5 - 1, all in float64, the distance is ``((vr-cr)**2 + (vg-cg)**2) + (vb-cb)**2``; the
    lowest id wins a tie.

    Args:
        colors: (K,3) centres in [-1,1], K at most 32,768.

    Returns:
        (2^24,) ids, indexed by ``red << 16 | green << 8 | blue``.
    """
    centres = np.ascontiguousarray(colors.T, dtype=np.float64)  # (3, K)
    table = np.empty(N_COLORS, dtype=np.int16)
    leaves = table.reshape(64, 4, 64, 4, 64, 4).transpose(0, 2, 4, 1, 3, 5)  # a view: cell r, g, b, then inside it
    everyone = np.arange(colors.shape[0])
    for corner in track((_SPLIT * 64).T, "colour table"):  # one large cell after the other bounds the memory
        cells = _prune(_Cells(corner[:, None], np.array([everyone.size]), everyone), centres, 64)
        for edge in (16, 4):
            cells = _prune(_split(cells, edge), centres, edge)
        _fill(leaves, cells, centres)
    return table


def _split(cells: _Cells, edge: int) -> _Cells:
    """Cut every cell into 64 of the given edge, each with all centres of the old one."""
    corners = (cells.corners[:, :, None] + edge * _SPLIT[:, None, :]).reshape(3, -1)
    counts = np.repeat(cells.counts, 64)
    offsets = np.repeat(cells.starts, 64) - (np.cumsum(counts) - counts)
    return _Cells(corners, counts, cells.ids[np.arange(counts.sum()) + np.repeat(offsets, counts)])


def _prune(cells: _Cells, centres: Floats, edge: int) -> _Cells:
    """Drop the centres that win nowhere in their cell."""
    width = (edge - 1) / 127.5
    middles = _LEVELS[cells.corners] + width / 2  # (3, N)
    owner = np.repeat(np.arange(cells.counts.size), cells.counts)  # (M,)
    mine = centres[:, cells.ids]  # (3, M)
    distance = np.square(mine - middles[:, owner]).sum(axis=0)
    nearest = np.minimum.reduceat(distance, cells.starts)  # (N,)
    winners = np.flatnonzero(distance == nearest[owner])
    best = np.empty_like(cells.counts)
    best[owner[winners]] = cells.ids[winners]  # any of several equally near ones serves
    reach = width * np.abs(mine - centres[:, best[owner]]).sum(axis=0)
    keep = distance - nearest[owner] <= reach + _SLACK
    counts = np.add.reduceat(keep, cells.starts, dtype=np.int64)
    return _Cells(cells.corners, counts, cells.ids[keep])


def _fill(leaves: NDArray[np.int16], cells: _Cells, centres: Floats) -> None:
    """Write the nearest centre of all 64 colours of every 4-byte cell."""
    order = np.argsort(-cells.counts, kind="stable")  # most centres first: round j then concerns a prefix
    for part in np.split(order, range(_CHUNK, order.size, _CHUNK)):
        corners, counts, starts = cells.corners[:, part], cells.counts[part], cells.starts[part]
        winner = np.repeat(cells.ids[starts], 64).reshape(-1, 4, 4, 4)  # (N, 4, 4, 4)
        levels = _LEVELS[corners[:, :, None] + np.arange(4)]  # (3, N, 4)
        least = _distances(levels[:, counts > 1], centres[:, cells.ids[starts[counts > 1]]])
        for j in range(1, counts[0]):
            n = int(np.count_nonzero(counts > j))
            ids = cells.ids[starts[:n] + j]
            distance = _distances(levels[:, :n], centres[:, ids])
            closer = distance < least[:n]  # strictly: the lowest id wins a tie
            np.copyto(winner[:n], ids[:, None, None, None], where=closer)
            np.minimum(least[:n], distance, out=least[:n])
        red, green, blue = corners // 4
        leaves[red, green, blue] = winner


def _distances(levels: Floats, centres: Floats) -> Floats:
    """(3,N,4) levels, (3,N) centres -> (N,4,4,4), summed in the order that the rule writes."""
    red, green, blue = np.square(levels - centres[:, :, None])  # (N, 4) each
    distance: Floats = (red[:, :, None, None] + green[:, None, :, None]) + blue[:, None, None, :]
    return distance


def cache_folder() -> Path:
    """Where tables are kept.

    ``$LIGHTNING_IGPT_CACHE``, else ``$XDG_CACHE_HOME/lightning_igpt``, else ``~/.cache/lightning_igpt``.

    Raises:
        RuntimeError: Neither variable is set and the user has no home folder.
    """
    if own := os.environ.get("LIGHTNING_IGPT_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "lightning_igpt"


def cached_table(colors: NDArray[np.float32], sha256: str) -> NDArray[np.int16]:
    """The table of a palette from the cache folder, or freshly built and then stored there.

    A damaged file is replaced with a warning. A folder that cannot be used is a warning, never an error.

    Args:
        colors: (K,3) centres in [-1,1], K at most 32,768.
        sha256: Digest of the centres, which names the file.

    Returns:
        (2^24,) ids, as :func:`build_table` gives them.
    """
    table = None
    try:
        path = cache_folder() / "palettes" / f"{sha256}.{_FORMAT}.table"
        table = _read(path)
        if table is None:
            table = build_table(colors)
            _write(table, path)
    except (OSError, RuntimeError) as error:
        log.warning(
            "cannot keep the colour table on disk (%s); point LIGHTNING_IGPT_CACHE to a writable folder",
            error,
        )
    return build_table(colors) if table is None else table


def _read(path: Path) -> NDArray[np.int16] | None:
    """The table in a file, if there is one and it is whole: the table, then the SHA-256 of its bytes."""
    if not path.is_file():
        return None
    content = np.fromfile(path, dtype="<i2")
    table, digest = content[:N_COLORS], content[N_COLORS:].tobytes()
    if path.stat().st_size != 2 * N_COLORS + 32 or hashlib.sha256(table.data).digest() != digest:
        log.warning("the colour table %s is damaged; building it anew", path)
        return None
    return table.astype(np.int16, copy=False)


def _write(table: NDArray[np.int16], path: Path) -> None:
    """Replace a file in one step, so that other processes see the old table, the new one or none."""
    data = table.astype("<i2", copy=False).data
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.write(hashlib.sha256(data).digest())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # it is still there only if something failed
