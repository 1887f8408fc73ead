"""What a user keeps is written whole, or the old file stays; errors name the file and the room needed."""

import csv
import errno
import os
import threading

import numpy as np
import pytest
import torch

import lightning_igpt as igpt
from lightning_igpt.files import replacing, write_csv, write_text
from lightning_igpt.pictures import save_png

PICTURE = torch.zeros(3, 4, 4, dtype=torch.uint8)


def fill_the_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("name", "write", "broken"),
    [
        ("palette.npy", lambda path: igpt.Palette.load("gray:4").save(path), (np, "save")),
        ("picture.png", lambda path: save_png(PICTURE, path), ("PIL.Image.Image.save",)),
        ("scores.csv", lambda path: write_csv(path, [["a", 1]]), ("lightning_igpt.files.csv.writer",)),
        ("report.html", lambda path: write_text(path, "new"), ("pathlib.Path.write_bytes",)),
    ],
)
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, name, write, broken):
    path = tmp_path / name
    path.write_text("old")
    with monkeypatch.context() as patch:
        patch.setattr(*broken, fill_the_disk)
        with pytest.raises(OSError, match=rf"{name} could not be saved.*is unchanged.*[\d,]+ are free"):
            write(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == [name]
    write(path)
    assert path.read_bytes() != b"old" and os.listdir(tmp_path) == [name]


def test_links_long_names_and_pipes(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"
    write_text(tmp_path / ("x" * 251 + ".csv"), "text")
    os.mkfifo(tmp_path / "pipe")
    read = []
    thread = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    thread.start()
    write_text(tmp_path / "pipe", "text")
    thread.join()
    assert read == ["text"] and (tmp_path / "pipe").is_fifo()
    with pytest.raises(OSError, match=r"below could not be saved\. Not a directory"):
        write_text(tmp_path / "target" / "folder" / "below", "text")


def test_an_error_of_the_writer_passes_unchanged(tmp_path):
    with pytest.raises(KeyError, match="mine"), replacing(tmp_path / "file"):
        raise KeyError("mine")
    assert not os.listdir(tmp_path)


def test_cells_are_no_formulas(tmp_path):
    write_csv(tmp_path / "t.csv", [["=1+2", "@x", "-photo.png", "-0.5", "plain", -3, 'a"b,c']])
    with (tmp_path / "t.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["'=1+2", "'@x", "'-photo.png", "-0.5", "plain", "-3", 'a"b,c']]
