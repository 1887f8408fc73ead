"""``--dry_run`` says what would run, and nothing runs."""

import re
from pathlib import Path

import pytest
import yaml

from lightning_igpt.__main__ import main
from lightning_igpt.commands import cpu, dry_run, plan, recipes
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.planning import find_device, largest_batch, train_flops_per_token
from tests.image_files import save_images

NETWORK = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 4, "image_size": 8}


@pytest.fixture(autouse=True)
def _work_in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # a row on a line
    monkeypatch.setattr(cpu, "train_speed", lambda *args: 1e10)


def dry(capsys, *words):
    """What is printed, by the names of the rows."""
    before = {*Path().rglob("*")}
    assert main([*words, "--dry_run"]) == 0
    assert {*Path().rglob("*")} == before
    said = capsys.readouterr().out
    assert said.endswith("dry run: nothing was trained, and nothing was written\n")
    return dict(re.findall(r"^(\w+) {2,}(.*)$", said, re.MULTILINE)), said


def test_fit_says_what_would_run(capsys):
    rows, said = dry(capsys, "fit", "--config", "digits_tiny_pretrain")
    assert rows["would"] == "fit: PretrainModule on PretrainDataModule"
    assert "674,112 parameters, 8 x 8 pixels" in rows["network"] and rows["weights"] == "drawn at random"
    assert rows["data"] == "digits: 1,293 training, 360 test, 144 validation images"
    steps = yaml.safe_load((recipes.folder() / "digits_tiny_pretrain.yaml").read_text())["trainer"]["max_steps"]
    assert rows["length"] == f"{steps} steps of 16 images (16 at once x 1 device x 1 accumulated)"
    assert rows["results"].startswith("runs/digits_tiny_pretrain")
    assert re.fullmatch(r"0\.\d+ of [\d.]+ GiB per device, activation checkpointing: off", rows["memory"])
    assert steps == 800 and "strategy SingleDeviceStrategy" in said and "precision " in said
    trained = 800 * 16 + 10 * 144 / 3  # a forward pass, of 10 validations, is a third of a step
    seconds = trained * 64 * train_flops_per_token(ImageGPTConfig(6, 4, 96, vocab_size=16, image_size=8)) / 1e10
    assert rows["time"] == f"about {plan.hours(seconds)}, at the speed of 5 training steps now"


def test_a_network_of_any_size_is_described_without_making_it(capsys, monkeypatch):
    words = ["--trainer.devices", "1", "--trainer.precision", "32-true", "--data.batch_size", "64"]
    rows, _ = dry(capsys, "fit", "--config", "imagenet64_xl_pretrain", *words)
    assert rows["network"].startswith("autoregressive, 60 layers, width 3072")
    assert "not opened" in rows["data"] and "does NOT fit" in rows["memory"]
    monkeypatch.setenv("COLUMNS", "80")
    assert max(map(len, dry(capsys, "fit", "--config", "imagenet64_xl_pretrain")[1].splitlines())) <= 80


def test_the_accumulation_that_fits_is_the_smallest(capsys, monkeypatch):
    device = find_device("rtx4090")
    monkeypatch.setattr(dry_run, "measured_cpu", lambda *args: device)
    words = ["--data.batch_size", "128", "--trainer.devices", "1", "--trainer.precision", "bf16-mixed"]
    rows, _ = dry(capsys, "fit", "--config", "imagenet32_s_pretrain", "--trainer.accelerator", "cpu", *words)
    parts = int(re.search(r"accumulate_grad_batches (\d+) does$", rows["memory"])[1])
    most = largest_batch(PRESETS["igpt_s"], device.usable, precision="bf16-mixed")
    assert 128 // parts <= most < 128 // (parts // 2)
    words += ["--trainer.accelerator", "cpu", "--trainer.accumulate_grad_batches", str(parts)]
    assert "NOT" not in dry(capsys, "fit", "--config", "imagenet32_s_pretrain", *words)[0]["memory"]


def test_images_of_a_folder_are_counted(capsys):
    save_images(Path("photos"), [f"{number}.png" for number in range(12)])
    Path("photos", "notes.txt").write_text("words")
    words = ["--config", "digits_tiny_pretrain", "--data.source", "photos", "--data.batch_size", "4"]
    rows, _ = dry(capsys, "fit", *words)
    assert rows["data"] == "photos: 11 training, 1 validation images"


def test_epochs_are_counted_in_steps(capsys):
    words = ["--model.network", "igpt_tiny", "--model.pretrained", "null", "--trainer.limit_train_batches", "3"]
    rows, _ = dry(capsys, "fit", "--config", "digits_tiny_probe", *words)
    assert rows["length"].startswith("3 steps of ") and rows["time"].startswith("features: at most ")


def test_a_run_that_ends_by_the_clock(capsys):
    words = ["--config", "digits_tiny_pretrain", "--trainer.max_steps", "-1", "--trainer.max_time", "00:02:00:00"]
    rows, text = dry(capsys, "fit", *words)
    assert rows["length"].startswith("unknown steps") and " per step, at " in rows["time"]
    assert "ends after 2 hours (max_time)" in text


def test_resume_auto_and_checkpoints_are_tried(capsys):
    recipe = {
        "model": {"class_path": "PretrainModule", "init_args": {"network": NETWORK, "palette": "gray:4"}},
        "data": {"class_path": "PretrainDataModule", "init_args": {"source": "digits", "batch_size": 4}},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "devices": 1, "precision": "32-true", "limit_val_batches": 0},
    }
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--config", "mine.yaml", "--trainer.enable_progress_bar", "false"]
    assert dry(capsys, "fit", *words, "--resume", "auto")[0]["weights"] == "drawn at random"
    assert main(["fit", *words]) == 0
    (final,) = Path().rglob("final.ckpt")
    rows, _ = dry(capsys, "fit", *words, "--resume", "auto", "--trainer.max_steps", "2")
    assert rows["weights"].endswith(str(final))
    rows, _ = dry(capsys, "validate", *words, "--ckpt_path", str(final))
    assert rows["weights"] == str(final) and "memory" not in rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", "--data.batch_size", "5000"], "5000 exceeds the number of training images, 1293"),
        (
            ["fit", "--data.batch_size", "9", "--trainer.accumulate_grad_batches", "2"],
            "9 is no multiple of devices 1 x micro-batches 2",
        ),
        (["fit", "--data.image_size", "9"], "image_size is 9, but the network reads images of 8 x 8"),
        (["fit", "--trainer.default_root_dir", "file.txt"], "file.txt is a file"),
        (["fit", "--data.source", "file.txt"], "file.txt"),
        (["fit", "--resume", "gone"], "--resume gone does not exist"),
        (["fit", "--data.source", ""], "source is empty"),
        (["fit", "--data.source", "null"], "source is empty"),
        (["test"], "random weights"),
        (["test", "--ckpt_path", "nowhere.ckpt"], "nowhere.ckpt"),
        (["test", "--ckpt_path", "file.txt"], "file.txt"),
    ],
)
def test_mistakes_are_found(words, message, tmp_path, capsys):
    Path("file.txt").write_text("words")
    with pytest.raises(SystemExit, match=message):
        main([words[0], "--config", "digits_tiny_pretrain", *words[1:], "--dry_run"])
    assert capsys.readouterr().out == "" and [path.name for path in tmp_path.iterdir()] == ["file.txt"]
