"""How fast files become batches, next to bare decoding and to the image processor of ``transformers``.

All images are made here: seeded low-frequency noise with some grain, which compresses about as photographs do. All
sides decode the same files to the same squares of 32 x 32 pixels. Bare decoding is the least that any loader can do:
it neither converts nor resizes what needs no conversion and no resizing.

The ratio to the peer is that of tokens from the data module to tokens from ``transformers``, the fraction of the limit
that of the data module to bare decoding, both on small PNG files.
"""

from __future__ import annotations

import io
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import datasets
import numpy as np
import PIL
import torch
from PIL import Image

from lightning_igpt.benchmarks.harness import conditions, options_parser, print_json
from lightning_igpt.benchmarks.peers import transformers
from lightning_igpt.data.folders import quiet
from lightning_igpt.data.pretrain import PretrainDataModule
from lightning_igpt.palette import Palette

SIZE = 32
BATCH = 128
PROCESSOR_BATCH = 4  # the processor's fastest: larger batches leave the CPU's cache
PALETTE = "openai"
SMALL, LARGE = "PNG 32x32", "JPEG 500x375"
SHARE = {SMALL: 1, LARGE: 80}  # one file is made for so many of ``--images``, as large ones take longer to make

Counts: TypeAlias = Iterator[int]  # endless; each item is the number of images that were read meanwhile


def make_files(kind: str, count: int) -> list[bytes]:
    """``count`` encoded pictures: smooth colors and grain."""
    kind_of_file, size = kind.split()
    width, height = map(int, size.split("x"))
    generator = np.random.default_rng(0)
    grain = generator.normal(0, 8, (height, width, 3)).astype(np.float32)
    files = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        shifted = np.roll(grain, tuple(generator.integers(0, (height, width))), axis=(0, 1))
        file = io.BytesIO()
        Image.fromarray((smooth + shifted).clip(0, 255).astype(np.uint8)).save(file, kind_of_file, quality=90)
        files.append(file.getvalue())
    return files


def write_parquet(files: Sequence[bytes], path: Path) -> Path:
    """One column of type Image."""
    rows = {"image": [{"bytes": file, "path": None} for file in files]}
    datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()})).to_parquet(path)
    return path


def bare_decoding(files: Sequence[bytes]) -> Counts:
    """Pillow alone: no order, no rows, no batch."""
    while True:
        for file in files:
            np.asarray(square(file))
            yield 1


def batches(path: Path, batch_size: int, **options: Any) -> Iterator[dict[str, Any]]:
    """Everything a training run pays: rows, decoding, shuffled batches."""
    common: dict[str, Any] = {"image_size": SIZE, "batch_size": batch_size, "val_fraction": 0, "random_crop": False}
    data = PretrainDataModule(str(path), **common, **options)
    data.setup()
    loader = data.train_dataloader()
    while True:
        yield from loader


def processor_tokens(files: Sequence[bytes]) -> Counts:
    """The image processor of ``transformers`` that needs no torchvision, with the same palette."""
    options = {"clusters": Palette.load(PALETTE).to_list(), "size": {"height": SIZE, "width": SIZE}}
    processor = transformers.ImageGPTImageProcessorPil(**options)
    while True:
        for start in range(0, len(files) - PROCESSOR_BATCH + 1, PROCESSOR_BATCH):
            images = [square(file) for file in files[start : start + PROCESSOR_BATCH]]
            yield len(processor(images=images, return_tensors="pt")["input_ids"])


def square(file: bytes) -> Image.Image:
    """The middle square of one file, SIZE x SIZE, by Pillow alone."""
    image: Image.Image = Image.open(io.BytesIO(file))
    image = image if image.mode == "RGB" else image.convert("RGB")
    if image.size == (SIZE, SIZE):
        image.load()
        return image
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def rate(counts: Counts, seconds: float) -> float:
    """Images per second of CPU time of all threads, over at least ``seconds`` of it."""
    images, start, elapsed = 0, time.process_time(), 0.0
    while elapsed < seconds:
        images += next(counts)
        elapsed = time.process_time() - start
    return images / elapsed


def measure(sides: dict[str, Counts], *, seconds: float, repeats: int) -> dict[str, dict[str, float]]:
    """Rates of all sides in turns, after one item of each that is not counted; ratios within a turn to the first."""
    for counts in sides.values():
        next(counts)
    turns = [{name: rate(counts, seconds) for name, counts in sides.items()} for _ in range(repeats)]
    bare, result = next(iter(sides)), {}
    for name in sides:
        rates = [turn[name] for turn in turns]
        row = {"median": statistics.median(rates), "min": min(rates), "max": max(rates)}
        to_bare = statistics.median(turn[name] / turn[bare] for turn in turns)
        result[name] = {key: round(value, 1) for key, value in row.items()} | {"to_bare": round(to_bare, 4)}
    return result


def benchmark(folder: Path, *, batch: int, seconds: float, repeats: int, images: int) -> dict[str, Any]:
    """Measure everything, print tables, and return what the JSON says."""
    result: dict[str, Any] = {"unit": "images per second of CPU time", "batch": batch, "size": SIZE}
    result |= conditions("cpu", datasets, PIL, np)  # here, where there is one thread
    print(f"{result['unit']}; {platform.platform()}; {result['versions']}")
    for kind, share in SHARE.items():
        files = make_files(kind, max(images // share, batch, PROCESSOR_BATCH))
        path = write_parquet(files, folder / f"{kind}.parquet")
        read, palette = partial(batches, path, batch), Palette.load(PALETTE)
        sides = {
            "bare decoding": bare_decoding(files),
            "data module": (len(batch["image"]) for batch in read()),
            "data module, tokens": (len(palette.quantize(batch["image"])) for batch in read()),
            "transformers, tokens": processor_tokens(files),
        }
        if kind == SMALL:
            sides["token cache"] = (len(batch["tokens"]) for batch in read(cache="disk", palette=PALETTE))
            sides["streaming"] = (len(batch["image"]) for batch in read(streaming=True))
        result[kind] = measure(sides, seconds=seconds, repeats=repeats)
        print(f"\n{f'{kind}, {statistics.mean(map(len, files)):,.0f} bytes':<26}{'images/s':>10}{'of bare':>11}")
        for name, row in result[kind].items():
            spread = f"{row['min']:,.0f}..{row['max']:,.0f}"
            print(f"  {name:<24}{row['median']:>10,.0f}{row['to_bare']:>10.2f}x   {spread}", flush=True)
    return result


def main(words: Sequence[str] | None = None) -> None:
    """Read the options, measure in a temporary folder, print."""
    parser = options_parser("data", __doc__, preset="igpt_s", batch_size=BATCH, repeats=25)
    parser.add_argument("--seconds", type=float, default=0.15, help="CPU time of one turn (default 0.15)")
    parser.add_argument("--images", type=int, default=20_000, help="small PNG files to make (default 20000)")
    parser.add_argument("--quick", action="store_true", help="short turns and few images: half a minute")
    options = parser.parse_args(words)
    sizes = {name: getattr(options, name) for name in ("seconds", "repeats", "images")}
    if options.quick:
        sizes = {"seconds": 0.05, "repeats": 3, "images": 1_000}
    if wrong := [name for name, value in sizes.items() if value <= 0]:
        parser.error(f"--{wrong[0]} is {sizes[wrong[0]]}; it must be above 0")
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder, quiet():
        datasets.config.HF_DATASETS_CACHE = Path(folder, "datasets")
        result = benchmark(Path(folder), batch=options.batch_size, **sizes)
    small = result[SMALL]
    ratio = small["data module, tokens"]["median"] / small["transformers, tokens"]["median"]
    print_json("data", ratio_vs_peer=ratio, fraction_of_limit=small["data module"]["to_bare"], **result)


if __name__ == "__main__":
    main()
