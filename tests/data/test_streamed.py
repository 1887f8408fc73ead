"""Data modules over streams: hold-outs, evaluation, labels, bad images, and what is refused."""

import shutil
import zipfile
from collections import Counter
from itertools import chain, islice
from types import SimpleNamespace

import datasets
import pytest
import torch

from lightning_igpt.data import FineTuneDataModule, PretrainDataModule, ProbeDataModule
from lightning_igpt.data.stream_parts import HoldOut
from lightning_igpt.images import BadImageError
from tests.data.streams import (
    damaged,
    from_ranges,
    generator,
    iterable,
    mapped,
    number_of,
    parquet,
    part_of,
    pictures,
    single,
    webdataset,
)
from tests.data.test_base import Looker, ready, trainer
from tests.image_files import encoded, picture, rows, save_images


def stream_of(source, cls=PretrainDataModule, **options):
    return ready(cls, source, streaming=True, **{"image_size": 4, "batch_size": 4, "shuffle_buffer": 5, **options})


def drawn(loader, n=None):
    """The pictures of the first n batches, in order."""
    return [row for batch in islice(loader, n) for row in batch["image"][:, 0, 0, 0].tolist()]


# Hold-out


@pytest.mark.parametrize("kind", [webdataset, generator, mapped], ids=lambda kind: kind.__name__)
def test_train_and_validation_are_disjoint_and_together_everything(kind, tmp_path):
    stream = kind(tmp_path / "set", 60, 4)
    data = stream_of(stream, val_fraction=0.25)
    val = set(drawn(data.val_dataloader()))
    train = set(drawn(data.train_dataloader(), 45))  # three passes
    assert val | train == set(range(60)) and not val & train and 5 < len(val) < 25
    many = stream_of(stream, val_fraction=0.25, num_workers=2)
    assert set(drawn(many.val_dataloader())) == val and set(drawn(many.train_dataloader(), 45)) == train


def test_copies_stay_together():
    numbers = [i % 20 for i in range(60)]
    held, kept = (
        Counter(number_of(row["image"]) for row in part_of(from_ranges([numbers]), hold_out=hold_out).rows())
        for hold_out in (HoldOut(0.3, held_out=True), HoldOut(0.3, held_out=False))
    )
    assert not held.keys() & kept.keys() and set((held + kept).values()) == {3} and len(held + kept) == 20


def test_content_decides_and_not_the_place(tmp_path):
    """Files in folders are named in the rows, not held in them."""
    here = save_images(tmp_path / "here", [f"train/{i}.png" for i in range(40)])
    there = shutil.copytree(here, tmp_path / "there")
    inside = stream_of(pictures(range(40)).to_iterable_dataset(), val_fraction=0.3)
    found = [sorted(drawn(data.val_dataloader())) for data in (stream_of(str(here), val_fraction=0.3),
             stream_of(str(there), val_fraction=0.3), inside)]  # fmt: skip
    assert found[0] == found[1] == found[2] and 3 < len(found[0]) < 25


def test_validation_is_the_same_for_all_ranks():
    data = stream_of(iterable(None, 60, 4), val_fraction=0.4, val_images=11)
    whole = drawn(data.val_dataloader())
    ranks = [
        data.images.evaluate("val", SimpleNamespace(global_rank=rank, world_size=2), 4, need_labels=False, palette=None)
        for rank in range(2)
    ]
    assert list(chain(*map(drawn, ranks))) == whole and len(whole) == 11
    assert drawn(data.val_dataloader()) == whole  # they are read once


def test_a_split_to_validate_on_leaves_the_rows_alone(tmp_path):
    splits = datasets.IterableDatasetDict(train=iterable(None, 12, 3), validation=from_ranges([[40, 41, 42]]))
    data = stream_of(splits, val_images=2)
    assert drawn(data.val_dataloader()) == [40, 41] and sorted(drawn(data.train_dataloader(), 3)) == list(range(12))


def test_a_hold_out_without_rows():
    with pytest.raises(ValueError, match=r"split 'train', has no rows to validate on; set val_split or another"):
        stream_of(iterable(None, 3, 1), val_fraction=1e-9).val_dataloader()
    assert stream_of(iterable(None, 3, 1), val_fraction=0).val_dataloader() == []


# Test and prediction


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [parquet, generator, single, mapped], ids=lambda kind: kind.__name__)
def test_every_row_once_in_order(kind, workers, tmp_path):
    splits = datasets.IterableDatasetDict(train=iterable(None, 8, 2), test=kind(tmp_path / "set", 26, 3))
    data = stream_of(splits, num_workers=workers)
    for loader in (data.test_dataloader(), data.predict_dataloader()):
        batches = list(loader)
        assert drawn(batches) == torch.cat([batch["sample"] for batch in batches]).tolist() == list(range(26))
        assert [len(batch["sample"]) for batch in batches] == [4] * 6 + [2]


def test_one_process_tests():
    data = stream_of(datasets.IterableDatasetDict(train=iterable(None, 8, 2), test=iterable(None, 8, 2)))
    two = SimpleNamespace(global_rank=0, world_size=2)
    with pytest.raises(ValueError, match=r"split 'test', is a stream; 2 devices cannot share it .*--trainer.devices 1"):
        data.images.evaluate("test", two, 4, need_labels=False, palette=None)


def test_a_trainer_trains_validates_tests_and_predicts():
    splits = datasets.IterableDatasetDict(train=iterable(None, 24, 3), test=iterable(None, 7, 2))
    data = PretrainDataModule(splits, batch_size=3, image_size=4, val_fraction=0.3)
    module, it = Looker(4), trainer(max_steps=20, val_check_interval=5, check_val_every_n_epoch=None)
    it.fit(module, data)
    assert len(module.seen["train"]) == 20 and len(module.seen["val"]) % 4 == 0
    it.test(module, data, verbose=False)
    assert drawn(module.seen["test"]) == torch.cat(it.predict(module, data)).tolist() == list(range(7))


# Labels


@pytest.mark.parametrize("cls", [ProbeDataModule, FineTuneDataModule])
def test_labels_follow_their_images(cls, tmp_path):
    extra = {} if cls is ProbeDataModule else {"pad": 0, "flip": False}
    data = stream_of(parquet(tmp_path / "set", 30, 3), cls, val_fraction=0.3, **extra)
    assert data.class_names == ["a", "b"] and data.num_classes == 2
    for loader in (data.train_dataloader(), data.val_dataloader(), data.predict_dataloader()):
        for batch in islice(loader, 3):
            assert batch["label"].tolist() == [row % 2 for row in batch["image"][:, 0, 0, 0].tolist()]
            assert batch["label"].dtype == torch.int64


def test_a_probe_reads_every_training_image_once():
    data = stream_of(iterable(None, 26, 3), ProbeDataModule, val_fraction=0)
    assert drawn(data.train_dataloader()) == list(range(26))
    assert len(drawn(stream_of(iterable(None, 26, 3), ProbeDataModule, shuffle=True).train_dataloader(), 20)) == 80


def test_classes_that_nobody_names(tmp_path):
    """WebDataset holds class numbers as plain integers."""
    stream = webdataset(tmp_path / "set", 8, 2)
    with pytest.raises(ValueError, match=r"column 'cls' of a stream cannot be counted .*cast_column\('cls', datasets"):
        stream_of(stream, FineTuneDataModule)
    named = stream.cast_column("cls", datasets.ClassLabel(names=["a", "b"]))
    assert stream_of(named, FineTuneDataModule, pad=0).class_names == ["a", "b"]
    assert "label" not in next(iter(stream_of(stream).train_dataloader()))


def labelled(labels, names=("a", "b")):
    return rows([picture(i) for i in range(len(labels))], labels, names).to_iterable_dataset()


@pytest.mark.parametrize("label, reason", [(-1, r"a label is -1, outside 0..1; -1 marks"), (None, "a label is None")])
def test_labels_that_are_none(label, reason):
    stream = labelled([0, 1, label, 1])
    for role in ("train", "val"):
        data = stream_of(stream, FineTuneDataModule, pad=0, val_fraction=0.9 if role == "val" else 0)
        with pytest.raises(ValueError, match=reason):
            list(islice(getattr(data, f"{role}_dataloader")(), 3))
    labels = [batch["label"].tolist() for batch in islice(stream_of(stream, val_fraction=0).train_dataloader(), 1)]
    assert sorted(labels[0]) == [-1, 0, 1, 1]  # pretraining does not mind


def test_splits_that_number_their_classes_differently():
    train = labelled([0, 1, 2], ["ant", "bee", "cow"])
    splits = datasets.IterableDatasetDict(train=train, validation=labelled([0, 1], ["bee", "cow"]))
    data = stream_of(splits, FineTuneDataModule, pad=0)
    assert next(iter(data.val_dataloader()))["label"].tolist() == [1, 2]
    splits["validation"] = labelled([0, 1], ["bee", "dog"])
    with pytest.raises(ValueError, match=r"split 'validation' has the class 'dog', which the training split"):
        stream_of(splits, FineTuneDataModule, pad=0).val_dataloader()
    splits["validation"] = labelled([0, 1]).select_columns(["image"])
    with pytest.raises(ValueError, match=r"split 'validation', has no labels: no column 'label'"):
        stream_of(splits, FineTuneDataModule, pad=0).val_dataloader()


# Images that cannot be read


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_stops_the_run_and_is_named(workers):
    data = stream_of(damaged(12, {7}), num_workers=workers, val_fraction=0)
    message = r"the IterableDataset, split 'train', 7\.png, CRC-32 \w{8}: the file is not an image .*on_bad_image=skip"
    with pytest.raises(BadImageError, match=message) as caught:
        drawn(data.train_dataloader(), 9)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_left_out_and_the_next_one_taken(workers):
    data = stream_of(damaged(12, {3, 7}), num_workers=workers, val_fraction=0, on_bad_image="skip", max_bad_share=0.2)
    batches = list(islice(data.train_dataloader(), 5))
    assert {len(batch["image"]) for batch in batches} == {4} and set(drawn(batches)) == set(range(12)) - {3, 7}
    assert {place.split(", ")[2] for place in data.bad_images} == {"3.png", "7.png"}
    assert set(batches[0]) == {"image", "sample", "label"}


def test_left_out_images_are_counted_once_and_resume(tmp_path):
    """Without a path an image is known by its content, so that passes do not add up."""
    stream = damaged(12, {3, 7}, path="")
    data = stream_of(stream, val_fraction=0, on_bad_image="skip")
    whole = drawn(data.train_dataloader(), 20)
    assert len(whole) == 80 and len(data.bad_images) == 2 and all("CRC-32" in place for place in data.bad_images)
    assert data.images.bad_images["train"].n_read == 80 + 2 * 8


def test_validation_and_test_leave_bad_images_out():
    splits = datasets.IterableDatasetDict(train=iterable(None, 6, 2), test=damaged(9, {1, 8}))
    data = stream_of(splits, on_bad_image="skip", max_bad_share=1.0)
    assert drawn(data.test_dataloader()) == [0, 2, 3, 4, 5, 6, 7]
    data = stream_of(damaged(9, {1, 8}), val_fraction=0.9, on_bad_image="skip", max_bad_share=1.0)
    assert not {1, 8} & set(drawn(data.val_dataloader()))


def test_a_stream_of_nothing_but_bad_images_ends():
    data = stream_of(damaged(40, set(range(1, 40))), val_fraction=0, on_bad_image="skip", max_bad_share=1.0)
    with pytest.raises(BadImageError, match=r"105 of 10\d images on end cannot be read, .*too many"):
        drawn(data.train_dataloader(), 3)


def test_images_that_a_stream_only_names(tmp_path):
    """Paths into an archive, as streams of folders on the hub have them."""
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for i in range(9):
            archive.writestr(f"{i}.png", encoded(picture(i)))
    paths = [f"zip://{i}.png::{tmp_path / 'set.zip'}" for i in range(9)]
    features = datasets.Features({"image": datasets.Image()})
    stream = datasets.Dataset.from_dict({"image": paths}, features=features).to_iterable_dataset()
    data = stream_of(stream, val_fraction=0.4)
    assert sorted(drawn(data.val_dataloader()) + drawn(ready_train(data))) == list(range(9))
    missing = datasets.Dataset.from_dict({"image": [paths[0].replace("0.png", "x.png")]}, features=features)
    with pytest.raises(BadImageError, match=r"zip://x\.png::.*set\.zip: there is no such file"):
        next(iter(stream_of(missing.to_iterable_dataset(), val_fraction=0).train_dataloader()))


def ready_train(data):
    """Its training rows once, in order."""
    part = data.images._part("train", False)
    return [{"image": torch.tensor([[[[number_of(row["image"])]]]])} for row in part.rows()]


def _bare(row):
    return {"picture": encoded(picture(row["number"]))}


def test_files_in_columns_of_no_type():
    stream = datasets.Dataset.from_dict({"number": range(6)}).to_iterable_dataset().map(_bare)
    data = stream_of(stream, image_column="picture", val_fraction=0.4)
    assert sorted({*drawn(data.train_dataloader(), 6), *drawn(data.val_dataloader())}) == list(range(6))


# What is refused, and what is told


def test_lengths(tmp_path):
    """A data card tells; nothing else does."""
    parquet(tmp_path / "set", 40, 4)
    known = stream_of(str(tmp_path / "set"), val_fraction=0)
    assert known.batches_per_epoch == 10 and stream_of(str(tmp_path / "set"), val_fraction=0.2).batches_per_epoch == 8
    module = Looker(4)
    trainer(max_epochs=2).fit(module, PretrainDataModule(str(tmp_path / "set"), streaming=True, batch_size=5))
    assert len(module.seen["train"]) == 14
    assert stream_of(iterable(None, 9, 3)).batches_per_epoch is None
    for options in ({"max_epochs": 2}, {"max_epochs": 2, "max_steps": 3}, {"max_epochs": -1}):
        with pytest.raises(ValueError, match=r"is a stream of unknown length.* give the trainer max_steps, and not"):
            trainer(**options).fit(Looker(4), PretrainDataModule(iterable(None, 9, 3), batch_size=2))


def test_a_stream_smaller_than_a_batch(tmp_path):
    parquet(tmp_path / "set", 6, 2)
    module = Looker(4)
    trainer(max_epochs=2).fit(module, PretrainDataModule(str(tmp_path / "set"), streaming=True, batch_size=9))
    assert [len(batch["image"]) for batch in module.seen["train"]] == [9, 9]


def test_a_trial_run_needs_no_length():
    module = Looker(4)
    trainer(fast_dev_run=2).fit(module, PretrainDataModule(iterable(None, 9, 3), batch_size=2))
    assert len(module.seen["train"]) == 2


def test_workers_without_shards_are_not_started(caplog):
    with caplog.at_level("INFO"):
        loader = stream_of(single(None, 9, 1), num_workers=3, val_fraction=0).train_dataloader()
    assert loader.num_workers == 1 and "has 1 shards for 1 devices, so 1 of 3 workers read it" in caplog.text


@pytest.mark.parametrize("cache", ["disk", "memory"])
def test_caches_are_refused(cache):
    with pytest.raises(ValueError, match=f"cache is '{cache}', but rows of a stream do not come back; use cache=none"):
        stream_of(iterable(None, 9, 3), cache=cache)


def test_a_shuffle_of_the_stream_itself_is_warned_of():
    stream = iterable(None, 9, 3).shuffle(seed=1, buffer_size=4)
    with pytest.warns(UserWarning, match=r"shuffled with stream.shuffle, and no checkpoint holds its buffer"):
        assert sorted(drawn(stream_of(stream, val_fraction=0, batch_size=3).train_dataloader(), 3)) == list(range(9))
