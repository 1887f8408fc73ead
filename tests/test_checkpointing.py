"""Checkpoint files are whole or absent, and the newest that fits is the one that a run continues from."""

import errno
import os
import re
import resource
import time
from argparse import Namespace
from collections import UserDict, UserList
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_igpt as igpt
from lightning_igpt.checkpointing import AtomicCheckpointIO, find_checkpoint
from tests.image_files import tiny

NETWORK = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 4, "image_size": 4}


def module(**changes):
    return igpt.PretrainModule(NETWORK | changes, "gray:4")


def train(folder, *callbacks, steps=4, of=None, data=None, resume=None, **more):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(max_steps=steps, default_root_dir=folder, callbacks=list(callbacks), **options, **more).fit(
        of or module(), data or igpt.PretrainDataModule(tiny(26), batch_size=4), ckpt_path=resume
    )


def every_step(folder, filename="{step}"):
    return ModelCheckpoint(dirpath=folder, filename=filename, every_n_train_steps=1, save_top_k=-1)


@pytest.fixture
def run(tmp_path):
    """A folder with step=1 ... step=4, the first with the latest time."""
    train(tmp_path, every_step(tmp_path / "a"))
    for step in range(1, 5):
        os.utime(tmp_path / "a" / f"step={step}.ckpt", (9 - step, 9 - step))
    return tmp_path


def name_of(found):
    return None if found is None else found.name


def test_the_newest_is_taken(run, monkeypatch):
    """By optimizer steps within a run, by their starts among runs: a clock may be wrong, and copies have new times."""
    assert name_of(find_checkpoint(run)) == name_of(find_checkpoint(str(run), module())) == "step=4.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 0.5)  # the clock was set back before the run was resumed
        train(run, every_step(run / "b"), steps=5, resume=run / "a" / "step=2.ckpt")
        train(run, every_step(run / "c"), steps=4, resume=run / "b" / "step=3.ckpt")  # back to an earlier step
    os.utime(run / "a" / "step=4.ckpt")
    assert find_checkpoint(run) == find_checkpoint(run / "c" / "step=4.ckpt") == run / "c" / "step=4.ckpt"
    train(run, every_step(run / "new"), steps=2)
    assert find_checkpoint(run) == run / "new" / "step=2.ckpt"


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flipped(path):
    content = bytearray(path.read_bytes())
    for place in range(len(content) // 2, len(content) // 2 + 400):  # more than the padding between two entries
        content[place] ^= 4
    path.write_bytes(content)


def weights_only(path):
    torch.save({"state_dict": {}, "loops": {}}, path)


def no_mapping(path):
    torch.save([1], path)


@pytest.mark.parametrize("damage", [truncated, empty, flipped, weights_only, no_mapping, os.unlink])
def test_what_cannot_be_continued_is_passed_over(damage, run, caplog):
    damage(run / "a" / "step=4.ckpt")
    assert name_of(find_checkpoint(run, module())) == "step=3.ckpt"
    assert ("step=4.ckpt is skipped" in caplog.text) == (damage is not os.unlink)


def test_another_network_or_class_does_not_fit(run):
    with pytest.raises(
        ValueError, match=r"no run can resume from 4 checkpoints there.* n_embd 8 \(asked for: 16\).*default_root_dir"
    ):
        find_checkpoint(run, module(n_embd=16))
    with pytest.raises(ValueError, match="this checkpoint is a PretrainModule's and the model is a FineTuneModule"):
        find_checkpoint(run, igpt.FineTuneModule(network=NETWORK, palette="gray:4", num_classes=2))
    with pytest.raises(ValueError, match="uses the palette"):
        find_checkpoint(run, igpt.PretrainModule(NETWORK, [[0.1, 0.2, 0.3], [0, 0, 0], [1, 1, 1], [-1, 0, 1]]))


def test_no_checkpoint_is_no_error(tmp_path):
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "not there") is None
    with pytest.raises(ValueError, match="is no folder or file"):
        find_checkpoint("")
    (tmp_path / ".step=1.ckpt.tmp.host.1").write_bytes(b"half")
    (tmp_path / ".step=1.ckpt").write_bytes(b"half")
    (tmp_path / "gone.ckpt").symlink_to(tmp_path / "nothing.ckpt")
    assert find_checkpoint(tmp_path) is None


def stamp_of(value):
    def change(checkpoint):
        checkpoint["lightning_igpt"] = value

    return change


def without(name):
    return lambda checkpoint: checkpoint.pop(name)


def with_value(name, value):
    return lambda checkpoint: checkpoint.update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        stamp_of(3),
        stamp_of({}),
        stamp_of({"class": "PretrainModule", "network": 3, "palette_sha256": 1}),
        without("lightning_igpt"),
        without("lr_schedulers"),
        with_value("state_dict", None),
        with_value("optimizer_states", "x"),
        with_value("loops", None),
        with_value("callbacks", []),
    ],
)
def test_what_makes_no_sense_is_passed_over(change, run):
    path = run / "a" / "step=4.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, path)
    assert name_of(find_checkpoint(run, module())) == "step=3.ckpt"


def test_a_trainer_tells_where_it_saves(tmp_path):
    """Not everything below its root: that may hold other runs."""
    options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}

    def trainer(**more):
        return igpt.make_trainer(max_steps=2, default_root_dir=tmp_path / "root", **options, **more)

    train(tmp_path / "root" / "other" / "run")
    assert find_checkpoint(trainer()) is None and find_checkpoint(trainer(logger=False)) is None
    told = ModelCheckpoint(dirpath=tmp_path / "elsewhere")
    logger = CSVLogger(tmp_path / "logs", name="mine")
    for number, more in enumerate([{}, {"logger": False}, {"callbacks": told}, {"logger": logger}]):
        trainer(**more).fit(module(), igpt.PretrainDataModule(tiny(26), batch_size=4))
        found = find_checkpoint(trainer(**more), module())
        newest = max(path.stat().st_mtime for path in tmp_path.rglob("*.ckpt"))
        assert found is not None and found.stat().st_mtime >= newest, number
    trainer().fit(module(), igpt.PretrainDataModule(tiny(26), batch_size=4))
    assert find_checkpoint(trainer(logger=logger)) == found  # not the newer one of another logger


NAMED = {"named": lambda root: CSVLogger(root, name="my/own"), "none": lambda root: False, "default": lambda root: None}


@pytest.mark.parametrize(("first", "then"), [("named", "none"), ("none", "named"), ("default", "named")])
def test_a_run_is_resumed_under_another_logger(first, then, tmp_path):
    """From what it wrote in its root, as far as that is its own, and not from an older state under the own logger."""

    def trainer(kind, steps=2):
        options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        logger = NAMED[kind](tmp_path / "root")
        return igpt.make_trainer(max_steps=steps, default_root_dir=tmp_path / "root", logger=logger, **options)

    train(tmp_path / "root" / "other")  # a run of its own, of a root below
    for steps, kind in enumerate((first, then, first), 2):
        found = find_checkpoint(trainer(kind), module())
        assert (found and torch.load(found, weights_only=True)["global_step"]) == (None if steps == 2 else steps - 1)
        data = igpt.PretrainDataModule(tiny(26), batch_size=4)
        trainer(kind, steps).fit(module(), data, ckpt_path=found)


class Color(Enum):
    RED = "red"


@dataclass
class Size:
    where: Path


class Settings(igpt.PretrainDataModule):
    def __init__(self, extra=None):
        super().__init__(tiny(26), batch_size=4)
        self.save_hyperparameters({"extra": extra})


VALUES = [
    (Path("a/b"), "a/b"),
    (np.float64(0.5), 0.5),
    (np.array([["x", "y"]]), [["x", "y"]]),
    (Namespace(a=Namespace(b=Path("c"))), {"a": {"b": "c"}}),
    (UserDict({np.int64(1): UserList([Color.RED])}), {1: ["red"]}),
    ({frozenset({Color.RED}): range(2)}, {("red",): [0, 1]}),
    ([timedelta(minutes=1), date(2026, 1, 2), Decimal("0.5")], [60.0, "2026-01-02", 0.5]),
    (Size(Path("a")), {"where": "a"}),
]


@pytest.mark.parametrize("own_io", [True, False])
def test_objects_become_plain_values(own_io, tmp_path, recwarn):
    """Hyperparameters and states of callbacks, under Lightning's own CheckpointIO too; the objects stay as they are."""

    class Keeper(Callback):
        state_key = "keeper"

        def state_dict(self):
            return {"values": [value for value, _ in VALUES]}

    own, data = {"plugins": [AtomicCheckpointIO()]} if own_io else {}, Settings([value for value, _ in VALUES])
    train(tmp_path, every_step(tmp_path), Keeper(), data=data, steps=1, **own)
    checkpoint = torch.load(tmp_path / "step=1.ckpt", weights_only=True)
    for values in checkpoint["callbacks"]["keeper"]["values"], checkpoint["datamodule_hyper_parameters"]["extra"]:
        assert str(values) == str([plain for _, plain in VALUES])
    assert data.hparams.extra[0] == Path("a/b") and not [one for one in recwarn if "in the checkpoint" in str(one)]
    train(tmp_path, data=Settings(), steps=2, resume=find_checkpoint(tmp_path, module()), **own)


def test_objects_without_a_plain_value_are_named(tmp_path):
    with pytest.warns(UserWarning, match=r"parameters\.extra\.0\.act in .* a torch.*GELU.*; keep a plain"):
        train(tmp_path, every_step(tmp_path), data=Settings([{"act": torch.nn.GELU()}]), steps=1)
    where = r"run code: torch.nn.modules.activation.GELU in datamodule_hyper_parameters.extra.0.act; if you wrote it"
    for read in (find_checkpoint, lambda folder: igpt.load_pretrained(folder / "step=1.ckpt")):
        with pytest.raises(ValueError, match=where):
            read(tmp_path)
    with pytest.warns(UserWarning, match=r"extra in .* a builtins.function, which cannot be saved .* only its text"):
        train(tmp_path / "run", every_step(tmp_path / "run"), data=Settings(lambda image: image), steps=1)
    assert find_checkpoint(tmp_path / "run", module())
    objects = {"a": {"root": Path("x")}, "b": [np.float64(1)], "c": torch.nn.GELU}  # as earlier versions saved them
    torch.save(objects, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"PosixPath in a\.root, numpy\S*scalar in b\.0, torch\S*GELU in c; if you"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "old.ckpt")


def test_a_disk_that_is_full(tmp_path):
    """Both numbers; in a child, because the limit cannot be taken back."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1_000_000)}, path)
        except OSError as error:
            told = re.search(r"not be saved; the existing file is unchanged.*: 1\d\d,\d{3} bytes", str(error))
            os._exit(0 if told and error.errno == errno.EFBIG else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_the_disk_gives_back_is_compared(tmp_path, monkeypatch):
    path, real = tmp_path / "last.ckpt", torch.save
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)

    def rot(checkpoint, file):
        real(checkpoint, file)
        file.seek(file.tell() // 2)
        file.write(b"rotten")

    monkeypatch.setattr(torch, "save", rot)
    with pytest.raises(OSError, match=r"last.ckpt could not be saved.*damaged"):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(10_000)}, path)
    monkeypatch.undo()
    assert AtomicCheckpointIO().load_checkpoint(path) == {"step": 1}
