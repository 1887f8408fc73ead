"""Streams of every kind over the same small pictures: each of n rows in shards of nearly equal size."""

import io
import tarfile
from itertools import pairwise

import datasets

from lightning_igpt.data.mixing import mix_streams
from lightning_igpt.data.sources import open_source
from lightning_igpt.data.stream_parts import StreamPart
from tests.image_files import encoded, picture

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
FILES = [encoded(picture(i)) for i in range(80)]
_NUMBERS = {content: i for i, content in enumerate(FILES)}


def number_of(value):
    """Which picture an undecoded or a decoded image is."""
    return _NUMBERS[value["bytes"]] if isinstance(value, dict) else value.getpixel((0, 0))[0]


def part_of(stream, **options):
    source = open_source(stream)
    stream = source.splits["train"]
    if stream.features is not None:
        stream = stream.select_columns([source.image_column])
    return StreamPart("stream", "train", stream, source.image_column, **options)


def ranges(n, shards):
    """The numbers of the rows of each shard."""
    edges = [i * n // shards for i in range(shards + 1)]
    return [list(range(*pair)) for pair in pairwise(edges)]


def pictures(numbers):
    table = {"image": [{"bytes": FILES[i], "path": None} for i in numbers], "label": [i % 2 for i in numbers]}
    return datasets.Dataset.from_dict(table, features=FEATURES)


def parquet(folder, n, shards):
    """Parquet files; a card beside them tells how many rows there are, as on the hub."""
    folder.mkdir()
    for i, numbers in enumerate(ranges(n, shards)):
        pictures(numbers).to_parquet(folder / f"train-{i:05d}-of-{shards:05d}.parquet")
    split = f"  - name: train\n    num_bytes: 1\n    num_examples: {n}\n"
    (folder / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{split}---\n")
    return datasets.load_dataset(str(folder), streaming=True, split="train")


def webdataset(folder, n, shards):
    folder.mkdir()
    for i, numbers in enumerate(ranges(n, shards)):
        with tarfile.open(folder / f"train-{i:05d}.tar", "w") as tar:
            for number in numbers:
                for suffix, content in (("png", FILES[number]), ("cls", str(number % 2).encode())):
                    member = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return datasets.load_dataset(str(folder), streaming=True, split="train")


def _generate(shards):
    for numbers in shards:
        for i in numbers:
            yield {"image": {"bytes": FILES[i], "path": None}, "label": i % 2}


def generator(folder, n, shards):
    return from_ranges(ranges(n, shards))


def from_ranges(shards):
    return datasets.IterableDataset.from_generator(_generate, gen_kwargs={"shards": shards}, features=FEATURES)


def _generate_all(n):
    yield from _generate([range(n)])


def single(folder, n, shards):
    """A generator that says nothing of shards."""
    return datasets.IterableDataset.from_generator(_generate_all, gen_kwargs={"n": n}, features=FEATURES)


def iterable(folder, n, shards):
    return pictures(range(n)).to_iterable_dataset(num_shards=shards)


def _same(row):
    return {"image": row["image"]}


def mapped(folder, n, shards):
    stream = iterable(folder, n, shards).map(_same)
    assert stream.features is None
    return stream


def mix(folder, n, shards):
    """A third of the rows at three times the weight of the others."""
    first, second = pictures(range(n // 3)), pictures(range(n // 3, n))
    streams = [one.to_iterable_dataset(num_shards=shards) for one in (first, second)]
    return mix_streams(streams, ["image", "image"], [3, 1], seed=0)


def damaged(n, bad, path="{}.png"):
    """A stream in which some images are no images."""
    values = [{"bytes": b"nothing" * i if i in bad else FILES[i], "path": path.format(i)} for i in range(n)]
    table = {"image": values, "label": [i % 2 for i in range(n)]}
    return datasets.Dataset.from_dict(table, features=FEATURES).to_iterable_dataset(num_shards=3)
