"""Datasets of palette ids: made once from images by ``Dataset.map``, stored as Arrow, read without a copy.

``tokenize`` makes them for users, ``cached_tokens`` for ``cache=disk``, both in the cache of ``datasets``.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from lightning_igpt.data.columns import TOKENS_COLUMN, find_image_column, is_tokenized, mode_of
from lightning_igpt.data.folders import DamagedDataError, check_files, quiet
from lightning_igpt.data.readers import REPAIR, BadImage, as_grids
from lightning_igpt.data.sources import Rows
from lightning_igpt.data.splits import Part
from lightning_igpt.data.transforms import CenterCrop, Resize, square
from lightning_igpt.files import counted, shown
from lightning_igpt.images import BILINEAR, BadImageError, Filter, decode
from lightning_igpt.palette import PALETTE_COLUMN, Colors, Palette, quantize_in_one_thread

CHECKSUM_COLUMN = "crc32"  # of a row's tokens as little-endian int16
_CHECKSUM = datasets.Value("uint32")
_ID = datasets.Value("int16")  # below 32,768
_ERROR_COLUMN = "error"

DataSets = TypeVar(
    "DataSets", datasets.Dataset, datasets.IterableDataset, datasets.DatasetDict, datasets.IterableDatasetDict
)


def tokenize(
    dataset: DataSets,
    palette: Palette | str | Path | Colors = "openai",
    *,
    size: int = 32,
    image_column: str | None = None,
    num_proc: int | None = None,
    batch_size: int = 1000,
    resize: Filter = BILINEAR,
) -> DataSets:
    """Replace the images of a dataset by palette ids.

    The middle square of each image is resized and quantized. Every other column stays. ``datasets`` keeps the result in
    its cache, from which a second call reads it; ``save_to_disk``, ``to_parquet`` and ``push_to_hub`` keep it for good.

    Args:
        dataset: Images: a Dataset, or a DatasetDict, of which every split is tokenized. A stream becomes a stream.
        palette: Whatever ``Palette.load`` takes.
        size: Side of the pictures in pixels.
        image_column: Column of images; needed where not exactly one column has the type Image.
        num_proc: Processes that work at the same time; a stream takes none.
        batch_size: Images that a process reads at a time.
        resize: Filter of Pillow's: bilinear, bicubic, box or lanczos.

    Returns:
        A dataset of the same kind. In place of the images it has ``tokens``, size * size integers of 16 bits in raster
        order (of the palette ``rgb`` three times as many), ``crc32``, their checksum, which this package's data modules
        compare before they train, and ``palette``, a ClassLabel whose one name is the SHA-256 of the colors; rows of a
        stream hold the name itself.

    Raises:
        BadImageError: An image cannot be used; the message names its row and path.
        TypeError: Not a dataset.
        ValueError: There is no column of images, the data are tokenized already, or an option is out of range.
    """
    palette = Palette.load(palette)
    palette.quantize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))  # builds its table, else each process would
    if resize not in get_args(Filter):
        raise ValueError(f"resize is {resize!r}; it must be one of: {', '.join(get_args(Filter))}")
    options = (palette, CenterCrop(size, resize), image_column, num_proc, batch_size)
    if not isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        return _tokenize(dataset, "the dataset", *options)
    splits = dataset.items()
    return type(dataset)({name: _tokenize(part, f"the split {name!r}", *options) for name, part in splits})


def _tokenize(
    dataset: Rows,
    where: str,
    palette: Palette,
    crop: CenterCrop,
    wanted: str | None,
    num_proc: int | None,
    at_once: int,
) -> Rows:
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        text = f"tokenize takes a Dataset or a DatasetDict, not a {type(dataset).__name__}"
        raise TypeError(f"{text}; datasets.load_dataset opens files, folders and datasets of the hub")
    features = dataset.features
    if features is None:
        raise ValueError(f"{where} is a stream of unknown columns; name them by stream.cast(features)")
    if num_proc is not None and isinstance(dataset, datasets.IterableDataset):
        raise ValueError(f"num_proc is {num_proc}, but {where} is a stream; the workers of its DataLoader share it")
    if is_tokenized(features):
        raise ValueError(f"{where} is tokenized already: its columns are {', '.join(features)}")
    if taken := [name for name in (TOKENS_COLUMN, CHECKSUM_COLUMN, PALETTE_COLUMN) if name in features]:
        raise ValueError(f"{where} already has a column {taken[0]!r}, which would be lost; rename it")
    column = find_image_column(features, wanted, where=where)
    size = crop.size
    if size < 1:
        raise ValueError(f"size is {size}; an image has a side of at least 1 pixel")
    mode = mode_of(dataset, column)
    dataset = dataset.with_format(None).cast_column(column, datasets.Image(mode=mode, decode=False))
    others = {name: feature for name, feature in dataset.features.items() if name != column}
    label = datasets.ClassLabel(names=[palette.sha256])
    ids = datasets.List(_ID, length=palette.tokens_per_pixel * size * size)
    columns = {TOKENS_COLUMN: ids, PALETTE_COLUMN: label, CHECKSUM_COLUMN: _CHECKSUM}
    features = datasets.Features({**others, **columns})
    if isinstance(dataset, datasets.Dataset) and not len(dataset):  # map would leave such a split as it is
        return datasets.Dataset.from_dict({name: [] for name in features}, features=features, split=dataset.split)
    processes = {} if num_proc is None else {"num_proc": num_proc}  # a stream has no such option
    options = {"batch_size": at_once, "with_indices": True, "remove_columns": [column], "features": features}
    squares = TokenSquares(palette, column, crop, mode=mode)
    result = dataset.map(squares, batched=True, **options, **processes)
    text = f"Pictures of {size} x {size} pixels as ids in raster order of an Image GPT palette of {len(palette)} colors"
    result.info.description = f"{text}. SHA-256 of the palette: {palette.sha256}. Resize filter: {crop.filter}"
    return result


def _checksums(tokens: NDArray[Any]) -> NDArray[np.uint32]:
    """The CRC-32 of each row (rows, T), as CHECKSUM_COLUMN holds it."""
    return np.array([zlib.crc32(row) for row in np.ascontiguousarray(tokens, "<i2")], np.uint32)


@dataclass(frozen=True)
class TokenSquares:
    """For ``Dataset.map``: the tokens of ``n_crops`` squares of each image; crop c of row r is draw r * n_crops + c."""

    palette: Palette
    image_column: str
    resize: Resize
    n_crops: int = 1
    mode: str | None = None  # as datasets.Image(mode=...) asks for
    remote: bool = False  # whether rows may name images by their addresses
    skip: bool = False  # write what is wrong with an image into the column "error" instead of raising
    files: str | None = None  # of a cache: changes when image files outside of the dataset do

    def __call__(self, batch: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        """Tokens int16 (rows, n_crops * T), checksums; for a cache errors, "" where there are none, else palettes.

        BadImageError names the row and path of an image that cannot be used.
        """
        size, errors = self.resize.size, [""] * len(rows)
        pixels = np.zeros((len(rows), self.n_crops, 3, size, size), np.uint8)
        for index, (row, value) in enumerate(zip(rows, batch[self.image_column], strict=True)):
            try:
                image = decode(value, mode=self.mode, remote=self.remote)
            except BadImageError as error:
                if not self.skip:
                    path = f" ({shown(value['path'])})" if value and value.get("path") else ""
                    raise BadImageError(f"row {row}{path}: {error}") from error
                errors[index] = str(error)
                continue
            for crop in range(self.n_crops):
                pixels[index, crop] = square(self.resize, image, row * self.n_crops + crop)
        tokens = quantize_in_one_thread(self.palette, pixels.reshape(-1, 3, size, size)).reshape(len(rows), -1)
        last = {PALETTE_COLUMN: [self.palette.sha256] * len(rows)} if self.files is None else {_ERROR_COLUMN: errors}
        return {TOKENS_COLUMN: tokens, CHECKSUM_COLUMN: _checksums(tokens)} | last


@contextmanager
def _first_on_its_node(trainer: Trainer | None) -> Iterator[None]:
    """The first process of each node runs the block before the others do."""
    if trainer is not None and trainer.local_rank > 0:
        trainer.strategy.barrier("token cache")
    yield
    if trainer is not None and trainer.local_rank == 0:
        trainer.strategy.barrier("token cache")


def cached_tokens(
    trainer: Trainer | None,
    part: Part,
    column: str,
    palette: Palette,
    resize: Resize,
    *,
    skip: bool = False,
    n_crops: int = 1,
    num_workers: int = 0,
) -> TokenReader:
    """Reads a part from tokens of its whole split in the cache of ``datasets``; one process of a node makes them."""
    images = part.dataset.select_columns([column])
    if not images.cache_files:  # map keeps only what it makes of files
        kind: dict[str, Any] = {"features": images.features, "split": datasets.Split(str(images.split or "images"))}
        with _first_on_its_node(trainer):
            images = datasets.Dataset.from_generator(_rows, gen_kwargs={"images": images}, **kind)
    each = palette.tokens_per_pixel
    files, length = _state_of_files(images, column), n_crops * each * resize.size**2
    columns = {TOKENS_COLUMN: datasets.List(_ID, length=length), CHECKSUM_COLUMN: _CHECKSUM}
    features = datasets.Features({**columns, _ERROR_COLUMN: datasets.Value("string")})
    options: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": [column], "features": features}
    at_once = max(1, min(1000, 2**22 // length))
    options |= {"batch_size": at_once, "num_proc": num_workers or None}
    options |= {"desc": f"tokens, {counted(n_crops, 'square')} each"}
    palette.quantize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))  # builds its table, else each process would
    squares = TokenSquares(palette, column, resize, n_crops, mode_of(images, column), part.remote, skip, files)
    try:
        with quiet(), _first_on_its_node(trainer):
            try:
                made = images.map(squares, **options)
                TokenReader(replace(part, rows=None), made, TOKENS_COLUMN, resize.size, n_crops, each)
            except (DamagedDataError, pa.ArrowException, OSError) as error:
                rank_zero_warn(f"rebuilding the token cache: {error}")
                made = images.map(squares, load_from_cache_file=False, **options)
    except BadImageError as error:
        where = f"{part.source}, split {part.split!r}"
        raise BadImageError(f"{where}, {error}. {REPAIR}") from error
    errors = made.with_format("arrow")[:][_ERROR_COLUMN].to_pylist()
    wrong = [row for row, error in enumerate(errors) if error]
    paths = [value and value["path"] for value in images[wrong][column]] if wrong else []
    bad = {row: BadImage(part.describe(row, path), errors[row]) for row, path in zip(wrong, paths, strict=True)}
    return TokenReader(part, made, TOKENS_COLUMN, resize.size, n_crops, each, bad, checked=True)


def _rows(images: datasets.Dataset) -> Any:
    yield from images


def _state_of_files(images: datasets.Dataset, column: str) -> str:
    """A digest of sizes and dates of the files that rows name without holding their bytes."""
    digest = hashlib.sha256()
    for chunk in images.with_format("arrow")[:][column].chunks:
        for path in chunk.field("path").filter(chunk.field("bytes").is_null()).to_pylist():
            if path and Path(path).is_file():
                status = Path(path).stat()
                digest.update(f"{status.st_size} {status.st_mtime_ns} ".encode())
    return digest.hexdigest()


class TokenReader:
    """Reads a column of lists of n_crops * size * size * tokens_per_pixel tokens in place, over its Arrow chunks.

    Every pass over the part takes the next of the squares. ``bad`` are rows whose images could not be read when the
    tokens were made; ``checked`` says that the checksums were compared before.
    """

    def __init__(
        self,
        part: Part,
        dataset: datasets.Dataset,
        column: str,
        size: int,
        n_crops: int = 1,
        tokens_per_pixel: int = 1,
        bad: Mapping[int, BadImage] | None = None,
        checked: bool = False,
    ) -> None:
        self.part, self.size, self.n_crops, self.bad = part, size, n_crops, bad or {}
        self.tokens_per_pixel = tokens_per_pixel
        self._made_of = (part, dataset, column, size, n_crops, tokens_per_pixel, bad, True)
        files = [str(file["filename"]) for file in dataset.cache_files]
        if not checked:
            check_files(files)
        self._views: list[NDArray[Any]] = []  # the chunks, (rows, n_crops * T) each
        (chunked,) = dataset.select_columns([column]).with_format("arrow")[:].columns
        length, self._ends = n_crops * tokens_per_pixel * size**2, np.cumsum([len(chunk) for chunk in chunked.chunks])
        for chunk, end in zip(chunked.chunks, self._ends, strict=True):
            lengths = pc.list_value_length(chunk).fill_null(0).to_numpy(zero_copy_only=False)
            if (lengths != length).any():
                wrong = int(np.flatnonzero(lengths != length)[0])
                row = part.describe(int(end) - len(chunk) + wrong)
                wanted = f"{'3 x ' * (tokens_per_pixel == 3)}{size}^2"
                raise ValueError(f"{row}: there are {lengths[wrong]} tokens, not {wanted}")
            self._views.append(chunk.flatten().to_numpy(zero_copy_only=False).reshape(-1, length))
        if not checked and CHECKSUM_COLUMN in dataset.column_names:
            sums = np.concatenate([_checksums(view) for view in self._views])
            if len(damaged := np.flatnonzero(sums != dataset.with_format("numpy")[CHECKSUM_COLUMN][:])):
                where = f" in {', '.join(files[:3])}" if files else ""
                text = f"{part.describe(int(damaged[0]))}: the tokens{where} differ from their checksum"
                raise DamagedDataError(f"{text}; restore the file, or tokenize the images again")

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenReader, self._made_of  # where workers are spawned, each maps the file for itself

    def read(self, places: list[int], samples: list[int]) -> tuple[NDArray[Any], dict[int, BadImage]]:
        rows = np.asarray(self.part.rows_of(places))
        chunks = np.searchsorted(self._ends, rows, side="right")
        area, turns = self.tokens_per_pixel * self.size**2, len(self.part)
        flat = np.empty((len(rows), area), np.int16)
        for index, (chunk, row) in enumerate(zip(chunks.tolist(), (rows - self._ends[chunks]).tolist(), strict=True)):
            start = samples[index] // turns % self.n_crops * area
            flat[index] = self._views[chunk][row, start : start + area]  # row counts from the end of the chunk
        wrong = {i: self.bad[row] for i, row in enumerate(rows.tolist()) if row in self.bad}
        return as_grids(flat, self.size), {i: bad._replace(number=places[i]) for i, bad in wrong.items()}
