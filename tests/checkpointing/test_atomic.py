import errno
import os
import re
import resource
import socket
import subprocess
import sys
import time

import pytest
import torch

from lightning_igpt.checkpointing import AtomicCheckpointIO


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


def test_temporary_files_of_dead_processes_are_removed(tmp_path):
    host, dead = socket.gethostname(), subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = {
        f".a.ckpt.tmp.{host}.{dead.pid}": False,
        f".b.ckpt.tmp.{host}.{os.getpid()}": False,  # of an earlier process with our number, as in containers
        f".c.ckpt.tmp.{host}.{os.getppid()}": True,  # alive
        ".d.ckpt.tmp.elsewhere.1": True,
        ".e.ckpt.tmp.elsewhere.1": False,  # two hours old
        ".notes.tmp": True,
    }
    for name in names:
        (tmp_path / name).write_bytes(b"half of it")
    os.utime(tmp_path / ".e.ckpt.tmp.elsewhere.1", (time.time() - 7200,) * 2)
    AtomicCheckpointIO().save_checkpoint({"step": 1}, tmp_path / "last.ckpt")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"last.ckpt", *(name for name, stays in names.items() if stays)}


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
            told = re.search(
                r"last.ckpt could not be saved; the checkpoint .* is as it was.*: 1\d\d,\d{3} bytes", str(error)
            )
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


def test_last_is_the_last_whole_file(tmp_path):
    io = AtomicCheckpointIO()
    io.save_checkpoint({"step": 1}, tmp_path / "a.ckpt")
    assert io.last == tmp_path / "a.ckpt"
    with pytest.raises(OSError):
        io.save_checkpoint({"step": 2}, tmp_path / "a.ckpt" / "b.ckpt")
    assert io.last == tmp_path / "a.ckpt"
    other = AtomicCheckpointIO()
    other.load_checkpoint(tmp_path / "a.ckpt")
    assert other.last == tmp_path / "a.ckpt"
