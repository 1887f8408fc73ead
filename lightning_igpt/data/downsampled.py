"""The official downsampled ImageNet: ``train_data_batch_1.npz`` to ``_10.npz`` and ``val_data.npz``.

Source: Chrabaszcz, Loshchilov and Hutter, "A Downsampled Variant of ImageNet as an Alternative to the CIFAR datasets"
(arXiv 1707.08819). Each file has ``data``, uint8 (N, 3 S^2) with all of red, then green, then blue, each in raster
order, and ``labels`` from 1 to 1000, in another order of the classes than elsewhere.
"""

import io
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import isqrt
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError
from numpy.typing import NDArray
from PIL import Image

from lightning_igpt.files import shown

N_CLASSES = 1000
SPLITS = {"train_data": "train", "val_data": "validation"}  # by how a file's name begins


class NotThisFormatError(ValueError):
    """A file holds something else than downsampled images."""


def open_npz(paths: Sequence[Path]) -> datasets.DatasetDict:
    """The splits of such files, with ``image`` (PNG) and ``label``; ``datasets`` keeps them in its cache."""
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(paths, key=lambda path: (len(path.name), path.name)):  # batch 2 comes before batch 10
        split = next((split for start, split in SPLITS.items() if path.stem.startswith(start)), None)
        if split is None:
            raise ValueError(f"{shown(path)}: the files are called train_data_batch_1.npz and val_data.npz; rename it")
        files[split].append(path)
    labels = datasets.ClassLabel(names=[str(number) for number in range(1, N_CLASSES + 1)])
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    result = datasets.DatasetDict()
    for split, members in files.items():
        states = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in members]
        kind: Any = {"features": features, "split": datasets.Split(split)}
        try:
            result[split] = datasets.Dataset.from_generator(_rows, gen_kwargs={"states": tuple(states)}, **kind)
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, NotThisFormatError):
                raise error.__cause__ from None
            raise
    return result


def _rows(states: Sequence[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    for name, *_ in states:
        images, labels = read_npz(Path(name))
        for image, label in zip(images, labels.tolist(), strict=True):
            Image.fromarray(image).save(file := io.BytesIO(), "PNG", compress_level=1)
            yield {"image": {"bytes": file.getvalue(), "path": None}, "label": label - 1}


def read_npz(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 (N, S, S, 3) and labels 1 to 1000 of a file; NotThisFormatError where it holds something else."""
    with np.load(path, allow_pickle=False) as file:
        if missing := {"data", "labels"} - set(file.files):
            has = ", ".join(file.files) or "none"
            raise NotThisFormatError(f"{shown(path)} has no array {min(missing)!r}; it has {has}")
        data, labels = file["data"], np.asarray(file["labels"])
    side = isqrt(data.shape[-1] // 3) if data.ndim == 2 else 0
    if data.dtype != np.uint8 or not side or data.shape != (len(labels), 3 * side**2):
        kinds = f"data {data.dtype} {data.shape} and labels {labels.shape}"
        raise NotThisFormatError(f"{shown(path)} has {kinds}; they must be uint8 (N, 3 * S * S) and (N,)")
    if len(labels) and not 1 <= labels.min() <= labels.max() <= N_CLASSES:
        what = f"labels from {labels.min()} to {labels.max()}"
        raise NotThisFormatError(f"{shown(path)} has {what}; they are 1 to {N_CLASSES}")
    return data.reshape(-1, 3, side, side).transpose(0, 2, 3, 1), labels.astype(np.int64)
