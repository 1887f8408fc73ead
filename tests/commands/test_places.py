"""Where results would go is looked at before any work is done, by every verb in the same words."""

import os
from pathlib import Path

import pytest

from lightning_igpt.__main__ import main
from lightning_igpt.commands import recipes
from lightning_igpt.commands.places import check_file, check_folder

FIT = ["--config", "digits_tiny_pretrain", "--trainer.max_steps", "1", "--trainer.default_root_dir"]
# The path comes last; whatever else is given does not exist, so that work would end in another message.
FILES = {
    "report": ["report", "nowhere", "--out"],
    "score": ["score", "--pretrained", "nowhere", "--images", "digits", "--out"],
    "palette show": ["palette", "show", "--palette", "nowhere.npy", "--out"],
    "data": ["data", "show", "nowhere", "--out"],
}
FOLDERS = {
    "complete": ["complete", "--pretrained", "nowhere", "--images", "digits", "--out"],
    "lowdata": ["lowdata", "--pretrained", "nowhere", "--source", "digits", "--out"],
    "quickstart": ["quickstart", "--out"],
    "convert": ["convert", "nowhere"],
    "fit": ["fit", *FIT],
    "validate": ["validate", *FIT],
}
NAMED = {  # verbs that want names of a kind
    "palette fit": (["palette", "fit", "nowhere"], ".npy"),
    "convert": (["convert", "nowhere", "--to", "safetensors"], ".safetensors"),
    "recipes": (["recipes", "copy", "digits_tiny_probe", "--to"], ".yaml"),
}


@pytest.fixture(autouse=True)
def _work_in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def refused(words):
    """The line that a verb ends with, and that nothing was made."""
    before = {*Path().rglob("*")}
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
    assert {*Path().rglob("*")} == before
    return stop.value.code


@pytest.mark.parametrize("verb", FILES)
def test_a_folder_in_the_place_of_a_file(verb):
    Path("there").mkdir()
    told = refused([*FILES[verb], "there"])
    assert f"there is a folder; {FILES[verb][-1]} takes the name of a file, such as there{os.sep}" in told


@pytest.mark.parametrize("verb", FOLDERS)
def test_a_file_in_the_place_of_a_folder(verb):
    Path("there").write_text("mine")
    told = refused([*FOLDERS[verb], "there"])
    assert "there is a file; " in told or "out is there, a file; " in told
    assert Path("there").read_text() == "mine"


ALL = {**FILES, **FOLDERS, **{name: words for name, (words, _) in NAMED.items()}}
SUFFIX = {name: suffix for name, (_, suffix) in NAMED.items()} | {"palette show": ".png", "data": ".png"}


@pytest.mark.parametrize("verb", ALL)
def test_a_file_above(verb):
    Path("there").write_text("mine")
    told = refused([*ALL[verb], f"there/deep/x{SUFFIX.get(verb, '')}"])
    assert "nothing can be saved in there" in told and "there is a file; name another folder" in told


@pytest.mark.parametrize("verb", ALL)
@pytest.mark.skipif(os.name != "posix", reason="drives have roots of their own")
def test_no_folder_is_made_at_the_root(verb):
    told = refused([*ALL[verb], f"/no-such-folder/deep/x{SUFFIX.get(verb, '')}"])
    assert (
        "the folder /no-such-folder does not exist, and none is made at the root of the file system; make it first"
        in told
    )
    assert not Path("/no-such-folder").exists()


@pytest.mark.parametrize("verb", NAMED)
def test_a_folder_of_the_name_of_a_file(verb):
    words, suffix = NAMED[verb]
    Path(f"there{suffix}").mkdir()
    if verb != "recipes":  # which copies into it
        assert f"there{suffix} is a folder; " in refused([*words, f"there{suffix}"])


def test_a_picture_replaces_no_palette():
    Path("mine.npy").write_text("colours")
    for words in (["palette", "show", "--palette", "mine.npy", "--out"], ["data", "show", "digits", "--out"]):
        assert "--out is mine.npy; it must be a .png file, such as" in refused([*words, "mine.npy"])
    assert Path("mine.npy").read_text() == "colours"


def test_missing_folders_are_made_elsewhere(capsys):
    assert main(["recipes", "copy", "digits_tiny_probe", "--to", "a/b/mine.yaml"]) == 0
    assert Path("a/b/mine.yaml").read_text() == recipes.find("digits_tiny_probe").read_text()


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that takes no files even from root")
def test_a_folder_that_takes_no_files():
    for check in (lambda path: check_file(path, "--out", "x"), lambda path: check_folder(path, "--out")):
        with pytest.raises(OSError, match=r"nothing can be saved in /proc/deep/x: /proc: .*; name another place"):
            check("/proc/deep/x")


def test_what_is_there_may_be_replaced(tmp_path):
    (tmp_path / "x.csv").write_text("earlier")
    check_file(tmp_path / "x.csv", "--out", "x.csv")
    check_folder(tmp_path, "--out")
    assert [*tmp_path.iterdir()] == [tmp_path / "x.csv"]
