"""Streams of every kind over the same small pictures: passes, hold-outs, resuming, labels, bad images, refusals."""

import http.server
import threading
import zipfile
from collections import Counter
from itertools import chain, islice, pairwise
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_igpt.data import FineTuneDataModule, PretrainDataModule, ProbeDataModule
from lightning_igpt.data.streams import belongs
from lightning_igpt.images import BadImageError
from tests.data.test_datamodule import Looker, ready, trainer
from tests.data.test_resume import checkpoints, fit
from tests.data.test_sources import write_tar
from tests.image_files import encoded, picture, rows, save_images, tiny

FEATURES = tiny(1).features
IMAGE = datasets.Image.pa_type
FILES = [encoded(picture(i)) for i in range(80)]


def ranges(n, shards):
    """The numbers of the rows of each shard."""
    edges = [i * n // shards for i in range(shards + 1)]
    return [list(range(*pair)) for pair in pairwise(edges)]


def pictures(numbers):
    table = {"image": [{"bytes": FILES[i], "path": None} for i in numbers], "label": [i % 2 for i in numbers]}
    return datasets.Dataset.from_dict(table, features=FEATURES)


def parquet(folder, n, shards):
    """Parquet files; a card next to them says how many rows there are, as on the hub."""
    folder.mkdir()
    for i, numbers in enumerate(ranges(n, shards)):
        pictures(numbers).to_parquet(folder / f"train-{i:05d}-of-{shards:05d}.parquet")
    split = f"  - name: train\n    num_bytes: 1\n    num_examples: {n}\n"
    (folder / "README.md").write_text(f"---\ndataset_info:\n  splits:\n{split}---\n")
    return datasets.load_dataset(str(folder), streaming=True, split="train")


def webdataset(folder, n, shards):
    for i, numbers in enumerate(ranges(n, shards)):
        write_tar(folder / f"train-{i:05d}.tar", numbers)
    return datasets.load_dataset(str(folder), streaming=True, split="train")


def _generate(shards):
    for numbers in shards:
        for i in numbers:
            yield {"image": {"bytes": FILES[i], "path": None}, "label": i % 2}


def from_ranges(shards):
    return datasets.IterableDataset.from_generator(_generate, gen_kwargs={"shards": shards}, features=FEATURES)


def generator(folder, n, shards):
    return from_ranges(ranges(n, shards))


def iterable(folder, n, shards):
    return pictures(range(n)).to_iterable_dataset(num_shards=shards)


def _same(row):
    return {"image": row["image"]}


def mapped(folder, n, shards):
    return iterable(folder, n, shards).map(_same)


def mix(folder, n, shards):
    """A third of the rows at three times the weight of the others."""
    first, second = pictures(range(n // 3)), pictures(range(n // 3, n))
    streams = [part.to_iterable_dataset(num_shards=shards) for part in (first, second)]
    return datasets.interleave_datasets(streams, [0.75, 0.25], seed=0, stopping_strategy="all_exhausted")


def damaged(n, bad, path="{}.png"):
    """A stream in which some images are no images."""
    values = [{"bytes": b"nothing" * i if i in bad else FILES[i], "path": path.format(i)} for i in range(n)]
    table = {"image": values, "label": [i % 2 for i in range(n)]}
    return datasets.Dataset.from_dict(table, features=FEATURES).to_iterable_dataset(num_shards=3)


KINDS = [parquet, webdataset, generator, iterable, mapped]
named = {"ids": lambda value: getattr(value, "__name__", None)}


def stream_of(source, cls=PretrainDataModule, **options):
    return ready(cls, source, streaming=True, **{"image_size": 4, "batch_size": 4, "shuffle_buffer": 5, **options})


def drawn(loader, n=None):
    """The pictures of the first n batches, in order."""
    return [row for batch in islice(loader, n) for row in batch["image"][:, 0, 0, 0].tolist()]


@pytest.mark.parametrize("kind", KINDS, **named)
def test_a_pass_gives_every_row_once_in_an_order_of_the_seed(kind, tmp_path):
    stream, options = kind(tmp_path / "set", 28, 3), {"val_fraction": 0}

    def two_passes(**more):
        loader = stream_of(stream, **options, **more).train_dataloader()  # whose length a data card limits to one
        return drawn(chain(loader, loader), 14)

    order = two_passes()
    assert sorted(order[:28]) == sorted(order[28:]) == list(range(28)) and order[:28] != order[28:]
    assert two_passes() == order != two_passes(seed=1)
    busy = stream_of(stream, num_workers=2, batch_size=1, **options).train_dataloader()
    assert set(drawn(chain(busy, busy, busy), 84)) == set(range(28))


def test_shards_without_rows_are_skipped_but_a_stream_without_any_ends():
    stream = from_ranges([[], [0, 1, 2], [], []])
    assert set(drawn(stream_of(stream, val_fraction=0, num_workers=4).train_dataloader(), 8)) == {0, 1, 2}
    with pytest.raises(ValueError, match=r"split 'train' gave no rows .* in 100 passes"):
        drawn(stream_of(from_ranges([[], []]), val_fraction=0).train_dataloader(), 1)


@pytest.mark.parametrize("kind", [webdataset, generator, mapped], **named)
def test_train_and_validation_are_disjoint_and_together_everything(kind, tmp_path):
    stream = kind(tmp_path / "set", 60, 4)
    data = stream_of(stream, val_fraction=0.25)
    val = set(drawn(data.val_dataloader()))
    train = set(drawn(data.train_dataloader(), 45))  # three passes
    assert val | train == set(range(60)) and not val & train and 5 < len(val) < 25
    many = stream_of(stream, val_fraction=0.25, num_workers=2)
    assert set(drawn(many.val_dataloader())) == val and set(drawn(many.train_dataloader(), 45)) == train


def test_content_decides_and_copies_stay_together(tmp_path):
    stream = from_ranges([[i % 20 for i in range(60)]]).cast_column("image", datasets.Image(decode=False))
    held, kept = (
        Counter(row["image"]["bytes"] for row in stream if belongs(row, "image", 0.3, part)) for part in (True, False)
    )
    assert not held.keys() & kept.keys() and set((held + kept).values()) == {3} and len(held + kept) == 20
    here = save_images(tmp_path / "here", [f"train/{i}.png" for i in range(40)])  # named in the rows, not held in them
    inside = stream_of(pictures(range(40)).to_iterable_dataset(), val_fraction=0.3)
    parts = [sorted(drawn(data.val_dataloader())) for data in (stream_of(str(here), val_fraction=0.3), inside)]
    assert parts[0] == parts[1] and 3 < len(parts[0]) < 25


def test_validation_is_the_same_for_all_ranks():
    data = stream_of(iterable(None, 60, 4), val_fraction=0.4, val_images=11)
    whole = drawn(data.val_dataloader())
    assert len(whole) == 11 and drawn(data.val_dataloader()) == whole
    ranks = []
    for rank in range(2):
        data.trainer = SimpleNamespace(
            global_rank=rank, world_size=2, accumulate_grad_batches=1, lightning_module=None, log_dir="x"
        )
        ranks.append(drawn(data.val_dataloader()))
    assert list(chain(*ranks)) == whole
    splits = datasets.IterableDatasetDict(train=iterable(None, 8, 2), test=iterable(None, 8, 2))
    test = stream_of(splits)
    test.trainer = data.trainer
    with pytest.raises(ValueError, match=r"split 'test' is a stream; 2 devices cannot .*--trainer.devices 1"):
        test.test_dataloader()


def test_a_split_to_validate_on_leaves_the_rows_alone():
    splits = datasets.IterableDatasetDict(train=iterable(None, 12, 3), validation=from_ranges([[40, 41, 42]]))
    data = stream_of(splits, val_images=2)
    assert drawn(data.val_dataloader()) == [40, 41] and sorted(drawn(data.train_dataloader(), 3)) == list(range(12))
    with pytest.raises(ValueError, match=r"split 'train' has no rows to validate on; set val_split or another"):
        stream_of(iterable(None, 3, 1), val_fraction=1e-9).val_dataloader()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [parquet, generator, mapped], **named)
def test_evaluation_reads_every_row_once_in_order(kind, workers, tmp_path):
    splits = datasets.IterableDatasetDict(train=iterable(None, 8, 2), test=kind(tmp_path / "set", 26, 3))
    data = stream_of(splits, num_workers=workers)
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        batches = list(loader)
        assert drawn(batches) == torch.cat([batch["sample"] for batch in batches]).tolist() == list(range(26))
        assert [len(batch["sample"]) for batch in batches] == [4] * 6 + [2]
    probe = stream_of(iterable(None, 26, 3), ProbeDataModule, val_fraction=0, num_workers=workers)
    assert drawn(probe.train_dataloader()) == list(range(26))


RUNS = {
    "endless": {"max_steps": 9, "val_check_interval": 4, "check_val_every_n_epoch": None},
    "accumulating": {
        "max_steps": 3, "accumulate_grad_batches": 2, "val_check_interval": 6, "check_val_every_n_epoch": None,
    },
    "epochs": {"max_epochs": 2, "val_check_interval": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    "name, kind", [("endless", generator), ("endless", mix), ("accumulating", mapped), ("epochs", parquet)]
)
def test_without_a_buffer_a_run_resumes_at_the_very_row(kind, name, tmp_path):
    """A buffer of one row shuffles shards only, so that nothing of it is lost."""
    stream, options = kind(tmp_path / "set", 26, 3), {"source": None, "streaming": True, "shuffle_buffer": 1}
    options["source"] = stream
    whole = fit(RUNS[name], save_to=tmp_path / "runs", **options)
    assert [sample for sample, _ in whole] == list(range(len(whole)))
    for path, step in checkpoints(tmp_path / "runs")[::3]:
        assert fit(RUNS[name], ckpt=path, **options) == whole[6 * step :], path.stem


@pytest.mark.parametrize("workers", [0, 2])
def test_with_a_buffer_a_run_resumes_at_most_one_buffer_away(workers, tmp_path):
    options = {"source": generator(None, 72, 4), "streaming": True, "shuffle_buffer": 5, "num_workers": workers,
               "val_fraction": 0}  # fmt: skip
    whole = fit({"max_steps": 12}, save_to=tmp_path, **options)
    assert sorted(row for _, row in whole) == list(range(72))
    for step, last in ((1, 6), (4, 9)):
        rest = fit({"max_steps": last}, ckpt=tmp_path / f"step-{step}.ckpt", **options)
        assert [sample for sample, _ in rest] == list(range(6 * step, 6 * last))
        read_before = {row for _, row in whole[: 6 * step]}
        assert not read_before & {row for _, row in rest}  # nothing twice; what the buffers held is skipped
    assert torch.load(tmp_path / "step-4.ckpt", weights_only=True)["PretrainDataModule"].keys() == {"stream_states"}


def test_other_workers_begin_the_next_pass(tmp_path):
    options = {"source": generator(None, 26, 4), "streaming": True}
    fit({"max_steps": 6}, save_to=tmp_path, **options)
    with pytest.warns(UserWarning, match=r"this run has 1 with 2: the stream begins its next pass \(number 1\)"):
        seen = fit({"max_steps": 6}, ckpt=tmp_path / "step-3.ckpt", num_workers=2, **options)
    assert [sample for sample, _ in seen] == list(range(18, 36))


@pytest.mark.parametrize("cls", [ProbeDataModule, FineTuneDataModule])
def test_labels_follow_their_images(cls, tmp_path):
    extra = {} if cls is ProbeDataModule else {"pad": 0, "flip": False}
    data = stream_of(parquet(tmp_path / "set", 30, 3), cls, val_fraction=0.3, **extra)
    assert data.class_names == ["a", "b"] and data.num_classes == 2
    for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
        for batch in islice(loader, 3):
            assert batch["label"].tolist() == [row % 2 for row in batch["image"][:, 0, 0, 0].tolist()]
            assert batch["label"].dtype == torch.int64


def test_classes_that_nobody_names(tmp_path):
    """WebDataset holds class numbers as plain integers."""
    stream = webdataset(tmp_path / "set", 8, 2)
    with pytest.raises(ValueError, match=r"column 'cls' of a stream cannot be counted .*cast_column\('cls', datasets"):
        stream_of(stream, FineTuneDataModule)
    named = stream.cast_column("cls", datasets.ClassLabel(names=["a", "b"]))
    assert stream_of(named, FineTuneDataModule, pad=0).class_names == ["a", "b"]
    assert "label" not in next(iter(stream_of(stream).train_dataloader()))


def labeled(labels, names=("a", "b")):
    return rows([picture(i) for i in range(len(labels))], labels, names).to_iterable_dataset()


@pytest.mark.parametrize("label, reason", [(-1, r"a label is -1, outside 0..1; -1 marks"), (None, "a label is None")])
def test_labels_that_are_none(label, reason):
    stream = labeled([0, 1, label, 1])
    for role in ("train", "val"):
        data = stream_of(stream, FineTuneDataModule, pad=0, val_fraction=0.9 if role == "val" else 0)
        with pytest.raises(ValueError, match=reason):
            list(islice(getattr(data, f"{role}_dataloader")(), 3))
    labels = [batch["label"].tolist() for batch in islice(stream_of(stream, val_fraction=0).train_dataloader(), 1)]
    assert sorted(labels[0]) == [-1, 0, 1, 1]  # pretraining does not mind


def test_splits_that_number_their_classes_differently():
    train = labeled([0, 1, 2], ["ant", "bee", "cow"])
    splits = datasets.IterableDatasetDict(train=train, validation=labeled([0, 1], ["bee", "cow"]))
    data = stream_of(splits, FineTuneDataModule, pad=0)
    assert next(iter(data.val_dataloader()))["label"].tolist() == [1, 2]
    splits["validation"] = labeled([0, 1], ["bee", "dog"])
    with pytest.raises(ValueError, match=r"split 'validation' has the class 'dog', which the training split"):
        stream_of(splits, FineTuneDataModule, pad=0).val_dataloader()
    splits["validation"] = labeled([0, 1]).select_columns(["image"])
    with pytest.raises(ValueError, match=r"split 'validation', has no labels: no column 'label'"):
        stream_of(splits, FineTuneDataModule, pad=0).val_dataloader()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images(workers):
    data = stream_of(damaged(12, {7}), num_workers=workers, val_fraction=0)
    message = r"the IterableDataset, split 'train', 7\.png, CRC-32 \w{8}: the file is not an image .*on_bad_image=skip"
    with pytest.raises(BadImageError, match=message) as caught:
        drawn(data.train_dataloader(), 9)
    assert "Traceback" not in str(caught.value)
    skip = {"num_workers": workers, "on_bad_image": "skip", "max_bad_share": 1.0}
    data = stream_of(damaged(12, {3, 7}), val_fraction=0, **skip)
    batches = list(islice(data.train_dataloader(), 5))
    assert {len(batch["image"]) for batch in batches} == {4} and set(drawn(batches)) == set(range(12)) - {3, 7}
    assert {place.split(", ")[2] for place in data.bad_images} == {"3.png", "7.png"}
    assert set(batches[0]) == {"image", "sample", "label"}
    splits = datasets.IterableDatasetDict(train=iterable(None, 6, 2), test=damaged(9, {1, 8}))
    assert drawn(stream_of(splits, **skip).test_dataloader()) == [0, 2, 3, 4, 5, 6, 7]
    data = stream_of(damaged(40, set(range(1, 40))), val_fraction=0, **skip)
    with pytest.raises(BadImageError, match=r"105 of 10\d images in succession cannot be read"):
        drawn(data.train_dataloader(), 3)


def test_images_that_a_stream_only_names(tmp_path):
    """Paths into an archive, as streams of folders on the hub have them."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i in range(9):
            archive.writestr(f"{i}.png", FILES[i])
    paths = [f"zip://{i}.png::{tmp_path / 'set.zip'}" for i in range(9)]
    features = datasets.Features({"image": datasets.Image()})
    stream = datasets.Dataset.from_dict({"image": paths}, features=features).to_iterable_dataset()
    data = stream_of(stream, val_fraction=0.4)
    val, train = set(drawn(data.val_dataloader())), set(drawn(data.train_dataloader(), 6))
    assert val | train == set(range(9)) and not val & train
    missing = datasets.Dataset.from_dict({"image": [paths[0].replace("0.png", "x.png")]}, features=features)
    with pytest.raises(BadImageError, match=r"zip://x\.png::.*set\.zip: there is no file of this name"):
        next(iter(stream_of(missing.to_iterable_dataset(), val_fraction=0).train_dataloader()))


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.add(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(FILES[3])

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("options", [{}, {"cache": "disk", "palette": "gray:16"}, {"streaming": True}])
def test_addresses_are_opened_only_on_purpose(options, tmp_path):
    """A stranger's file could name any; a column of strings that the user names is there to be opened."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("3.png", FILES[3])

    def read(path, kind, **more):
        values = pa.array([path if kind == "text" else {"bytes": None, "path": path}] * 4)
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        pq.write_table(pa.table({"image": values if kind == "text" else values.cast(IMAGE)}), folder / "0.parquet")
        more |= {"image_size": 4, "batch_size": 4, "val_fraction": 0}
        return len(next(iter(ready(PretrainDataModule, str(folder), **more, **options).train_dataloader()))["sample"])

    with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
        server.asked = set()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/a.png"
        chained = f"zip://3.png::{address}"
        named = {"image_column": "image"}
        for path, kind, more in ((address, "image", named), (address, "text", {}), (chained, "image", {})):
            with pytest.raises(BadImageError, match=r"a URL \(http://\) instead of an image; URLs are opened only"):
                read(path, kind, **more)
        assert not server.asked and read(f"zip://3.png::{tmp_path / 'set.zip'}", "image") == 4
        assert read(address, "text", **named) == 4 and server.asked == {"/a.png"}
        server.shutdown()


def test_lengths(tmp_path, caplog):
    """A data card says how many rows there are; nothing else does."""
    parquet(tmp_path / "set", 40, 4)
    known = stream_of(str(tmp_path / "set"), val_fraction=0)
    assert known.batches_per_epoch == 10 and stream_of(str(tmp_path / "set"), val_fraction=0.2).batches_per_epoch == 8
    module = Looker(4)
    trainer(max_epochs=2).fit(module, PretrainDataModule(str(tmp_path / "set"), streaming=True, batch_size=5))
    assert len(module.seen["train"]) == 14
    trainer(fast_dev_run=2).fit(module, PretrainDataModule(iterable(None, 9, 3), batch_size=2))
    limited = Looker(4)
    options = {"max_epochs": 2, "limit_train_batches": 3, "accumulate_grad_batches": 2}
    trainer(**options).fit(limited, PretrainDataModule(iterable(None, 9, 3), batch_size=2))
    assert len(limited.seen["train"]) == 6
    for options in ({"max_epochs": 2}, {"max_epochs": 2, "max_steps": 3}, {"max_epochs": -1}):
        with pytest.raises(ValueError, match=r"this loader has no length: set max_steps or limit_train_batches"):
            trainer(**options).fit(Looker(4), PretrainDataModule(iterable(None, 9, 3), batch_size=2))
    with caplog.at_level("INFO"):
        loader = stream_of(generator(None, 9, 1), num_workers=3, val_fraction=0).train_dataloader()
    assert loader.num_workers == 1 and "1 of 3 workers can read" in caplog.text
    with pytest.raises(ValueError, match="cache is 'disk', but a stream cannot be cached; use cache=none"):
        stream_of(iterable(None, 9, 3), cache="disk")
