import pytest
import torch

from lightning_igpt.__main__ import main
from lightning_igpt.modules import FineTuneModule
from lightning_igpt.palette import Palette
from lightning_igpt.weights import load_pretrained, save_pretrained
from tests.modules.helpers import TINY, loader, quiet_trainer
from tests.networks import SMALL_BERT, random_network


@pytest.fixture
def finetuned(tmp_path):
    module = FineTuneModule(num_classes=3, network=TINY, palette="gray:8", class_names=["a", "b", "c"])
    trainer = quiet_trainer(tmp_path / "run", max_epochs=1)
    trainer.fit(module, loader(), loader())
    return module, str(tmp_path / "run")


def test_every_format_of_a_classifier(tmp_path, finetuned, capsys):
    module, run = finetuned
    steps = [("hf", "folder"), ("safetensors", "x.safetensors"), ("hf", "again")]
    source = run
    for to, out in steps:
        assert main(["convert", source, str(tmp_path / out), "--to", to, "--check"]) == 0
        text = capsys.readouterr().out
        assert " 6,752 parameters" in text and "classes           3: a, b, c" in text and "sha256" in text
        assert "largest difference of check logits 0" in text and "class logits up to" in text
        source = str(tmp_path / out)
        loaded = load_pretrained(source)
        assert torch.equal(loaded.network.wte.weight, module.network.wte.weight)
        assert torch.equal(loaded.head, module.head.weight) and loaded.class_names == ["a", "b", "c"]
        assert loaded.card.accuracy is not None and loaded.card.steps == 4
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "folder" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_card_and_image_size(tmp_path, capsys):
    save_pretrained(tmp_path / "a", random_network(), Palette.load("gray:20"))
    words = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--image_size", "6"]
    assert main([*words, "--data", "me/cats", "--license", "mit", "--title", "Cats"]) == 0
    assert "interpolated from 4 x 4 to 6 x 6" in capsys.readouterr().out
    assert load_pretrained(tmp_path / "b").config.image_size == 6
    assert "# Cats" in (tmp_path / "b" / "README.md").read_text()


@pytest.mark.parametrize("to", ["hf", "safetensors"])
def test_float16_halves_the_file_and_is_read_as_float32(tmp_path, finetuned, to):
    module, run = finetuned
    files = []
    for dtype in ("float32", "float16"):
        out = tmp_path / f"{dtype}.safetensors" if to == "safetensors" else tmp_path / dtype
        assert main(["convert", run, str(out), "--to", to, "--dtype", dtype]) == 0
        files.append(out if to == "safetensors" else out / "model.safetensors")
    loaded = load_pretrained(files[1] if to == "safetensors" else files[1].parent)
    for name, value in loaded.network.state_dict().items():
        assert torch.equal(value, module.network.state_dict()[name].half().float()), name
    assert torch.equal(loaded.head, module.head.weight) and loaded.palette == module.palette
    whole, half = (file.stat().st_size for file in files)
    assert half < 0.65 * whole  # headers, palette and class head stay


def test_wrong_use_says_so(tmp_path, capsys):
    save_pretrained(tmp_path / "bert", random_network(SMALL_BERT), Palette.load("gray:20"))
    for words, message in [
        (["--to", "safetensors"], r"must be a \.safetensors file"),
        (["--check"], "transformers cannot run a BERT network"),
    ]:
        with pytest.raises(SystemExit, match=message):
            main(["convert", str(tmp_path / "bert"), str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()
    network = random_network()
    with torch.no_grad():
        network.wte.weight[0, 0] = 70_000.0
    save_pretrained(tmp_path / "large", network, Palette.load("gray:20"))
    with pytest.raises(SystemExit, match="not finite as float16; write float32"):
        main(["convert", str(tmp_path / "large"), str(tmp_path / "half"), "--dtype", "float16"])
    with pytest.raises(SystemExit, match="the format hf is a folder"):
        main(["convert", str(tmp_path / "bert"), str(tmp_path / "out.safetensors")])
    assert main(["convert", str(tmp_path / "bert"), str(tmp_path / "out")]) == 0
    assert "transformers cannot run a BERT network" in capsys.readouterr().out
