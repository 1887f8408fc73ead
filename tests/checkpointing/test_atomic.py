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
