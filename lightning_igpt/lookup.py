"""Exact nearest-color tables: one palette id for each of the 2^24 colors, cached on disk.

The table equals a float64 brute-force search, rounding and ties included, and is built in about a second. A tree of
cells over the color cube (edges of 64, 16 and 4 bytes) carries the centers that can still win in each cell. Between two
centers a and b the difference of squared distances is linear in the color, so inside a cell of width w it differs from
its value in the middle by at most ``w * sum(|a - b|)``; a center that loses by more than that to the center nearest to
the middle wins nowhere in the cell. The few that remain are compared color by color.
"""

import logging
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_igpt.files import replacing

log = logging.getLogger(__name__)

N_COLORS = 1 << 24
_FORMAT = "v2"  # changes with the rule and with the layout of the file
_LEVELS = np.arange(256) / 127.5 - 1  # (256,) float64, the value of each byte
_SPLIT = np.indices((4, 4, 4)).reshape(3, 64)  # the 64 parts of a cell
_SLACK = 1e-12  # rounding moves a squared distance (at most 12) by some 1e-14; near ties survive
_CHUNK = 512  # leaf cells compared at a time, so that their distances fit in the CPU's cache

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class _Cells(NamedTuple):
    """Cells of one size, each with the centers that can still win in it; M = counts.sum()."""

    corners: Ints  # (3, N) lowest byte of each channel
    counts: Ints  # (N,)
    ids: Ints  # (M,) centers of cell 0, then of cell 1, ...; ascending within a cell

    @property
    def starts(self) -> Ints:
        return np.cumsum(self.counts) - self.counts  # (N,)


def build_table(colors: NDArray[np.float32]) -> NDArray[np.int16]:
    """The nearest center of every 24-bit color, by the rule of ``Palette.quantize``, indexed by R << 16 | G << 8 | B.

    With v = byte / 127.5 - 1, all in float64, the distance is ``((vr-cr)**2 + (vg-cg)**2) + (vb-cb)**2``; the
    lowest id wins a tie. ``colors`` are (K,3) centers in [-1,1], K at most 32,768.
    """
    centers = np.ascontiguousarray(colors.T, dtype=np.float64)  # (3, K)
    table = np.empty(N_COLORS, dtype=np.int16)
    leaves = table.reshape(64, 4, 64, 4, 64, 4).transpose(0, 2, 4, 1, 3, 5)  # view: cell r, g, b, then inside it
    all_ids = np.arange(colors.shape[0])
    for corner in (_SPLIT * 64).T:  # one large cell after the other bounds the memory
        cells = _prune(_Cells(corner[:, None], np.array([all_ids.size]), all_ids), centers, 64)
        for edge in (16, 4):
            cells = _prune(_split(cells, edge), centers, edge)
        _fill(leaves, cells, centers)
    return table


def _split(cells: _Cells, edge: int) -> _Cells:
    """Cut every cell into 64 of the given edge, each with all centers of its parent."""
    corners = (cells.corners[:, :, None] + edge * _SPLIT[:, None, :]).reshape(3, -1)
    counts = np.repeat(cells.counts, 64)
    offsets = np.repeat(cells.starts, 64) - (np.cumsum(counts) - counts)
    return _Cells(corners, counts, cells.ids[np.arange(counts.sum()) + np.repeat(offsets, counts)])


def _prune(cells: _Cells, centers: Floats, edge: int) -> _Cells:
    """Drop the centers that win nowhere in their cell."""
    width = (edge - 1) / 127.5
    middles = _LEVELS[cells.corners] + width / 2  # (3, N)
    owner = np.repeat(np.arange(cells.counts.size), cells.counts)  # (M,)
    mine = centers[:, cells.ids]  # (3, M)
    distance = np.square(mine - middles[:, owner]).sum(axis=0)
    nearest = np.minimum.reduceat(distance, cells.starts)  # (N,)
    winners = np.flatnonzero(distance == nearest[owner])
    best = np.empty_like(cells.counts)
    best[owner[winners]] = cells.ids[winners]  # any of several equally near centers will do
    reach = width * np.abs(mine - centers[:, best[owner]]).sum(axis=0)
    keep = distance - nearest[owner] <= reach + _SLACK
    counts = np.add.reduceat(keep, cells.starts, dtype=np.int64)
    return _Cells(cells.corners, counts, cells.ids[keep])


def _fill(leaves: NDArray[np.int16], cells: _Cells, centers: Floats) -> None:
    """Write the nearest center of all 64 colors of every 4-byte cell."""
    order = np.argsort(-cells.counts, kind="stable")  # most centers first, so round j concerns a prefix
    for part in np.split(order, range(_CHUNK, order.size, _CHUNK)):
        corners, counts, starts = cells.corners[:, part], cells.counts[part], cells.starts[part]
        winner = np.repeat(cells.ids[starts], 64).reshape(-1, 4, 4, 4)  # (N, 4, 4, 4)
        levels = _LEVELS[corners[:, :, None] + np.arange(4)]  # (3, N, 4)
        least = _distances(levels[:, counts > 1], centers[:, cells.ids[starts[counts > 1]]])
        for j in range(1, counts[0]):
            n = int(np.count_nonzero(counts > j))
            ids = cells.ids[starts[:n] + j]
            distance = _distances(levels[:, :n], centers[:, ids])
            closer = distance < least[:n]  # strictly: the lowest id wins a tie
            np.copyto(winner[:n], ids[:, None, None, None], where=closer)
            np.minimum(least[:n], distance, out=least[:n])
        red, green, blue = corners // 4
        leaves[red, green, blue] = winner


def _distances(levels: Floats, centers: Floats) -> Floats:
    """(3,N,4) levels, (3,N) centers -> (N,4,4,4), summed in the order of the rule."""
    red, green, blue = np.square(levels - centers[:, :, None])  # (N, 4) each
    distance: Floats = (red[:, :, None, None] + green[:, None, :, None]) + blue[:, None, None, :]
    return distance


def cache_folder() -> Path:
    """``$LIGHTNING_IGPT_CACHE``, else ``$XDG_CACHE_HOME/lightning_igpt``, else ``~/.cache/lightning_igpt``."""
    if own := os.environ.get("LIGHTNING_IGPT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "lightning_igpt")


def cached_table(colors: NDArray[np.float32], sha256: str) -> NDArray[np.int16]:
    """:func:`build_table` of centers with this digest, kept in the cache folder, whose faults are warnings."""
    table = None
    try:
        path = cache_folder() / "palettes" / f"{sha256}.{_FORMAT}.npy"
        table = _read(path)
        if table is None:
            table = build_table(colors)
            with replacing(path) as temporary, temporary.open("wb") as file:  # no other process sees a part of it
                np.save(file, table)
                file.write(_checksum(table))
    except (OSError, RuntimeError) as error:
        log.warning("cannot cache the color table (%s); set LIGHTNING_IGPT_CACHE to a writable folder", error)
    return build_table(colors) if table is None else table


# Compiled, the build could round differently, and the cache would keep its table.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def table_for(palette: Any, device: torch.device) -> Tensor:
    """(2^24,) int16 on a device; an array is kept, of which every mode of tracing makes a tensor of its own."""
    table = torch.from_numpy(_array(palette))
    kept = device.type != "cpu" and type(table) is Tensor  # not one of FakeTensorMode's
    return _on_device(palette, device) if kept else table.to(device)


@lru_cache(maxsize=8)
def _array(palette: Any) -> NDArray[np.int16]:
    return cached_table(np.array(palette.to_list(), np.float32), palette.sha256)


@lru_cache(maxsize=8)
def _on_device(palette: Any, device: torch.device) -> Tensor:
    """One copy per device, shared by equal palettes; made by a thread, which is in none of the caller's modes."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: torch.from_numpy(_array(palette)).to(device)).result()


def _read(path: Path) -> NDArray[np.int16] | None:
    """The table in a file, followed there by the CRC-32 of its bytes; None where there is no intact file."""
    try:
        with path.open("rb") as file:
            table: NDArray[np.int16] = np.load(file, allow_pickle=False)
            intact = table.shape == (N_COLORS,) and table.dtype == np.int16 and file.read() == _checksum(table)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError):  # NumPy's errors for a damaged header and a short file
        intact = False
    if not intact:
        log.warning("the color table %s is damaged and is built again", path)
    return table if intact else None


def _checksum(table: NDArray[np.int16]) -> bytes:
    return zlib.crc32(table.data).to_bytes(4, "little")
