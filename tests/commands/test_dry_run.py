"""``--dry_run``: what would run is told, and nothing runs."""

import re
from pathlib import Path

import pytest
import yaml

from lightning_igpt.__main__ import main
from lightning_igpt.commands import plan_cpu, recipes
from tests.image_files import save_images

NETWORK = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 4, "image_size": 8}


@pytest.fixture(autouse=True)
def _work_in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in {"SIDE": 64, "COPIED": 2**20, "REPEATS": 1}.items():  # how fast this CPU is does not matter here
        monkeypatch.setattr(plan_cpu, name, value)


def dry(capsys, *words):
    """What is printed, by the names of the rows."""
    before = {*Path().rglob("*")}
    assert main([*words, "--dry_run"]) == 0
    assert {*Path().rglob("*")} == before
    said = capsys.readouterr().out
    assert "dry run: nothing was trained, and nothing was written" in said
    return dict(re.findall(r"^(\w+) {2,}(.*)$", said, re.MULTILINE)), said


def test_fit_tells_what_would_run(capsys, bfloat16):
    rows, said = dry(capsys, "fit", "--config", "digits_tiny_pretrain")
    assert rows["would"] == "fit: PretrainModule on PretrainDataModule"
    assert rows["network"].endswith("16 colours, 8 x 8 pixels: 674,112 parameters")
    assert rows["weights"] == "drawn at random"
    assert rows["data"] == "digits: 1,293 training, 360 test, 144 validation images"
    steps = yaml.safe_load((recipes.folder() / "digits_tiny_pretrain.yaml").read_text())["trainer"]["max_steps"]
    assert rows["length"] == f"{steps} steps, 16 images per step (16 at once)"
    assert rows["results"].startswith("runs/digits_tiny_pretrain")
    assert re.fullmatch(r"0\.\d+ of [\d.]+ GiB usable per device, recompute none", rows["memory"])
    assert re.match(r"about [\d.]+ \w+, not below [\d.]+ \w+$", rows["time"])
    assert "measured just now" in said and "strategy SingleDeviceStrategy" in said and "precision " in said


def test_a_network_of_any_size_is_told_of_without_making_it(capsys, bfloat16):
    rows, _ = dry(capsys, "fit", "--config", "imagenet64_xl_pretrain", "--trainer.devices", "1")
    assert rows["network"].startswith("autoregressive, 60 layers, width 3072")
    assert rows["data"].endswith("not opened, since that would download or convert it")
    assert rows["memory"].endswith("it does NOT fit")


def test_images_of_a_folder_are_counted_and_other_spellings_understood(capsys):
    save_images(Path("photos"), [f"{number}.png" for number in range(12)])
    words = ["--config", "digits_tiny_pretrain", "--data.source", "photos", "--data.batch_size", "4"]
    assert main(["fit", *words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "photos: 11 training, 1 validation images" in said and "4 images per step" in said


def test_epochs_are_counted_in_steps(capsys, bfloat16):
    words = ["--model.network", "igpt_tiny", "--model.pretrained", "null", "--trainer.limit_train_batches", "3"]
    rows, _ = dry(capsys, "fit", "--config", "digits_tiny_probe", *words)
    assert rows["length"].startswith("3 steps, ")
    assert rows["time"].startswith("features: at most ")


def test_resume_auto_is_tried(capsys):
    recipe = {
        "model": {"class_path": "PretrainModule", "init_args": {"network": NETWORK, "palette": "gray:4"}},
        "data": {"class_path": "PretrainDataModule", "init_args": {"source": "digits", "batch_size": 4}},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "devices": 1, "precision": "32-true", "limit_val_batches": 0},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--config", "mine.yaml", "--trainer.enable_progress_bar", "false"]
    assert dry(capsys, "fit", *words, "--resume", "auto")[0]["begin"] == "at step 0"
    assert main(["fit", *words]) == 0
    (final,) = Path().rglob("final.ckpt")
    rows, _ = dry(capsys, "fit", *words, "--resume", "auto", "--trainer.max_steps", "2")
    assert rows["begin"] == f"goes on from {final.absolute()}" or rows["begin"].endswith(str(final))
    rows, _ = dry(capsys, "validate", *words, "--ckpt_path", str(final))
    assert rows["weights"] == str(final) and "memory" not in rows


def test_mistakes_are_found(capsys):
    with pytest.raises(SystemExit, match="random weights"):
        main(["test", "--config", "digits_tiny_pretrain", "--dry_run"])
    with pytest.raises(SystemExit, match=r"--resume gone: there is no such file"):
        main(["fit", "--config", "digits_tiny_pretrain", "--resume", "gone", "--dry_run"])


def test_quickstart(capsys):
    rows, _ = dry(capsys, "quickstart", "--steps", "20", "--out", "first")
    assert rows["1"] == "pretraining without labels: 20 steps of 16 images"
    assert "674,112 parameters" in rows["network"] and rows["results"].startswith("first: report.html")
    assert rows["time"].startswith("unknown: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.batch_size", "5000"], "1293 training images, but one step takes 5000"),
        (["--data.image_size", "9"], "images of 9 x 9, but the network reads 8 x 8"),
        (["--trainer.default_root_dir", "file.txt"], "file.txt is a file"),
        (["--data.source", "file.txt"], "file.txt"),
        (["--data.source", "empty"], "empty holds no images"),
    ],
)
def test_what_cannot_run_is_told(words, message, tmp_path, capsys):
    Path("file.txt").write_text("words")
    Path("empty").mkdir()
    with pytest.raises(SystemExit, match=message):
        main(["fit", "--config", "digits_tiny_pretrain", *words, "--dry_run"])
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file.txt"]


def test_a_folder_with_other_files_is_counted(capsys):
    save_images(Path("photos"), [f"{number}.png" for number in range(12)])
    Path("photos", "notes.txt").write_text("words")
    rows, _ = dry(
        capsys, "fit", "--config", "digits_tiny_pretrain", "--data.source", "photos", "--data.batch_size", "4"
    )
    assert rows["data"] == "photos: 11 training, 1 validation images"


@pytest.mark.parametrize("checkpoint", ["nowhere.ckpt", "file.txt"])
def test_weights_are_looked_at(checkpoint):
    Path("file.txt").write_text("words")
    with pytest.raises(SystemExit, match=checkpoint):
        main(["test", "--config", "digits_tiny_pretrain", "--ckpt_path", checkpoint, "--dry_run"])


@pytest.mark.parametrize("option", ["--steps", "--epochs", "--threads"])
def test_quickstart_checks_its_numbers_first(option, tmp_path):
    with pytest.raises(SystemExit, match=f"{option[2:]} is 0; it must be at least 1"):
        main(["quickstart", option, "0"])
    assert not list(tmp_path.iterdir())
