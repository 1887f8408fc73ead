"""``lightning-igpt features``: pooled features of images as Parquet, for datasets, scikit-learn and FAISS."""

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_igpt.commands.arguments import check_file
from lightning_igpt.commands.complete import DEFAULT, pick_device
from lightning_igpt.commands.images import images_of, open_images, squares
from lightning_igpt.distances import PooledLayers, fingerprint, image_features
from lightning_igpt.files import replacing, shown
from lightning_igpt.modules.heads import choose_layers
from lightning_igpt.weights import load_pretrained

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

    Columns: row, image (its name), label (if there is one), layer_8 and so on. After an interruption, the same command
    continues from the parts in the folder features.parquet.part.

    Args:
        out: The Parquet file. Missing folders are made.
        layers: Numbers such as 4 8 or 8-16, or all: 0 is the input of the first block, n_layer the final norm. Default:
            n_layer // 2.
        pool: Pooling over positions: mean, as for linear probes, or last, the position that sees the most pixels.
    """
    path, folder = Path(out), Path(f"{out}.part")
    check_file(path, "--out", "features.parquet", ".parquet")
    place = pick_device(device)
    loaded = load_pretrained(pretrained, palette=palette)
    config = loaded.config
    numbers = sorted({number for span in layers or () if isinstance(span, range) for number in span})
    asked = choose_layers("all" if "all" in (layers or ()) else numbers or [config.n_layer // 2], config.n_layer)
    opened, split = open_images(source, split)
    try:
        labels = opened.labels(split).tolist()
    except ValueError as error:  # as in a split whose labels are kept secret
        print(shown(f"without labels: {error}"))
        labels = None
    n = min(len(opened.splits[split]), limit or len(opened.splits[split]))
    facts: dict[str, Any] = {"network": loaded.origin, "network_weights": fingerprint(loaded.network), "pool": pool}
    facts |= {"source": source, "split": split, "n_images": n, "class_names": opened.class_names}
    facts |= {"layers": asked, "resize": f"{loaded.resize_filter} (Pillow) to {config.image_size}"}
    columns = [("row", pa.int64()), ("image", pa.string()), *([("label", pa.int64())] if labels else [])]
    columns += [(f"layer_{layer}", pa.list_(pa.float32(), config.n_embd)) for layer in asked]
    schema = pa.schema(columns, metadata={"lightning_igpt": json.dumps(facts)})
    print(shown(f"{loaded.origin}, layers {' '.join(map(str, asked))}; images: {n} of {source}, split {split}"))
    extractor = PooledLayers(loaded, asked, skip=-1 if pool == "last" else 0).to(place)
    parts = {folder / f"{start:09d}.parquet": range(start, min(start + ROWS, n)) for start in range(0, n, ROWS)}
    for part, places in tqdm(parts.items(), unit="part", disable=None):
        if part.exists():
            if (stored := pq.read_schema(part).metadata) != schema.metadata:
                text = f"{folder} is of an interrupted run with other settings, {stored} instead of {schema.metadata}"
                raise ValueError(f"{text}; delete it, or name another file by --out")
            continue
        images = images_of(opened, split, places.stop, spread=False, start=places.start)
        pixels, names = squares(images, config.image_size, loaded.resize_filter)
        pooled = image_features(extractor, pixels, batch_size=batch_size).float().chunk(len(asked), 1)
        values = [places, names, *([labels[places.start : places.stop]] if labels else [])]
        values += [pa.FixedSizeListArray.from_arrays(layer.numpy().ravel(), config.n_embd) for layer in pooled]
        with replacing(part) as temporary:
            pq.write_table(pa.table(values, schema), temporary)
    with replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for part in parts:
            writer.write_table(pq.read_table(part))
    shutil.rmtree(folder, ignore_errors=True)
    print(f"wrote {path}")
