"""``lightning-igpt data show``: every number is counted a second time, and the picture is read back."""

import os
import re

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_igpt.__main__ import main
from lightning_igpt.data import tokenize
from lightning_igpt.images import decode, resize_center_crop
from lightning_igpt.palette import Palette
from tests.image_files import noise, rows, tiny

CELL, GAP, CAPTION = 128, 2, 18


@pytest.fixture(autouse=True)
def _work_in_a_folder_of_its_own(monkeypatch, tmp_path_factory, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


@pytest.fixture
def photos(tmp_path):
    """Six files of five modes, 16 bits and an alpha channel among them, and a damaged one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    noise((90, 70), 1).save(folder / "a.png")
    noise((20, 30), 2).convert("L").save(folder / "b.png")
    Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)).save(folder / "c.png")
    clear = noise((16, 16), 3).convert("RGBA")
    clear.putalpha(Image.new("L", (16, 16), 100))
    clear.save(folder / "d.png")
    (folder / "e.jpg").write_bytes(b"no image")
    noise((300, 8), 4).convert("CMYK").save(folder / "f.jpg")
    noise((16, 16), 5).save(folder / "g.png")
    return folder


def shown(capsys, *words):
    """What ``data show`` prints: the text, and what follows each name at the beginning of a line."""
    capsys.readouterr()
    assert main(["data", "show", *map(str, words)]) == 0
    text = capsys.readouterr().out
    return text, {line[:18].strip(): line[18:] for line in text.splitlines() if line[:18].strip()}


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_every_kind_of_file_is_counted(photos, capsys):
    text, said = shown(capsys, photos, "--image_size", 16, "--palette", "gray:4")
    assert (said["source"], said["splits"], said["columns"]) == (str(photos), "train 7", "image, no labels")
    assert said["classes"] == "none" and said["examined"] == "7 of train"
    assert said["images"] == "RGB 2, L 1, I;16 1, RGBA 1, CMYK 1; 16 x 16 to 90 x 70"
    assert said["bad images"].startswith("1;")
    assert "  photos/e.jpg: the file is not an image of a known format" in text
    images = [decode({"path": str(path)}) for path in sorted(photos.iterdir()) if path.name != "e.jpg"]
    squares = torch.stack([tensor(resize_center_crop(image, 16)) for image in images])
    assert f"RMSE {Palette.load('gray:4').rmse(squares):.2f} of 255" in said["palette"]
    (photos / os.fsdecode(b"\xe9")).mkdir()
    (photos / "g.png").rename(photos / os.fsdecode(b"\xe9") / "g.png")  # of which datasets makes a file:// address
    assert shown(capsys, photos, "--palette", "gray:4")[1]["images"] == said["images"]


def test_the_sheet_shows_what_the_network_reads(photos, capsys):
    text, _ = shown(capsys, photos, "--image_size", 16, "--palette", "gray:4", "--out", "new/sheet.png")
    assert "wrote new/sheet.png: 6 images (original, resized, quantized)" in text
    sheet = tensor(Image.open("new/sheet.png"))
    pitch = CELL + 2 * GAP + CAPTION
    images = [decode({"path": str(path)}) for path in sorted(photos.iterdir()) if path.name != "e.jpg"]
    palette = Palette.load("gray:4")
    for row, image in enumerate(images):
        top = CAPTION + GAP + row * pitch
        cells = [sheet[:, top : top + CELL, GAP + column * (CELL + GAP) :][..., :CELL] for column in range(3)]
        resized = tensor(resize_center_crop(image, 16))
        assert torch.equal(cells[1][:, ::8, ::8], resized)
        assert torch.equal(cells[2][:, ::8, ::8], palette.dequantize(palette.quantize(resized[None]))[0])
        if image.size == (16, 16):
            assert torch.equal(cells[0][:, ::8, ::8], resized)
        elif image.size == (300, 8):
            assert (cells[0][:, :60] == 224).all() and (cells[0][:, 62:66] != 224).any()


def test_classes_and_splits_are_counted(tmp_path, capsys):
    stored = datasets.DatasetDict({"train": tiny(21), "test": tiny(4)})
    stored.save_to_disk(tmp_path / "stored")
    text, said = shown(capsys, tmp_path / "stored", "--palette", "gray:4", "--limit", 6)
    assert said["splits"] == "train 21, test 4" and said["columns"] == "image, label"
    assert said["classes"] == "2, with 10 to 11 images of train each" and "  a  11\n  b  10\n" in text
    assert said["examined"] == "6 of train, 4 of test" and said["bad images"] == "none"


def test_hidden_labels_and_many_classes(tmp_path, capsys):
    rows([noise((4, 4), 1)] * 4, [0, 1, -1, 1]).save_to_disk(tmp_path / "hidden")
    _, said = shown(capsys, tmp_path / "hidden", "--palette", "gray:4")
    assert said["classes"].startswith("2, but the labels cannot be used: 1 of 4 labels of")
    names = [f"c{number:02}" for number in range(23)]
    rows([noise((4, 4), 1)] * 23, range(23), names).save_to_disk(tmp_path / "many")
    text, _ = shown(capsys, tmp_path / "many", "--palette", "gray:4")
    assert re.findall(r"^  (c\d\d) +1$", text, re.MULTILINE) == names[:20] and "\n  and 3 more\n" in text


def test_nothing_but_bad_images_is_still_a_report(tmp_path, capsys):
    for number in range(12):
        (tmp_path / f"{number:02}.png").write_bytes(b"no image")
    text, said = shown(capsys, tmp_path, "--palette", "gray:4")
    assert said["bad images"].startswith("12;") and text.count("not an image of a known format") == 10
    assert "0 images" in text


def test_mistakes_are_told_in_one_line(tmp_path):
    tokenize(tiny(9, (8, 8)), "gray:4", size=8).save_to_disk(tmp_path / "tokens")
    for words, told in (
        (["tokens"], "holds tokens"),
        (["digits", "--limit", "-1"], "limit is -1; it must be at least 0"),
        (["digits", "--image_size", "0"], "image_size is 0; it must be at least 1"),
        (["digits", "--palette", "opnai"], "no palette 'opnai'"),
    ):
        with pytest.raises(SystemExit, match=told) as stop:
            main(["data", "show", *words])
        assert "\n" not in stop.value.code
