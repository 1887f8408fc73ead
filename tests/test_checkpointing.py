"""Checkpoint files are whole or absent, and the newest that fits is the one that a run continues from."""

import errno
import os
import re
import resource

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_igpt as igpt
from lightning_igpt.checkpointing import AtomicCheckpointIO, find_checkpoint
from tests.image_files import tiny

NETWORK = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 4, "image_size": 4}


def module(**changes):
    return igpt.PretrainModule(NETWORK | changes, "gray:4")


def train(folder, *callbacks, steps=4, of=None):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(max_steps=steps, default_root_dir=folder, callbacks=list(callbacks), **options).fit(
        of or module(), igpt.PretrainDataModule(tiny(26), batch_size=4)
    )


@pytest.fixture
def run(tmp_path):
    """A folder with step=1 ... step=4, one second apart."""
    train(tmp_path, ModelCheckpoint(dirpath=tmp_path / "a", filename="{step}", every_n_train_steps=1, save_top_k=-1))
    for step in range(1, 5):
        os.utime(tmp_path / "a" / f"step={step}.ckpt", (step, step))
    return tmp_path


def name_of(found):
    return None if found is None else found.name


def test_the_newest_is_taken(run):
    assert name_of(find_checkpoint(run)) == name_of(find_checkpoint(str(run), module())) == "step=4.ckpt"
    os.utime(run / "a" / "step=2.ckpt", (9, 9))
    assert name_of(find_checkpoint(run)) == "step=2.ckpt"


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
    if (run / "a" / "step=4.ckpt").exists():
        os.utime(run / "a" / "step=4.ckpt", (9, 9))
    assert name_of(find_checkpoint(run, module())) == "step=3.ckpt"
    assert ("step=4.ckpt is skipped" in caplog.text) == (damage is not os.unlink)


def test_another_network_or_class_does_not_fit(run):
    with pytest.raises(
        ValueError, match=r"none of the 4 checkpoints there .* n_embd 8 \(asked for: 16\).*default_root_dir"
    ):
        find_checkpoint(run, module(n_embd=16))
    with pytest.raises(ValueError, match="this checkpoint is a PretrainModule's and the model is a FineTuneModule"):
        find_checkpoint(run, igpt.FineTuneModule(network=NETWORK, palette="gray:4", num_classes=2))
    with pytest.raises(ValueError, match="uses the palette"):
        find_checkpoint(run, igpt.PretrainModule(NETWORK, [[0.1, 0.2, 0.3], [0, 0, 0], [1, 1, 1], [-1, 0, 1]]))


def test_no_checkpoint_is_no_error(tmp_path):
    assert find_checkpoint(tmp_path) is None
    assert find_checkpoint(tmp_path / "not there") is None
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
        assert found is not None and found.stat().st_mtime >= max(
            path.stat().st_mtime for path in tmp_path.rglob("*.ckpt")
        ), number
    trainer().fit(module(), igpt.PretrainDataModule(tiny(26), batch_size=4))
    assert find_checkpoint(trainer(logger=logger)) == found  # not the newer one of another logger


def test_a_failed_save_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "deep" / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)

    def fail(checkpoint, file):
        file.write(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"step": 2}, path)
    monkeypatch.undo()
    assert io.load_checkpoint(path) == {"step": 1}
    assert [file.name for file in path.parent.iterdir()] == ["last.ckpt"]


def test_temporary_files_lie_beside_the_target(tmp_path, monkeypatch):
    """A rename is atomic within one file system only."""
    seen, real = [], torch.save
    monkeypatch.setattr(torch, "save", lambda checkpoint, file: seen.append(file.name) or real(checkpoint, file))
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    assert [name.rpartition("/")[0] for name in seen] == [str(tmp_path)]
    assert not seen[0].endswith("a.ckpt")


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
            told = re.search(r"last.ckpt could not be saved; the file .* is as it was.*: 1\d\d,\d{3} bytes", str(error))
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


def test_flipped_bits_are_noticed(tmp_path):
    """torch.load compares no checksums: it would give other weights without a word."""
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(10_000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)["weights"], torch.ones(10_000))
    with pytest.raises(ValueError, match="damaged"):
        AtomicCheckpointIO().load_checkpoint(path)
