"""That checkpoints can be saved is found out before anything is trained."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_igpt as igpt
from lightning_igpt.callbacks import DiskCheck
from lightning_igpt.callbacks.disk_check import check_folder, checkpoint_bytes
from tests.image_files import tiny

NETWORK = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 4, "image_size": 4}


def fit(folder, **options):
    module = igpt.PretrainModule(NETWORK, "gray:4")
    trainer = igpt.make_trainer(
        max_steps=2, accelerator="cpu", default_root_dir=folder, logger=False, enable_progress_bar=False, **options
    )
    trainer.fit(module, igpt.PretrainDataModule(tiny(26), batch_size=4))
    return module


def test_the_size_is_that_of_a_checkpoint(tmp_path):
    module = fit(tmp_path)
    (path,) = tmp_path.rglob("final.ckpt")
    assert checkpoint_bytes(module) == pytest.approx(path.stat().st_size, rel=0.25)  # names and loops beside the values


def test_too_little_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"takes about [\d,]+ bytes, but .*checkpoints has 1,000 free"):
        fit(tmp_path)
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob(".written*"))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"nothing can be saved in .*default_root_dir"):
        fit(tmp_path / "file" / "run")


def test_a_folder_that_is_not_writable():
    """The superuser may write everywhere, so a child gives up its rights first."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setuid(65534)
        try:
            check_folder(folder, 1)
        except OSError as error:
            os._exit(0 if error.errno == errno.EACCES and str(folder) in str(error) else 3)
        os._exit(4)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    folder.chmod(0o755)
    shutil.rmtree(folder)
    assert status == 0


@pytest.mark.parametrize("options", [{"enable_checkpointing": False}, {"fast_dev_run": True}])
def test_without_checkpoints_it_is_idle(options, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: pytest.fail("looked"))
    fit(tmp_path, **options)


def test_with_a_plain_trainer(tmp_path):
    (tmp_path / "file").touch()
    callbacks = [ModelCheckpoint(dirpath=tmp_path / "file" / "run"), DiskCheck()]
    trainer = Trainer(max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=callbacks)
    with pytest.raises(OSError, match="nothing can be saved"):
        trainer.fit(igpt.PretrainModule(NETWORK, "gray:4"), [torch.zeros(2, 3, 4, 4, dtype=torch.uint8)])
