"""How fast files become batches, next to bare decoding and to the image processor of ``transformers``.

All images are made here: seeded low-frequency noise with some grain, which compresses about as photographs do. All
sides decode the same files to the same squares of 32 x 32 pixels; a turn is one batch. Bare decoding is the limit: it
neither converts nor resizes what needs no conversion and no resizing.

The ratio to the peer is that of tokens from the data module to tokens from ``transformers``, the fraction of the limit
that of tokens from the data module to bare decoding, both on small PNG files.
"""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import numpy as np
import PIL
import torch
from PIL import Image

from lightning_igpt.benchmarks import harness
from lightning_igpt.benchmarks.harness import Comparison, pictures, transformers
from lightning_igpt.data.folders import quiet
from lightning_igpt.data.pretrain import PretrainDataModule
from lightning_igpt.palette import Palette
from lightning_igpt.pictures import to_pil

SIZE = 32
PROCESSOR_BATCH = 4  # the processor's fastest: larger batches leave the CPU's cache
PALETTE = "openai"
SMALL, LARGE = "PNG 32x32", "JPEG 500x375"
SHARE = {SMALL: 1, LARGE: 80}  # one file is made for so many of ``--images``, as large ones take longer to make
BARE, OURS, PEER = "bare decoding", "data module, tokens", "transformers, tokens"


def make_files(kind: str, count: int) -> list[bytes]:
    """``count`` encoded pictures."""
    kind_of_file, size = kind.split()
    width, height = map(int, size.split("x"))
    files = [io.BytesIO() for _ in range(count)]
    for seed, file in enumerate(files):
        to_pil(pictures(1, height, width, seed)[0]).save(file, kind_of_file, quality=90)
    return [file.getvalue() for file in files]


def write_parquet(files: Sequence[bytes], path: Path) -> Path:
    """One column of type Image."""
    rows = {"image": [{"bytes": file, "path": None} for file in files]}
    datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()})).to_parquet(path)
    return path


def batches(path: Path, batch_size: int, **options: Any) -> Iterator[dict[str, Any]]:
    """Everything a training run pays: rows, decoding, shuffled batches."""
    common: dict[str, Any] = {"image_size": SIZE, "batch_size": batch_size, "val_fraction": 0, "random_crop": False}
    data = PretrainDataModule(str(path), **common, **options)
    data.setup()
    loader = data.train_dataloader()
    while True:
        yield from loader


def square(file: bytes) -> Image.Image:
    """The middle square of one file, SIZE x SIZE, by Pillow alone."""
    image: Image.Image = Image.open(io.BytesIO(file))
    image = image if image.mode == "RGB" else image.convert("RGB")
    if image.size == (SIZE, SIZE):
        return image
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def make_sides(kind: str, files: Sequence[bytes], path: Path, batch: int) -> dict[str, Callable[[], object]]:
    """What reads one batch; the processor of ``transformers`` is the one that needs no torchvision."""
    read, palette, endless = partial(batches, path, batch), Palette.load(PALETTE), itertools.cycle(files)
    size = {"height": SIZE, "width": SIZE}
    processor = transformers.ImageGPTImageProcessorPil(clusters=palette.to_list(), size=size)

    def processed() -> None:
        for start in range(0, batch, PROCESSOR_BATCH):
            count = min(PROCESSOR_BATCH, batch - start)
            processor(images=[square(next(endless)) for _ in range(count)], return_tensors="pt")

    images, coded = read(), read()
    sides: dict[str, Callable[[], object]] = {
        BARE: lambda: [np.asarray(square(next(endless))) for _ in range(batch)],
        "data module": lambda: next(images),
        OURS: lambda: palette.quantize(next(coded)["image"]),
        PEER: processed,
    }
    if kind == SMALL:
        sides["token cache"] = partial(next, read(cache="disk", palette=PALETTE))
        sides["streaming"] = partial(next, read(streaming=True))
    return sides


def main(words: Sequence[str] | None = None) -> None:
    """Read the options, measure in a temporary folder, print."""
    own = {"batch_size": (128, "images"), "images": (20_000, "small PNG files to make")}
    options = harness.parse("data", __doc__, words, repeats=(25, "repetitions of each side"), **own)
    torch.set_num_threads(1)
    tables: dict[str, Comparison] = {}
    with TemporaryDirectory() as folder, quiet():
        datasets.config.HF_DATASETS_CACHE = Path(folder, "datasets")
        for kind, share in SHARE.items():
            files = make_files(kind, max(options.images // share, options.batch_size))
            path = write_parquet(files, Path(folder, f"{kind}.parquet"))
            rows = harness.in_turns(make_sides(kind, files, path, options.batch_size), options.repeats)
            least = dict.fromkeys(rows, rows[BARE].median)
            tables[kind] = Comparison(rows, OURS, PEER, least, options.batch_size, "images")
            tables[kind].print_table(f"{kind}, {sum(map(len, files)) / len(files):,.0f} bytes")
    large = {name: turns.figures(options.batch_size) for name, turns in tables[LARGE].rows.items()}
    tables[SMALL].print_result(options, datasets, PIL, np, large=large)


if __name__ == "__main__":
    main()
