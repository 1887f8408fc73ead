"""Every verb checks where its results go before it does any work."""

import os
import re
from pathlib import Path

import pytest

from lightning_igpt.__main__ import main
from lightning_igpt.commands.arguments import check_file, check_folder

FIT = ["--config", "digits_tiny_pretrain", "--trainer.max_steps", "1", "--trainer.default_root_dir"]
# The path comes last; other inputs do not exist, so that work would end in another message.
VERBS = {
    "report": (["report", ".", "--out"], ""),
    "score": (["score", "--pretrained", "no/thing", "--images", "digits", "--out"], ""),
    "palette show": (["palette", "show", "--palette", "no/thing", "--out"], ".png"),
    "palette fit": (["palette", "fit", "no/thing"], ".npy"),
    "data": (["data", "show", "no/thing", "--out"], ".png"),
    "complete": (["complete", "--pretrained", "no/thing", "--images", "digits", "--out"], ""),
    "lowdata": (["lowdata", "--pretrained", "no/thing", "--source", "digits", "--out"], ""),
    "quickstart": (["quickstart", "--out"], ""),
    "convert": (["convert", "no/thing"], ""),
    "convert to safetensors": (["convert", "no/thing", "--to", "safetensors"], ".safetensors"),
    "recipes": (["recipes", "copy", "digits_tiny_probe", "--to"], ".yaml"),
    "fit": (["fit", *FIT], ""),
    "validate": (["validate", *FIT], ""),
}


@pytest.mark.parametrize("verb", VERBS)
def test_a_file_among_the_folders_is_an_error_of_every_verb(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("mine")
    words, suffix = VERBS[verb]
    with pytest.raises(SystemExit) as stop:
        main([*words, f"there/deep/x{suffix}"])
    assert re.search("nothing can be saved in there/.*/there: Not a directory; name another place$", stop.value.code)
    assert [*Path().rglob("*")] == [Path("there")]


@pytest.mark.skipif(os.name != "posix", reason="drives have roots of their own")
def test_files_and_folders(tmp_path):
    (tmp_path / "x.csv").write_text("earlier")
    (tmp_path / "folder.csv").mkdir()
    check_file(tmp_path / "x.csv", "--out", "x.csv", ".csv")  # which may be replaced
    check_file(tmp_path / "new" / "x.csv", "--out", "x.csv", ".csv")
    check_folder(tmp_path / "new" / "folder", "--out")
    for path, suffix, message in (
        (tmp_path / "folder.csv", ".csv", "is a folder; --out takes the name of a file, such as"),
        (tmp_path / f"{'ü' * 128}.csv", "", "too long"),
        (tmp_path / "x.csv", ".png", r"--out is .*x\.csv; it must be a \.png file"),
        ("/no-such-folder/x", "", "/no-such-folder does not exist; make it first"),
        ("/proc/deep/x", "", "nothing can be saved in /proc/deep/x: /proc: .*; name another place"),
    ):
        with pytest.raises((OSError, ValueError), match=message):
            check_file(path, "--out", "x", suffix)
    for path, message in (
        (tmp_path / "x.csv", "is a file; --out takes a folder"),
        ("/no-such-folder", "make it first"),
    ):
        with pytest.raises(OSError, match=message):
            check_folder(path, "--out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.csv", "x.csv"]
