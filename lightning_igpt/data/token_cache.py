"""Images as tokens in a memory-mapped file, made once and shared by every run with the same palette and size.

A cache is a folder of two files. ``tokens.bin`` holds uint16 (images, crops, S * S), little-endian; ``manifest.json``
says what of. It is written beside its place and renamed, under a lock, so that a folder that is there is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lightning_igpt.data.bad_images import BadImage, stand_ins
from lightning_igpt.data.dataset import Reading
from lightning_igpt.data.readers import BadImagePolicy, ImageReader
from lightning_igpt.data.splits import Part
from lightning_igpt.data.token_building import TokenBuilder
from lightning_igpt.images import BadImageError
from lightning_igpt.palette import Palette

log = logging.getLogger(__name__)

_FORMAT = 1  # changes whenever the files do
_TOKENS, _MANIFEST = "tokens.bin", "manifest.json"
_NAMES = (
    "format",
    "source",
    "split",
    "image_column",
    "palette_sha256",
    "image_size",
    "transform",
    "n_crops",
)  # what a folder is for
_CONTENTS = ("fingerprint", "n_images")  # what must be as it was


@dataclass(frozen=True)
class TokenFile:
    """A cache that was opened.

    Args:
        path: Its folder.
        manifest: What it is of.
    """

    path: Path
    manifest: dict[str, Any]

    def tokens(self) -> NDArray[np.int16]:
        """(images, crops, S * S), read where it lies; ids are below 32,768."""
        shape = (self.manifest["n_images"], self.manifest["n_crops"], self.manifest["image_size"] ** 2)
        # A plain array over the mapping: the class memmap would take part in every indexing.
        mapped = np.memmap(self.path / _TOKENS, dtype="<u2", mode="r", shape=shape)
        return np.asarray(mapped).view(np.int16)

    @property
    def bad(self) -> dict[int, BadImage]:
        """Rows that could not be read, and why; their tokens mean nothing."""
        return {int(row): BadImage(place, reason) for row, place, reason in self.manifest["bad"]}


class TokenFileReader:
    """Reads a part from a cache of its whole split.

    Args:
        part: The rows.
        file: The cache.
        policy: What happens to rows that could not be read when it was made.

    Raises:
        BadImageError: There are such rows and the policy is "error".
    """

    def __init__(self, part: Part, file: TokenFile, policy: BadImagePolicy) -> None:
        self.part, self.file, self.policy, self.bad = part, file, policy, file.bad
        if self.bad and policy.action == "error":
            first = next(iter(self.bad.values()))
            raise BadImageError(
                f"{len(self.bad)} images cannot be read; the first is {first.place}: {first.reason}. Repair or remove "
                "them; on_bad_image=skip leaves such images out"
            )
        self._tokens = file.tokens()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_tokens"}  # a mapping, not its bytes

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokens = self.file.tokens()

    def read(self, places: list[int], samples: list[int]) -> Reading:
        """Read tokens, int16 (B, 1, S, S); every pass over the part takes the next of the crops."""
        bad: list[BadImage] = []
        rows = self.part.rows_of(places)
        if self.bad and not self.bad.keys().isdisjoint(rows):
            places, samples, bad = self._without_bad(places, rows, samples)
            rows = self.part.rows_of(places)
        n_crops, side = self._tokens.shape[1], self.file.manifest["image_size"]
        crops = [sample // len(self.part) % n_crops for sample in samples]
        return Reading(self._tokens[rows, crops].reshape(-1, 1, side, side), places, samples, bad)

    def _without_bad(
        self, places: list[int], rows: list[int], samples: list[int]
    ) -> tuple[list[int], list[int], list[BadImage]]:
        bad = [self.bad[row]._replace(number=place) for place, row in zip(places, rows, strict=True) if row in self.bad]
        if not self.policy.replace:
            good = [number for number, row in enumerate(rows) if row not in self.bad]
            if not good:
                raise BadImageError(
                    f"none of the {len(rows)} images of a batch can be read; the first is {bad[0].place}: "
                    f"{bad[0].reason}"
                )
            return [places[i] for i in good], [samples[i] for i in good], bad
        places = [self._stand_in(place) if row in self.bad else place for place, row in zip(places, rows, strict=True)]
        return places, samples, bad

    def _stand_in(self, place: int) -> int:
        for other in stand_ins(self.policy.seed, place, len(self.part)):
            if self.part.rows_of([other])[0] not in self.bad:
                return other
        raise BadImageError(f"found no image of {self.part.source}, split {self.part.split!r}, that can be read")


def open_token_cache(
    folder: Path,
    reader: ImageReader,
    palette: Palette,
    *,
    n_crops: int = 1,
    num_workers: int = 0,
    max_bad_share: float = 0.0,
) -> TokenFile:
    """Open the cache of a split, and make it first where there is none that fits.

    Safe in any number of processes at once: one makes it, the others wait and then use it.

    Args:
        folder: Where caches are kept.
        reader: Reads the whole split; its resize gives the size.
        palette: Colours.
        n_crops: Crops of each image, drawn by the reader's resize.
        num_workers: Processes to decode in; 0 takes up to eight for larger sets.
        max_bad_share: Largest share of images that may be left out.

    Raises:
        BadImageError: An image cannot be read and the reader's policy is "error", or too many cannot be.
        OSError: There is too little space, or the folder cannot be written.
    """
    manifest = describe(reader, palette, n_crops)
    path = folder / folder_name(manifest)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        found = _read_manifest(path, manifest)
        if isinstance(found, dict):
            return TokenFile(path, found)
        shutil.rmtree(_unfinished(path), ignore_errors=True)  # of a process that was stopped
        (log.warning if path.exists() else rank_zero_info)(f"making the token cache {path}: {found}")
        builder = TokenBuilder(reader, palette, n_crops, num_workers=num_workers, max_bad_share=max_bad_share)
        manifest["bad"] = _write(_unfinished(path), builder, manifest)
        if path.exists():
            shutil.rmtree(path)  # runs that read it keep their mapping
        _unfinished(path).rename(path)
        return TokenFile(path, manifest)


def describe(reader: ImageReader, palette: Palette, n_crops: int) -> dict[str, Any]:
    """The manifest of a cache, but for what is bad in it."""
    part = reader.part
    return {
        "format": _FORMAT,
        "source": " + ".join(_name(member) for member in part.members or (part,)),
        "split": part.split,
        "image_column": reader.image_column,
        "palette_sha256": palette.sha256,
        "image_size": reader.resize.size,
        "transform": repr(reader.resize),
        "n_crops": n_crops,
        "fingerprint": fingerprint(part, reader.image_column),
        "n_images": len(part.dataset),
    }


def fingerprint(part: Part, image_column: str) -> str:
    """Changes when the images do: the data set's own, and size and date of image files that lie outside of it."""
    digest, paths = hashlib.sha256(), _outside(part, image_column)
    if len(paths) < len(part.dataset):  # else all is outside, and no way to write the paths makes a difference
        digest.update(part.dataset._fingerprint.encode())
    for name in map(os.path.abspath, paths):
        try:
            status = Path(name).stat()
        except (OSError, TypeError, ValueError):  # it will be told of when it is read
            continue
        digest.update(f"{name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _outside(part: Part, image_column: str) -> list[str]:
    """The paths of images whose bytes are not in the data set."""
    images = part.dataset.select_columns([image_column]).with_format("arrow")[:][image_column]
    pieces = images.chunks  # joined they would be copied, and fail beyond 2 GiB
    paths = [piece.field("path").filter(piece.field("bytes").is_null()).to_pylist() for piece in pieces]
    return [path for some in paths for path in some if path is not None]


def _name(part: Part) -> str:
    """The source, whatever the working folder."""
    path = Path(part.source).expanduser()
    if path.exists():
        return str(path.resolve())
    # A data set in memory has no name: another one is another cache, not a newer one.
    return part.source + (f" {part.dataset._fingerprint}" if part.source.startswith("the ") else "")


def folder_name(manifest: dict[str, Any]) -> str:
    """A name that people recognise, and a digest of all that tells caches apart."""
    digest = hashlib.sha256(json.dumps([manifest[name] for name in _NAMES]).encode()).hexdigest()
    words = (manifest["source"], manifest["split"], f"{manifest['image_size']}px", digest[:12])
    return "-".join(re.sub(r"[^\w.]+", "_", word)[-40:].strip("_") for word in words)


def _read_manifest(path: Path, wanted: dict[str, Any]) -> dict[str, Any] | str:
    """The manifest of the cache at ``path`` if it fits, else why not."""
    try:
        found: dict[str, Any] = json.loads((path / _MANIFEST).read_text())
        size = (path / _TOKENS).stat().st_size
    except FileNotFoundError:
        return f"{wanted['n_images']:,} images, {wanted['n_crops']} crop(s) each"
    except (OSError, ValueError) as error:
        return f"the one there cannot be read ({error})"
    if not isinstance(found, dict) or "bad" not in found:
        return f"the one there cannot be read ({_MANIFEST} is damaged)"
    for name in (*_NAMES, *_CONTENTS):
        if found.get(name) != wanted[name]:
            return f"the images have changed since ({name} was {found.get(name)}, is {wanted[name]})"
    if size != n_bytes(wanted):
        return f"the one there has {size} bytes of tokens instead of {n_bytes(wanted)}"
    return found


def n_bytes(manifest: dict[str, Any]) -> int:
    """Size of the tokens."""
    return int(manifest["n_images"] * manifest["n_crops"] * manifest["image_size"] ** 2 * 2)


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _reserve(file: int, size: int) -> None:
    """Make the file that large; a disk that others fill meanwhile would otherwise end the process by a bus error."""
    os.truncate(file, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # of file systems that cannot
                raise


def _write(path: Path, builder: TokenBuilder, manifest: dict[str, Any]) -> list[tuple[int, str, str]]:
    """Write both files; return what could not be read."""
    path.mkdir(parents=True)
    free, needed = shutil.disk_usage(path).free, n_bytes(manifest)
    if needed > free:
        path.rmdir()
        raise OSError(
            f"the token cache needs {needed / 2**30:.2f} GiB, but {path.parent} has {free / 2**30:.2f} GiB free; set "
            "cache_dir to another disk, or cache=none"
        )
    shape = (manifest["n_images"], manifest["n_crops"], manifest["image_size"] ** 2)
    try:
        with (path / _TOKENS).open("wb") as file:
            _reserve(file.fileno(), needed)
        tokens = np.memmap(path / _TOKENS, dtype="<u2", mode="r+", shape=shape)
        bad = builder.fill(tokens)
        tokens.flush()
        with (path / _TOKENS).open("rb+") as file:
            os.fsync(file.fileno())
        (path / _MANIFEST).write_text(json.dumps({**manifest, "bad": bad}, indent=1))
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return bad
