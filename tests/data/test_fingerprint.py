import os
import shutil
from itertools import islice

import datasets
import pytest

from lightning_igpt.data import PretrainDataModule, ProbeDataModule
from lightning_igpt.palette import PALETTE_COLUMN, Palette
from tests.data.streams import FEATURES, FILES, parquet, pictures, webdataset
from tests.data.test_base import ready
from tests.image_files import picture, rows, save_images, tiny

NAMES = [f"{kind}/{number}.png" for kind in ("cat", "dog") for number in range(4)]
DIGESTS = ["602d299b1f3f", "15d600b69f87", "e6478024c69a"]


def of(source, **options):
    return PretrainDataModule(source, **options).fingerprint


# Folders of image files


def test_a_folder_is_the_same_wherever_it_lies_and_whenever_it_was_copied(tmp_path):
    here = save_images(tmp_path / "here", NAMES)
    there = shutil.copytree(here, tmp_path / "far" / "there", copy_function=shutil.copyfile)
    os.utime(there / NAMES[0], (1, 1))
    link = tmp_path / "link"
    link.symlink_to(here)
    assert of(str(here)) == of(str(there)) == of(there) == of(str(link))


@pytest.mark.parametrize("change", ["size", "rename", "relabel", "remove", "split"])
def test_any_file_of_a_folder_counts(tmp_path, change):
    folder = save_images(tmp_path / "set", NAMES)
    before, file = of(str(folder)), folder / "cat" / "2.png"
    if change == "size":
        file.write_bytes(file.read_bytes() + b"\0")
    elif change == "remove":
        file.unlink()
    elif change == "split":
        save_images(folder, ["train/cat/0.png", "train/dog/0.png"])
        for kind in ("cat", "dog"):
            shutil.move(folder / kind, folder / "test" / kind)
    else:
        file.rename(folder / ("dog" if change == "relabel" else "cat") / "9.png")
    assert of(str(folder)) != before


def test_files_that_are_gone_do_not_stop_it(tmp_path):
    folder = save_images(tmp_path / "set", NAMES)
    data = ready(PretrainDataModule, str(folder), image_size=4)
    (folder / NAMES[0]).unlink()
    assert data.fingerprint != of(str(save_images(folder, NAMES)))


# Data sets


def test_a_data_set_is_the_same_in_memory_and_in_files(tmp_path):
    pictures(range(30)).to_parquet(tmp_path / "a" / "train.parquet")
    pictures(range(30)).save_to_disk(tmp_path / "b")
    shuffled = pictures(list(reversed(range(30)))).select(range(29, -1, -1))  # an indices mapping
    places = [pictures(range(30)), str(tmp_path / "a"), str(tmp_path / "a" / "train.parquet"), str(tmp_path / "b")]
    assert len({of(place) for place in [*places, shuffled]}) == 1


@pytest.mark.parametrize("n", [1, 30, 64, 65, 200])
def test_rows_bytes_labels_order_and_classes_count(n):
    def made(numbers, labels, names=("a", "b")):
        columns = {"image": [{"bytes": FILES[i % 80], "path": None} for i in numbers], "label": labels}
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(names))}
        return of(datasets.Dataset.from_dict(columns, features=datasets.Features(features)))

    numbers, labels = list(range(n)), [0] * n
    kinds = [
        made(numbers, labels),
        made([*numbers, 7], [*labels, 0]),
        made([79, *numbers[1:]], labels),
        made([*numbers[:-1], 78], labels),
        made(numbers, [*labels[:-1], 1]),
        made(numbers, labels, ("a", "c")),
    ]
    assert len(set(kinds)) == len(kinds)


def test_which_part_is_used_is_no_matter_and_other_columns_neither():
    data, more = tiny(30), tiny(30).add_column("note", ["x"] * 30)
    same = {of(one, **options) for one in (data, more) for options in ({}, {"val_fraction": 0.5}, {"seed": 3})}
    assert same == {ProbeDataModule(data).fingerprint}


def test_a_change_between_the_rows_that_are_looked_at_goes_unnoticed_without_labels():
    """The documented limit."""
    before, after = rows([picture(i) for i in range(200)]), rows([picture(i + (i == 1)) for i in range(200)])
    assert of(before) == of(after)


def test_tokens_and_their_palette_count():
    def made(palette, last=0):
        features = datasets.Features(
            {"tokens": datasets.List(datasets.Value("int16")), PALETTE_COLUMN: datasets.ClassLabel(names=[palette])}
        )
        tokens = [[0] * 16 for _ in range(11)] + [[last] * 16]
        return of(datasets.Dataset.from_dict({"tokens": tokens, PALETTE_COLUMN: [0] * 12}, features=features))

    one, other = (Palette.load(name).sha256 for name in ("gray:4", "gray:5"))
    assert made(one) == made(one) and len({made(one), made(other), made(one, last=3)}) == 3


def test_a_mix_is_all_of_its_sources():
    one, other = tiny(12), tiny(14)
    assert len({of([one, other]), of([other, one]), of(one), of([one, tiny(15)])}) == 4


def test_processes_machines_and_versions_agree(tmp_path):
    """Digests that were written down: a new one would tell everyone who resumes a run that the data are others."""
    for name in NAMES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    columns = {"image": [{"bytes": name.encode(), "path": None} for name in NAMES], "label": [0, 1] * 4}
    memory = datasets.Dataset.from_dict(columns, features=FEATURES)
    assert [of(place)[:12] for place in ("digits", str(tmp_path), memory)] == DIGESTS


# Streams


@pytest.mark.parametrize("kind", [parquet, webdataset])
def test_a_stream_of_local_files_is_told_by_names_and_sizes(tmp_path, kind):
    kind(tmp_path / "here", 40, 4)
    there = shutil.copytree(tmp_path / "here", tmp_path / "there")
    before = of(str(tmp_path / "here"), streaming=True)
    assert of(str(there), streaming=True) == before
    last = sorted(path for path in there.iterdir() if path.name.startswith("train"))[-1]
    last.rename(last.with_name(last.name.replace("train", "train-x")))
    assert of(str(there), streaming=True) != before


def test_no_row_of_a_stream_is_read():
    read = []

    def draw(files):
        for name in files:
            read.append(name)
            yield {"image": {"bytes": FILES[len(read) % 80], "path": None}, "label": 0}

    def stream(commit):
        files = [f"hf://datasets/me/cats@{commit}/{number}.parquet" for number in range(6)]
        return datasets.IterableDataset.from_generator(draw, features=FEATURES, gen_kwargs={"files": files})

    assert of(stream("abc")) == of(stream("abc")) != of(stream("abd")) and not read


def test_a_stream_that_is_being_read_goes_on_as_it_would():
    def batches(ask):
        data = ready(PretrainDataModule, tiny(26), streaming=True, image_size=4, batch_size=2)
        for batch in islice(data.train_dataloader(), 6):
            yield batch["image"][:, 0, 0, 0].tolist()
            assert not ask or data.fingerprint

    assert list(batches(ask=True)) == list(batches(ask=False))


def test_streams_without_known_columns_have_one_too():
    stream = tiny(12).to_iterable_dataset(num_shards=3).map(lambda row: row)
    assert of(stream) == of(stream) != of(tiny(12).to_iterable_dataset(num_shards=4).map(lambda row: row))
