"""Readers of streams: every row once a pass, in an order of the seed, from any place on."""

import json
from collections import Counter
from dataclasses import asdict
from itertools import chain, islice

import pytest

from lightning_igpt.data.bad_images import BadImages
from lightning_igpt.data.loaders import make_loader
from lightning_igpt.data.stream_progress import PlacedOrder, StreamProgress, resume
from lightning_igpt.data.streams import Cursor, StreamBatches, StreamReader
from lightning_igpt.data.transforms import CenterCrop
from tests.data.streams import (
    from_ranges,
    generator,
    iterable,
    mapped,
    mix,
    number_of,
    parquet,
    part_of,
    single,
    webdataset,
)

KINDS = [parquet, webdataset, generator, single, iterable, mapped]
names = {"ids": lambda value: getattr(value, "__name__", None)}


def reader(part, index=0, count=1, *, seed=0, block=3, cursor=None):
    return StreamReader(part, index=index, count=count, seed=seed, block=block, cursor=cursor or Cursor())


def draw(one):
    """(number of the pass, row, sample) of the next row."""
    row = next(one)
    return one.cursor.number_of_pass, number_of(row[one.part.image_column]), one.sample()


def passes(part, count=1, n_passes=2, **options):
    """Of each reader, its draws in its first passes."""
    found = []
    for index in range(count):
        one, draws = reader(part, index, count, **options), []
        while not draws or draws[-1][0] < n_passes:
            draws.append(draw(one))
        found.append(draws[:-1])
    return found


def rows_of(readers, number_of_pass):
    return [row for draws in readers for at, row, _ in draws if at == number_of_pass]


@pytest.mark.parametrize("shards", [1, 3, 8, 64])
@pytest.mark.parametrize("kind", KINDS, **names)
def test_a_pass_gives_every_row_once(kind, shards, tmp_path):
    n = 67 if shards == 64 else 29
    part = part_of(kind(tmp_path / "set", n, shards))
    for count in (1, 3) if shards == 64 else (1, 2, 3, 4):
        readers = passes(part, count)
        for number in (0, 1):
            assert sorted(rows_of(readers, number)) == list(range(n))
        assert rows_of(readers, 0) != rows_of(readers, 1)
        samples = [sample for draws in readers for _, _, sample in draws]
        assert len(set(samples)) == len(samples)


@pytest.mark.parametrize("kind", KINDS, **names)
def test_the_order_is_a_function_of_the_seed(kind, tmp_path):
    part = part_of(kind(tmp_path / "set", 29, 3))
    assert passes(part, 2, seed=5) == passes(part, 2, seed=5) != passes(part, 2, seed=6)


def test_the_shuffle_goes_as_far_as_the_block(tmp_path):
    """Rows of one shard come in blocks, each a permutation; shards come in another order every pass."""
    part = part_of(single(tmp_path, 29, 1))
    order = rows_of(passes(part, block=10), 0)
    assert [sorted(order[start : start + 10]) for start in (0, 10, 20)] == [
        list(range(10)), list(range(10, 20)), list(range(20, 29))
    ]  # fmt: skip
    assert order != sorted(order)
    assert rows_of(passes(part, block=1), 0) == list(range(29))
    part = part_of(generator(tmp_path, 8, 8))
    firsts = {rows_of(passes(part, block=1, seed=seed), number)[0] for seed in range(3) for number in (0, 1)}
    assert len(firsts) > 2


@pytest.mark.parametrize("kind", [*KINDS, mix], **names)
@pytest.mark.parametrize("block", [1, 3, 1000])
def test_a_reader_goes_on_from_every_cursor(kind, block, tmp_path):
    """From each place in the first two passes, over the end of a pass; what is handed on is JSON."""
    part = part_of(kind(tmp_path / "set", 13, 3))
    for index, count in ((0, 1), (1, 2)):
        one = reader(part, index, count, block=block)
        cursors, draws = [asdict(one.cursor)], []
        for _ in range(28):
            draws.append(draw(one))
            cursors.append(json.loads(json.dumps(asdict(one.cursor))))
        for k in range(0, 20 if kind is not mix else 6, 1 if block == 3 else 3 - index):
            again = reader(part, index, count, block=block, cursor=Cursor(**cursors[k]))
            assert [draw(again) for _ in range(8)] == draws[k : k + 8], k


def test_a_mix_keeps_its_weights_and_misses_no_row(tmp_path):
    part = part_of(mix(tmp_path, 60, 2))
    readers = passes(part, 2, n_passes=1)
    counts = Counter(rows_of(readers, 0))
    assert set(counts) == set(range(60))
    first = sum(count for row, count in counts.items() if row < 20)
    assert first / sum(counts.values()) == pytest.approx(3 / 4, abs=0.08)


def test_shards_without_rows_are_passed_over_but_a_stream_without_any_ends():
    part = part_of(from_ranges([[], [0, 1, 2], [], []]))
    assert sorted(rows_of(passes(part, 4, n_passes=1), 0)) == [0, 1, 2]
    lucky = [draw(reader(part, index, 4)) for index in range(4)]  # sooner or later everyone gets the one with rows
    assert {row for _, row, _ in lucky} <= {0, 1, 2}
    empty = part_of(iterable(None, 4, 2).filter(lambda row: False))
    with pytest.raises(ValueError, match=r"split 'train', gave no rows to reader 1 of 2"):
        next(reader(empty, 1, 2))


# Batches by number, as loaders ask for them


def batches(part, n_workers, done=lambda: 0, cursors=None, length=12, batch_size=2, **options):
    """A loader, and what knows its places."""
    progress = StreamProgress(cursors or [Cursor()] * max(1, n_workers))
    images = StreamBatches(part, CenterCrop(4), batch_size=batch_size, num_workers=n_workers, block=3, **options)
    order = PlacedOrder(progress, length=length, batches_done=done)
    return make_loader(images, order, num_workers=n_workers, bad_images=BadImages(0), progress=progress), progress


def seen(loader, n=None):
    return [
        list(zip(batch["sample"].tolist(), batch["image"][:, 0, 0, 0].tolist(), strict=True))
        for batch in islice(loader, n)
    ]


@pytest.mark.parametrize("n_workers", [0, 1, 2, 3])
def test_batches_resume_at_any_number(n_workers, tmp_path):
    part = part_of(parquet(tmp_path / "set", 17, 3))
    loader, progress = batches(part, n_workers)
    whole, states = [], [progress.state(0)]
    for k, batch in enumerate(loader):
        whole.append(list(zip(batch["sample"].tolist(), batch["image"][:, 0, 0, 0].tolist(), strict=True)))
        states.append(json.loads(json.dumps(progress.state(k + 1))))
    n_readers = max(1, n_workers)
    for k, batch in enumerate(whole):
        assert {sample % n_readers for sample, _ in batch} == {k % n_readers}
    samples = [sample for sample, _ in chain(*whole)]
    assert len(set(samples)) == len(samples) == 24
    for k in range(12) if n_workers == 0 else (1, 4, 5):
        cursors = resume(states[k], rank=0, world_size=1, n_readers=n_readers)
        again, _ = batches(part, n_workers, lambda k=k: k, cursors, length=12 - k)
        assert seen(again) == whole[k:], k


@pytest.mark.parametrize("n_workers", [0, 2, 3])
def test_batches_read_ahead_come_again(n_workers, tmp_path):
    """The loop stops wherever it likes and goes on from there, with workers that live on."""
    part = part_of(generator(tmp_path, 17, 3))
    whole = seen(batches(part, n_workers, length=24)[0])
    done = 0
    loader, _ = batches(part, n_workers, lambda: done, length=24)
    found = []
    for n in (5, 1, 4, 1, 6):
        found += seen(loader, n)
        done += n
    assert found == whole[:17]


def test_readers_of_all_processes_share_a_pass(tmp_path):
    part = part_of(parquet(tmp_path / "set", 24, 8))
    processes = [chain(*seen(batches(part, 2, length=6, rank=rank, world_size=2)[0])) for rank in range(2)]
    found = list(chain(*processes))
    assert sorted(row for _, row in found) == list(range(24))
    assert len({sample for sample, _ in found}) == 24


def test_other_readers_begin_the_next_pass_with_new_samples():
    part = part_of(generator(None, 17, 4))
    loader, progress = batches(part, 2, length=10)
    before = seen(loader)
    with pytest.warns(UserWarning, match=r"1 processes with 2 stream readers each, this run has 1 with 1: .*number 2"):
        cursors = resume(progress.state(10), rank=0, world_size=1, n_readers=1)
    after = seen(batches(part, 0, lambda: 10, cursors, length=8)[0])
    assert sorted(row for _, row in chain(*after))[:16] != [] and cursors[0].number_of_pass == 2
    assert max(sample for sample, _ in chain(*before)) < min(sample for sample, _ in chain(*after))


def test_samplers_of_others_are_refused(tmp_path):
    images = StreamBatches(part_of(single(tmp_path, 3, 1)), CenterCrop(4), batch_size=2)
    with pytest.raises(TypeError, match="read by its own order; overfit_batches"):
        images[0]
