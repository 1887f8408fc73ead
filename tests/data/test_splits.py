import datasets
import pytest

from lightning_igpt.data.sources import open_source
from lightning_igpt.data.splits import divide, make_parts
from tests.image_files import tiny


def split(sizes, val_fraction=0.1, seed=0, **options):
    source = open_source(datasets.DatasetDict({name: tiny(n) for name, n in sizes.items()}))
    return make_parts(divide(source, **options), val_fraction=val_fraction, seed=seed)


def chosen(parts):
    return {role: (part.split, len(part)) for role, part in parts.items()}


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_splits_of_the_source_are_taken(name):
    parts = split({"train": 5, name: 3, "test": 2, "unlabelled": 9})
    assert chosen(parts) == {"train": ("train", 5), "val": (name, 3), "test": ("test", 2)}


def test_hold_out_is_seeded_and_never_overlaps():
    parts = split({"train": 57, "test": 3})
    assert chosen(parts) == {"train": ("train", 51), "val": ("train", 6), "test": ("test", 3)}
    train, val = (parts[role].rows_of(range(len(parts[role]))) for role in ("train", "val"))
    assert sorted(train + val) == list(range(57)) and train == sorted(train)
    again, other = split({"train": 57}), split({"train": 57}, seed=1)
    assert again["val"].rows.tolist() == val and other["val"].rows.tolist() != val


def test_named_splits():
    parts = split({"a": 5, "b": 4, "c": 3, "test": 2}, train_split="b", val_split="test", test_split="c")
    assert chosen(parts) == {"train": ("b", 4), "val": ("test", 2), "test": ("c", 3)}


def test_training_on_the_test_split_leaves_nothing_to_test_on():
    assert chosen(split({"test": 10}, train_split="test")) == {"train": ("test", 9), "val": ("test", 1)}


@pytest.mark.parametrize(
    "sizes, options, message",
    [
        ({"test": 4}, {}, "no split named 'train'; set train_split to one of: test"),
        ({"train": 4}, {"val_split": "vla"}, "val_split is 'vla', but .* has the splits train"),
        ({"train": 4}, {"val_split": "train"}, "val_split 'train' and train_split 'train' have 4 rows in common"),
        ({"train": 4}, {"test_split": "train"}, "test_split 'train' and .* have 4 rows in common"),
        ({"train": 1}, {}, "'train' of .* has 1 image; holding out 1 .* set val_fraction=0"),
        ({"train": 4, "test": 0}, {}, "no rows in the split 'test'"),
    ],
)
def test_errors(sizes, options, message):
    with pytest.raises(ValueError, match=message):
        split(sizes, **options)


SPLITS = [("train", 0, 40), ("extra", 100, 5)]


@pytest.mark.parametrize(
    "spec, rows",
    [
        ("train[:10%]", range(4)),
        ("train[30:]", range(30, 40)),
        ("train[-25%:]", range(30, 40)),
        ("train[:3]+extra[2:4]", [0, 1, 2, 102, 103]),
        ("train+extra", [*range(40), *range(100, 105)]),
    ],
)
def test_slices_and_sums(spec, rows):
    source = open_source(datasets.DatasetDict({name: numbered(range(start, start + n)) for name, start, n in SPLITS}))
    division = divide(source, train_split=spec)
    part = make_parts(division, val_fraction=0, seed=0)["train"]
    assert [int(part.dataset[row]["number"]) for row in part.rows_of(range(len(part)))] == list(rows)
    assert division.source.labels(spec).tolist() == [row % 2 for row in rows]


def numbered(numbers):
    dataset = tiny(len(numbers)).remove_columns("label").add_column("number", list(numbers))
    dataset = dataset.add_column("label", [number % 2 for number in numbers])
    return dataset.cast_column("label", datasets.ClassLabel(names=["even", "odd"]))


def test_a_slice_is_held_out_of_and_a_split_within_it_does_not_validate():
    parts = split({"train": 40}, train_split="train[:50%]")
    assert chosen(parts) == {"train": ("train[:50%]", 18), "val": ("train[:50%]", 2)}
    parts = split({"train": 40, "validation": 10}, train_split="train+validation")
    assert chosen(parts) == {"train": ("train+validation", 45), "val": ("train+validation", 5)}
    parts = split({"train": 40}, train_split="train[:90%]", val_split="train[90%:]")
    assert chosen(parts) == {"train": ("train[:90%]", 36), "val": ("train[90%:]", 4)}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_split": "train[:90%]", "val_split": "train[80%:]"}, "have 4 rows in common"),
        ({"train_split": "train[:60%]+train[40%:]"}, "takes 8 rows of .* twice"),
        ({"train_split": "train[:x]"}, "no slice of .*Unrecognized"),
        ({"train_split": "train+nothing"}, "no slice of .*Unknown split"),
        ({"train_split": "train[5:5]"}, "no rows in the split"),
    ],
)
def test_slices_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        split({"train": 40}, **options)
