"""How fast files become batches, next to bare decoding, plain ``datasets`` and the processor of ``transformers``.

All images are made here: seeded low-frequency noise with some grain, which compresses about as photographs do. All
sides decode the same files to the same squares of 32 x 32 pixels. Bare decoding is the least that any loader can do:
it neither converts nor resizes what needs no conversion and no resizing.

The ratio to the peer is that of tokens from the data module to tokens from ``transformers``, the fraction of the limit
that of the data module to bare decoding, both on small PNG files.
"""

from __future__ import annotations

import importlib.util
import io
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import datasets
import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader

from lightning_igpt.benchmarks.harness import conditions, options_parser, print_json
from lightning_igpt.data.folders import quiet
from lightning_igpt.data.pretrain import PretrainDataModule
from lightning_igpt.palette import Palette

SIZE = 32
BATCH = 128
PROCESSOR_BATCH = 4  # the processor's fastest: larger batches leave the CPU's cache
PALETTE = "openai"

Counts: TypeAlias = Iterator[int]  # endless; each item is the number of images that were read meanwhile


@dataclass(frozen=True)
class Kind:
    """One kind of file; one is made for every ``share`` of ``--images``, as large ones take longer to make."""

    format: str
    width: int
    height: int
    share: int


SMALL = "PNG 32x32"
KINDS = {
    SMALL: Kind("PNG", 32, 32, share=1),
    "JPEG 256x256": Kind("JPEG", 256, 256, share=40),
    "JPEG 500x375": Kind("JPEG", 500, 375, share=80),
}


def make_files(kind: Kind, count: int, seed: int = 0) -> list[bytes]:
    """``count`` encoded pictures: smooth colors and grain."""
    generator = np.random.default_rng(seed)
    shape = (kind.height, kind.width, 3)
    grain = generator.normal(0, 8, shape).astype(np.float32)
    files = []
    for _ in range(count):
        coarse = generator.integers(0, 256, (kind.height // 16 + 1, kind.width // 16 + 1, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((kind.width, kind.height), Image.Resampling.BICUBIC))
        shifted = np.roll(grain, tuple(generator.integers(0, shape[:2])), axis=(0, 1))
        file = io.BytesIO()
        Image.fromarray((smooth + shifted).clip(0, 255).astype(np.uint8)).save(file, kind.format, quality=90)
        files.append(file.getvalue())
    return files


def write_parquet(files: Sequence[bytes], path: Path) -> Path:
    """One column of type Image."""
    rows = {"image": [{"bytes": file, "path": None} for file in files]}
    datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image()})).to_parquet(path)
    return path


def bare_decoding(files: Sequence[bytes]) -> Counts:
    """Pillow alone, on bytes in memory: no order, no rows, no batch."""
    while True:
        for file in files:
            bare_pixels(file)
            yield 1


def bare_pixels(file: bytes) -> NDArray[np.uint8]:
    """uint8 (SIZE, SIZE, 3): the square in the middle of one file."""
    return np.asarray(_square(Image.open(io.BytesIO(file))))


def data_module(path: Path, *, batch_size: int, **options: Any) -> Counts:
    """Everything a training run pays: rows, decoding, shuffled batches."""
    for batch in _batches(path, batch_size=batch_size, **options):
        yield len(next(iter(batch.values())))


def plain_datasets(path: Path, batch_size: int) -> Counts:
    """``datasets`` and a DataLoader as their documentation puts them together."""

    def to_tensors(rows: dict[str, Any]) -> dict[str, Any]:
        return {"image": [torch.from_numpy(np.array(_square(image))).permute(2, 0, 1) for image in rows["image"]]}

    dataset = datasets.load_dataset("parquet", data_files=str(path), split="train").with_transform(to_tensors)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size, shuffle=True)
    while True:
        for batch in loader:
            yield len(batch["image"])


def tokens(path: Path, batch_size: int) -> Counts:
    """The data module, and the palette on every batch."""
    palette = Palette.load(PALETTE)
    for batch in _batches(path, batch_size=batch_size):
        yield len(palette.quantize(batch["image"]))


def processor_tokens(files: Sequence[bytes]) -> Counts:
    """The image processor of ``transformers`` that needs no torchvision, with the same palette."""
    from transformers import ImageGPTImageProcessorPil

    clusters = Palette.load(PALETTE).to_list()
    processor = ImageGPTImageProcessorPil(clusters=clusters, size={"height": SIZE, "width": SIZE})
    while True:
        for start in range(0, len(files) - PROCESSOR_BATCH + 1, PROCESSOR_BATCH):
            images = [_square(Image.open(io.BytesIO(file))) for file in files[start : start + PROCESSOR_BATCH]]
            yield len(processor(images=images, return_tensors="pt")["input_ids"])


def _square(image: Image.Image) -> Image.Image:
    image = image if image.mode == "RGB" else image.convert("RGB")
    if image.size == (SIZE, SIZE):
        image.load()
        return image
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))


def _batches(path: Path, *, batch_size: int, **options: Any) -> Iterator[dict[str, Any]]:
    common = {"image_size": SIZE, "batch_size": batch_size, "val_fraction": 0}
    data = PretrainDataModule(str(path), random_crop=False, **common, **options)
    data.setup()
    loader = data.train_dataloader()
    while True:
        yield from loader


def measurements(kind: str, path: Path, files: Sequence[bytes], batch: int) -> dict[str, Counts]:
    """What is measured on one kind of file, by name."""
    sides = {
        "bare decoding": bare_decoding(files),
        "data module": data_module(path, batch_size=batch),
        "datasets + DataLoader": plain_datasets(path, batch),
        "data module, tokens": tokens(path, batch),
    }
    if importlib.util.find_spec("transformers"):
        sides["transformers, tokens"] = processor_tokens(files)
    if kind != SMALL:
        return sides
    sides["token cache"] = data_module(path, batch_size=batch, cache="disk", palette=PALETTE)
    sides["streaming"] = data_module(path, batch_size=batch, streaming=True)
    return sides


def rate(counts: Counts, seconds: float) -> float:
    """Images per second of CPU time of all threads, over at least ``seconds`` of it."""
    images, start, elapsed = 0, time.process_time(), 0.0
    while elapsed < seconds:
        images += next(counts)
        elapsed = time.process_time() - start
    return images / elapsed


def in_turns(sides: dict[str, Counts], *, seconds: float, repeats: int) -> dict[str, list[float]]:
    """``repeats`` rates of each side, after one item of each that is not counted."""
    for counts in sides.values():
        next(counts)
    turns = [{name: rate(counts, seconds) for name, counts in sides.items()} for _ in range(repeats)]
    return {name: [turn[name] for turn in turns] for name in sides}


def summary(rates: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median, slowest and fastest turn of each side, and the median over the turns of its ratio to bare decoding."""
    bare = rates["bare decoding"]
    return {
        name: {
            "median": round(statistics.median(values), 1),
            "min": round(min(values), 1),
            "max": round(max(values), 1),
            "to_bare": round(statistics.median(mine / theirs for mine, theirs in zip(values, bare, strict=True)), 4),
        }
        for name, values in rates.items()
    }


def print_table(kind: str, rows: dict[str, dict[str, float]]) -> None:
    """For people."""
    print(f"\n{kind:<26}{'images/s':>10}   {'slowest..fastest':<22}{'of bare':>8}")
    for name, row in rows.items():
        spread = f"{row['min']:,.0f}..{row['max']:,.0f}"
        print(f"  {name:<24}{row['median']:>10,.0f}   {spread:<22}{row['to_bare']:>7.2f}x", flush=True)


@contextmanager
def _everything_in(folder: Path) -> Iterator[None]:
    """One thread, no progress bars, and the cache of ``datasets`` in ``folder``; afterwards as before."""
    threads, before = torch.get_num_threads(), datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = folder / "datasets"
    torch.set_num_threads(1)
    try:
        with quiet():
            yield
    finally:
        torch.set_num_threads(threads)
        datasets.config.HF_DATASETS_CACHE = before


def benchmark(folder: Path, *, batch: int, seconds: float, repeats: int, images: int) -> dict[str, Any]:
    """Measure everything, print tables, and return what the JSON says."""
    result: dict[str, Any] = {"unit": "images per second of CPU time", "batch": batch, "size": SIZE}
    circumstances = conditions("cpu", datasets, PIL, np)  # here, where there is one thread
    print(f"{result['unit']}; {platform.platform()}; {circumstances['versions']}")
    for name, kind in KINDS.items():
        files = make_files(kind, max(images // kind.share, batch, PROCESSOR_BATCH))
        path = write_parquet(files, folder / f"{name}.parquet")
        sides = measurements(name, path, files, batch)
        result[name] = summary(in_turns(sides, seconds=seconds, repeats=repeats))
        print_table(f"{name}, {statistics.mean(map(len, files)):,.0f} bytes", result[name])
    return result | circumstances


def main(words: Sequence[str] | None = None) -> None:
    """Read the options, measure in a temporary folder, print."""
    parser = options_parser("data", __doc__, batch_size=BATCH, repeats=25)
    parser.add_argument("--seconds", type=float, default=0.15, help="CPU time of one turn (default 0.15)")
    parser.add_argument("--images", type=int, default=20_000, help="small PNG files to make (default 20000)")
    parser.add_argument("--quick", action="store_true", help="short turns and few images: half a minute")
    options = parser.parse_args(words)
    sizes = {name: getattr(options, name) for name in ("seconds", "repeats", "images")}
    if options.quick:
        sizes = {"seconds": 0.05, "repeats": 3, "images": 1_000}
    if wrong := [name for name, value in sizes.items() if value <= 0]:
        parser.error(f"--{wrong[0]} is {sizes[wrong[0]]}; it must be above 0")
    with TemporaryDirectory() as folder, _everything_in(Path(folder)):
        result = benchmark(Path(folder), batch=options.batch_size, **sizes)
    small = result[SMALL]
    peer = small.get("transformers, tokens")
    print_json(
        "data",
        ratio_vs_peer=small["data module, tokens"]["median"] / peer["median"] if peer else None,
        fraction_of_limit=small["data module"]["to_bare"],
        **result,
    )


if __name__ == "__main__":
    main()
