"""Several sources of images as one part to train on."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np

from lightning_igpt.data.sources import Source
from lightning_igpt.data.splits import Part


def check_weights(n_sources: int, weights: Sequence[float] | None) -> None:
    """Raise ValueError unless there are sources and, if weights, one for each of several."""
    if n_sources < 1:
        raise ValueError("source is an empty list; name at least one source")
    if weights is None:
        return
    if n_sources < 2:
        raise ValueError("source_weights mixes several sources; give source as a list, or leave the weights out")
    if len(weights) != n_sources:
        raise ValueError(f"there are {n_sources} sources but {len(weights)} source_weights; give one for each")


def mix(sources: Sequence[Source], parts: Sequence[Part]) -> Part:
    """The parts one after the other, with the first one's image column and no labels.

    Raises:
        ValueError: Some hold tokens and others images, or tokens of different palettes or sizes; or rows would be
            trained and validated on.
    """
    first, column = sources[0], sources[0].image_column
    for source in sources:
        if source.tokens != first.tokens:
            raise ValueError(
                f"{first.name} and {source.name} cannot be mixed: all must be images, or tokens of one palette and size"
            )
    for part in parts[1:]:
        if parts[0].rows is not None and part.dataset._fingerprint == parts[0].dataset._fingerprint:
            raise ValueError(
                f"{part.source} is in the mix twice, so what is held out of it once is trained on all the same; name "
                "it once, or set val_split, or val_fraction=0"
            )
    features = parts[0].dataset.select_columns([column]).features
    tables = [
        part.dataset.select_columns([source.image_column]).rename_columns({source.image_column: column})
        for source, part in zip(sources, parts, strict=True)
    ]
    # A cast writes all rows to the disk, hence only where it changes something.
    tables = [table if table.features == features else table.cast(features) for table in tables]
    starts = np.cumsum([0, *(len(part.dataset) for part in parts)])
    rows = [
        start + (np.arange(len(part.dataset)) if part.rows is None else part.rows)
        for start, part in zip(starts, parts, strict=False)
    ]
    name = " + ".join(part.source for part in parts)
    return Part(name, parts[0].split, datasets.concatenate_datasets(tables), np.concatenate(rows), tuple(parts))


def mix_streams(
    streams: Sequence[datasets.IterableDataset], columns: Sequence[str], weights: Sequence[float] | None, seed: int
) -> datasets.IterableDataset:
    """Streams interleaved by weights (in equal shares without), each begun anew when it ends until all have ended."""
    renamed = [
        stream.select_columns([column])
        if column == columns[0]
        else stream.select_columns([column]).rename_columns({column: columns[0]})
        for stream, column in zip(streams, columns, strict=True)
    ]
    shares = None if weights is None else [weight / sum(weights) for weight in weights]
    return datasets.interleave_datasets(renamed, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
