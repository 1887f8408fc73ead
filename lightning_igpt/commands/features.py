"""``lightning-igpt features``: pooled features of images as Parquet, for datasets, scikit-learn and FAISS."""

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from torch import Tensor
from tqdm import tqdm

from lightning_igpt.commands.arguments import check_file
from lightning_igpt.commands.complete import DEFAULT, pick_device
from lightning_igpt.commands.images import open_images, rows_of, to_tensor
from lightning_igpt.distances import fingerprint
from lightning_igpt.files import replacing, shown
from lightning_igpt.images import BadImageError, decode, resize_center_crop
from lightning_igpt.weights import Pretrained, load_pretrained

ROWS = 1000  # of a row group, and of a part that an interrupted run keeps


def features(
    source: str,
    pretrained: str = DEFAULT,
    out: str = "features.parquet",
    layers: Literal["all"] | list[range] | None = None,
    pool: Literal["mean", "last"] = "mean",
    limit: int | None = None,
    split: str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    palette: str | None = None,
) -> None:
    """Write the features of images as Parquet: a row for each image, a list of float32 for each layer.

    Columns: row, image (its name), label and class_name where there are labels, and layer_8 and so on. The same command
    continues where an interrupted one ended, from parts in a folder next to the file, features.parquet.part.

    Args:
        source: Images: a folder of images, Parquet, a hub id, digits or emoji.
        pretrained: The network: an embedded one (photos, emoji), a .ckpt file or run folder, a Hugging Face folder or
            hub id, or an OpenAI checkpoint.
        out: The Parquet file. Missing folders are made.
        layers: Numbers such as 4 8 or 8-16, or all: 0 is the input of the first block, n_layer the final norm. Default:
            n_layer // 2.
        pool: Over positions: mean, as linear probes take it, or last, the position that has seen most pixels.
        limit: How many images, from the first on; default all.
        split: Split of a dataset; default test, else validation, else train.
        batch_size: Images per forward pass.
        device: cpu, cuda, mps, or auto.
        palette: That of the training, where the source holds none: openai, gray:16, a .npy file, a folder or hub id.
    """
    path = Path(out)
    check_file(path, "--out", "features.parquet", ".parquet")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size is {batch_size} and limit {limit}; both must be at least 1")
    loaded = load_pretrained(pretrained, palette=palette)
    asked, width = chosen(layers, loaded.config.n_layer), loaded.config.n_embd
    opened, split = open_images(source, split)
    try:
        labels = opened.labels(split).tolist()
    except ValueError as error:  # as in a split whose labels are kept secret
        print(shown(f"without labels: {error}"))
        labels = None
    n = min(len(opened.splits[split]), limit or len(opened.splits[split]))
    facts = {"network": loaded.origin, "network_weights": fingerprint(loaded.network), "pool": pool, "source": source}
    facts |= {"split": split, "n_images": n, "resize": f"bilinear to {loaded.config.image_size}"}
    columns = [("row", pa.int64()), ("image", pa.string())]
    columns += [("label", pa.int64()), ("class_name", pa.string())] if labels else []
    columns += [(f"layer_{layer}", pa.list_(pa.float32(), width)) for layer in asked]
    schema = pa.schema(columns, metadata={"lightning_igpt": json.dumps(facts)})
    print(shown(f"{loaded.origin}, layers {' '.join(map(str, asked))}: {n} images of {source}, split {split}"))
    loaded.network.to(pick_device(device)).eval()
    folder = path.with_name(f"{path.name}.part")
    parts = [(start, folder / f"{start:09d}.parquet") for start in range(0, n, ROWS)]
    for start, part in tqdm(parts, unit="part", disable=None):
        if part.exists():
            check_part(part, schema)
            continue
        rows = list(itertools.islice(rows_of(opened, split, n, spread=False, start=start), ROWS))
        pooled = pooled_features(loaded, rows, asked, pool, batch_size)
        values: list[Any] = [range(start, start + len(rows)), [name for name, _ in rows]]
        if labels:
            own = labels[start : start + len(rows)]
            values += [own, [(opened.class_names or [])[label] for label in own]]
        values += [pa.FixedSizeListArray.from_arrays(layer.ravel(), width) for layer in pooled]
        with replacing(part) as temporary:
            pq.write_table(pa.table(values, schema), temporary)
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for _, part in parts:
            writer.write_table(pq.read_table(part))
    shutil.rmtree(folder)
    print(f"wrote {path}")


def chosen(layers: Sequence[Any] | None, n_layer: int) -> list[int]:
    """Layer numbers in ascending order, of ranges or ``all``; the middle by default."""
    every = range(n_layer + 1)
    asked = sorted(set(itertools.chain.from_iterable([every] if "all" in (layers or []) else layers or [])))
    if asked and asked[-1] > n_layer:
        raise ValueError(f"asked for the layers {asked}; this network has 0 to {n_layer}")
    return asked or [n_layer // 2]


def check_part(part: Path, schema: Any) -> None:
    """Raise ValueError unless a part that is there already belongs to this run."""
    stored = pq.read_schema(part)
    if (stored.names, stored.metadata) != (schema.names, schema.metadata):
        facts = (stored.metadata or {}).get(b"lightning_igpt", b"").decode()
        text = f"{part.parent} holds features of an interrupted run with other settings"
        raise ValueError(f"{text} ({', '.join(stored.names)}; {facts}); delete it, or name another file by --out")


@torch.no_grad()
def pooled_features(
    loaded: Pretrained, rows: Sequence[tuple[str, Any]], layers: list[int], pool: str, batch_size: int
) -> np.ndarray[Any, Any]:
    """Float32 (layers, R, D) of undecoded images; a BERT network sees all pixels."""
    network, place, parts = loaded.network, loaded.network.wpe.weight.device, list[Tensor]()
    for first in range(0, len(rows), batch_size):
        pixels = []
        for name, value in rows[first : first + batch_size]:
            try:
                pixels.append(to_tensor(resize_center_crop(decode(value), loaded.config.image_size)))
            except BadImageError as error:
                raise ValueError(f"{name}: {error}; repair or remove it, then run the same command") from error
        tokens = loaded.palette.quantize(torch.stack(pixels).to(place))
        masked = torch.zeros_like(tokens, dtype=torch.bool) if loaded.config.objective == "bert" else None
        parts.append(network.features(tokens, layers, masked=masked, skip=-1 if pool == "last" else 0).float().cpu())
    pooled: np.ndarray[Any, Any] = torch.cat(parts).transpose(0, 1).contiguous().numpy()
    return pooled
