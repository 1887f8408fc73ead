import json
import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from lightning_igpt.__main__ import main
from lightning_igpt.commands.report import report
from lightning_igpt.pictures import save_png
from lightning_igpt.report import read_runs

NETWORK = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 4, "image_size": 8}


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """The folder of a pretraining run of the command line, and what the console shows of it."""
    root = tmp_path_factory.mktemp("runs")
    recipe = root / "recipe.yaml"
    recipe.write_text(f"""
model: {{class_path: PretrainModule, init_args: {{network: {json.dumps(NETWORK)}, palette: "gray:4"}}}}
data: {{class_path: PretrainDataModule, init_args: {{source: digits, batch_size: 8}}}}
trainer:
  max_steps: 4
  log_every_n_steps: 1
  accelerator: cpu
  precision: 32-true
  limit_val_batches: 1
  default_root_dir: {root / "pretrain"}
  enable_progress_bar: false
  enable_model_summary: false
  logger: [{{class_path: CSVLogger, init_args: {{save_dir: {root / "pretrain"}}}}}]
  callbacks: [{{class_path: CompletionGrid, init_args: {{n_images: 1, n_samples: 1}}}}]
""")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["fit", "--config", str(recipe)]) == 0
    return root / "pretrain"


def write(folder, text):
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(text)


def without_bytes(path):
    return re.sub(r"base64,[^\"]*", "", Path(path).read_text(encoding="utf-8"))


def test_a_run_of_the_command_line(fitted, tmp_path):
    assert main(["report", str(fitted), "--out", str(tmp_path / "new" / "page.html")]) == 0
    html = without_bytes(tmp_path / "new" / "page.html")
    (run,) = read_runs(fitted)
    assert run.curves["train/nats_per_pixel"][0] == [0, 1, 2, 3]
    steps, values = run.curves["val/nats_per_pixel"]
    assert f"{min(values):.4f} at step {steps[values.index(min(values))]}" in html
    assert dict(run.settings)["module.hparams.network.vocab_size"] == "4" and version("torch") in html
    assert html.count("<img") == 2 and "Completions at step 0000004" in html
    assert not re.search(r'(src|href)="(?!data:)', html) and "<script" not in html and "http" not in html


def test_numbers_layers_and_pictures_of_a_probe(tmp_path):
    folder = tmp_path / "probe"
    write(
        folder,
        "step,epoch,val/accuracy,probe/layer_0/accuracy,probe/layer_11/accuracy,probe/layer_2/accuracy,test/accuracy\n"
        "3,0,0.25,,,,\n7,0,0.75,0.2,0.5,0.4,\n7,0,0.5,,,,\n8,0,,,,,0.625\n",
    )
    for name in ("confusion.png", "worst.png"):
        save_png(torch.zeros(3, 4, 4, dtype=torch.uint8), folder / name)
    (run,) = read_runs(tmp_path)
    assert run.layers("probe") == ([0, 2, 11], [0.2, 0.4, 0.5]) and run.layers("test") == ([], [])
    report([str(tmp_path)], out=str(tmp_path / "page.html"))
    html = without_bytes(tmp_path / "page.html")
    assert html.count("<img") == 4  # accuracy, layers and the two pictures
    assert "0.6250" in html and "0.5000" in html and "0.7500 at step 7" in html


def test_runs_keep_their_order_and_come_once(tmp_path):
    for number in (2, 10, 1):
        write(tmp_path / f"version_{number}", "step,val/accuracy\n1,0.5\n")
    assert [run.folder.name for run in read_runs(tmp_path)] == ["version_1", "version_2", "version_10"]
    words = [str(tmp_path), str(tmp_path / "version_2"), "--out", str(tmp_path / "page.html")]
    assert main(["report", *words]) == 0
    assert "3 runs" in without_bytes(tmp_path / "page.html")


def test_words_of_a_record_are_no_markup(tmp_path):
    write(tmp_path / "run", "step,val/nats_per_pixel\n1,2.5\n2,nan\n")
    record = {"runs": [{}, {"module": {"class": "<script>alert(1)</script>"}, "seeds": {"model": 0, "data": None}}]}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    assert read_runs(tmp_path)[0].settings == [("module.class", "<script>alert(1)</script>"), ("seeds.model", "0")]
    report([str(tmp_path)], out=str(tmp_path / "page.html"))
    html = without_bytes(tmp_path / "page.html")
    assert "<script" not in html and "2.5000 at step 1" in html  # what diverged is not the best


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no run"),
        ({"metrics.csv": "val/accuracy\n2\n"}, r"metrics\.csv is damaged"),
        ({"metrics.csv": "step,val/accuracy\n1,x\n"}, r"metrics\.csv is damaged"),
    ],
)
def test_mistakes_name_the_file(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        report([str(tmp_path)], out=str(tmp_path / "page.html"))
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("record", ["", "{", '{"runs": []}', '{"network": {"vocab_size": "4 {0} $"}}'])
def test_damage_in_one_run_leaves_the_others(record, tmp_path):
    write(tmp_path / "a", "step,online_probe/$x{/accuracy,val/nats_per_pixel\n1,0.5,2\n2,0.6,1\n")
    (tmp_path / "a" / "run.json").write_text(record)
    (tmp_path / "a" / "worst.png").touch()
    write(tmp_path / "b", "step,val/accuracy\n1,0.25\n")
    report([str(tmp_path)], out=str(tmp_path / "page.html"))
    html = without_bytes(tmp_path / "page.html")
    assert "worst.png is left out, since it cannot be read" in html and "0.2500 at step 1" in html
    assert ("damaged" in html) == ("vocab" not in record)
