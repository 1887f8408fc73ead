import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

from lightning_igpt import report as page
from lightning_igpt.__main__ import main
from lightning_igpt.commands.report import figures, gather_runs
from lightning_igpt.commands.report_curves import read_curves, read_events, read_layers
from lightning_igpt.commands.report_paper import comparisons
from lightning_igpt.commands.report_runs import Run, find_runs, read_run
from lightning_igpt.config import PRESETS
from lightning_igpt.palette import Palette
from lightning_igpt.pictures import save_png

NETWORK = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 4, "image_size": 8}
PICTURE = torch.zeros(3, 4, 4, dtype=torch.uint8)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A folder with a pretraining run of the command line, and its test."""
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
  limit_test_batches: 1
  default_root_dir: {root / "pretrain"}
  enable_progress_bar: false
  enable_model_summary: false
  callbacks: [{{class_path: CompletionGrid, init_args: {{n_images: 1, n_samples: 1}}}}]
""")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["fit", "--config", str(recipe)]) == 0
        checkpoint = next(root.rglob("final.ckpt"))
        assert main(["test", "--config", str(recipe), "--ckpt_path", str(checkpoint)]) == 0
    return root / "pretrain"


@pytest.fixture
def events(tmp_path):
    """A TensorBoard file with ten values of one metric, and of another that is not this package's."""
    writer = SummaryWriter(tmp_path / "run")
    for step in range(10):
        writer.add_scalar("val/accuracy", step / 10, step)
        writer.add_scalar("val/loss", 1.0, step)
    writer.close()
    return next((tmp_path / "run").glob("events*"))


def write_report(*words):
    """The page that the verb writes."""
    assert main(["report", *map(str, words), "--out", "page/report.html"]) == 0
    return Path("page/report.html").read_text(encoding="utf-8")


def write_table(folder, text):
    folder.mkdir()
    (folder / "metrics.csv").write_text(text)


def without_bytes(html):
    return re.sub(r"base64,[^\"]*", "", html)


def test_a_run_of_the_command_line(fitted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    html = without_bytes(write_report(fitted))
    fit, test = (read_run(name, folder) for name, folder in find_runs(fitted).items())
    assert [run.name for run in (fit, test)] == [f"{fitted} · version_0", f"{fitted} · version_1"]
    assert (fit.module, fit.source, fit.n_images, fit.n_drawn) == ("PretrainModule", "digits", 1293, 32)
    assert (test.module, test.n_images) == ("PretrainModule", 1293)  # from the checkpoint that was tested
    assert [step for step, _ in fit.curves["train/nats_per_pixel"]] == [0, 1, 2, 3]
    assert len(fit.curves["val/nats_per_pixel"]) == 4 and "test/nats_per_pixel" not in fit.curves

    best = min(value for _, value in fit.curves["val/nats_per_pixel"])
    assert f"{best:.4f} at step" in html and f"{test.last('test/nats_per_pixel'):.4f}" in html
    assert html.count("<img") == 2  # curve and completions of the fit
    assert "Completions after step 4" in html and "PretrainModule: autoregressive, 1 layers, width 8" in html
    assert not re.search(r'(src|href)="(?!data:)', html) and "<script" not in html and "http" not in html
    assert html.count("<dt>command</dt><dd>") == 1 and f"torch {torch.__version__}" in html  # the test has no record
    assert html.count("2.0895 S, 2.0614 M, 2.0466 L (README; ImageNet)") == 2
    differs = re.findall(r"What differs: (.*?)\.</td>", html)
    assert "measured on validation images (test images)" in differs[0] and "measured" not in differs[1]
    for difference in ("8 × 8 pixels (32 × 32)", "4 colours (512)", "data: digits (ImageNet)", "32 images drawn"):
        assert difference in differs[0] and difference in differs[1]


def test_everything_that_can_lie_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/probe")
    for step in (5, 40, 200):
        save_png(PICTURE, run / f"completions/step-{step:07d}.png")
    for name in ("confusion.png", "worst.png", "probe_by_layer.png"):
        save_png(PICTURE, run / name)
    (run / "probe_by_layer.csv").write_text(
        "layer,c,val_accuracy,test_accuracy\n10,1.0,0.5,\n2,1.0,0.75,0.5\n2-10,1.0,0.9,0.9\n"
    )
    (run / "metrics.csv").write_text(
        "step,epoch,val/accuracy,val/loss,test/accuracy\n3,0,0.25,9,\n7,0,0.75,9,\n8,0,,,0.5\n"
    )
    found = read_run("probe", run)
    assert found.layers == {"validation": {2: 0.75, 10: 0.5}, "test": {2: 0.5}}
    assert found.curves == {"val/accuracy": [(3, 0.25), (7, 0.75)], "test/accuracy": [(8, 0.5)]}
    assert [path.name for path in found.pictures] == ["step-0000200.png", "confusion.png", "worst.png"]
    html = without_bytes(write_report("runs"))
    assert html.count("<img") == 5  # accuracy, layers and the three pictures
    assert "75.0\N{NO-BREAK SPACE}% at step 7" in html and "Module not recorded: nothing more is recorded." in html
    assert "Beside the paper" not in html  # nobody knows what it would stand beside


def test_low_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = [
        {"layer": layer, "labels_per_class": n, "accuracies": [0.5, 0.6], "mean": mean, "sd": 0.02}
        for layer, n, mean in ((0, 4, 0.111), (2, 4, 0.222), (2, 30, 0.333))
    ]
    facts = {
        "pretrained": "a <checkpoint>",
        "network": PRESETS["igpt_l"].to_dict(),
        "palette_sha256": Palette.load("openai").sha256,
        "source": "uoft-cs/cifar10",
        "n_classes": 10,
        "layer": 2,
        "layer_choice": "as asked for",
        "version": "0",
        "results": results,
    }
    Path("low").mkdir()
    Path("low/lowdata.json").write_text(json.dumps(facts))
    (row,) = comparisons(read_run("low", Path("low")))
    assert (row.task, row.paper) == ("4 labels per class", "73.2 ± 1.5 % L (Table 4; CIFAR-10)")
    assert row.here == "22.2 ± 2.0 %".replace("± ", "±\N{NO-BREAK SPACE}").replace(" %", "\N{NO-BREAK SPACE}%")
    assert row.differs == [
        "pretrained weights: a <checkpoint> (ImageNet, 128M images drawn)",
        "layer 2, as asked for (choice not stated)",
        "2 subsets (5)",
    ]
    html = write_report("low")
    assert "a &lt;checkpoint&gt;" in html and "<checkpoint>" not in html
    assert "11.1" in html and "33.3" in html  # in the table of all layers

    Path("low/lowdata.json").write_text(json.dumps({**facts, "results": [{}]}))
    assert read_run("low", Path("low")).warnings[0].startswith("low/lowdata.json is damaged and was skipped")


def test_damaged_events_are_named_and_read_up_to_the_damage(events, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole = events.read_bytes()
    curves, n_read, damaged = read_events(events)
    assert (len(curves["val/accuracy"]), n_read, damaged) == (10, 21, False)
    events.write_bytes(whole[: len(whole) * 2 // 3])  # as a process that was killed leaves it
    curves, n_read, damaged = read_events(events)
    assert 4 < len(curves["val/accuracy"]) < 10 and damaged
    html = write_report("run")
    assert f"{events.name} is damaged, or was cut off with its process: its first {n_read} records were read" in html
    assert events.name in capsys.readouterr().out

    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1  # one bit
    events.write_bytes(flipped)
    assert read_events(events)[2]

    save_png(PICTURE, Path("run/worst.png"))
    events.write_bytes(b"no events, but long enough for a header")
    html = write_report("run")
    assert f"{events.name} is damaged, or was cut off with its process: it was skipped" in html and "<img" in html


def test_a_table_stands_in_for_damaged_events(events):
    events.write_bytes(events.read_bytes()[:-40])
    events.with_name("metrics.csv").write_text("step,val/accuracy\n9,0.9\n20,0.95\n")
    warnings = []
    curve = read_curves(events.parent, warnings)["val/accuracy"]
    assert curve[-2:] == [(9, 0.9), (20, 0.95)] and len(curve) == 11 and len(warnings) == 1


def test_layers_come_from_the_metrics_where_there_is_no_table(tmp_path):
    curves = {
        "probe/layer_0/accuracy": [(1, 0.2), (2, 0.4)],
        "probe/layer_11/accuracy": [(2, 0.5)],
        "test/layer_0/accuracy": [(2, 0.3)],
        "online_probe/layer_3/accuracy": [(1, 0.9)],
    }
    warnings = []
    assert read_layers(tmp_path, curves, warnings) == {"validation": {0: 0.4, 11: 0.5}, "test": {0: 0.3}}
    (tmp_path / "probe_by_layer.csv").write_text("depth,accuracy\n1,2\n")
    assert read_layers(tmp_path, {}, warnings) == {} and "probe_by_layer.csv is damaged" in warnings[0]


def large(module, **fields):
    """A run with the paper's network and palette."""
    sha256 = Palette.load("openai").sha256
    return Run("run", Path("run"), module=module, network=PRESETS["igpt_l"], palette_sha256=sha256, **fields)


@pytest.mark.parametrize(
    ("source", "paper", "difference"),
    [
        ("uoft-cs/cifar10", "96.3 % L (Table 1; CIFAR-10)", None),
        ("uoft-cs/cifar100", "82.8 % L (Table 1; CIFAR-100)", "10 classes (100)"),
        ("data/STL-10", "95.5 % L (Table 1; STL-10)", None),
        ("digits", "96.3 % L (Table 1; CIFAR-10)", "data: digits (CIFAR-10)"),
        (None, "96.3 % L (Table 1; CIFAR-10)", "data not recorded (CIFAR-10)"),
    ],
)
def test_the_papers_row_follows_the_data(source, paper, difference):
    run = large("ProbeModule", source=source, n_classes=10, curves={"test/accuracy": [(1, 0.5)]}, pretrained="w")
    (row,) = comparisons(run)
    assert (row.task, row.here, row.paper) == ("linear probe", "50.0\N{NO-BREAK SPACE}%", paper)
    rest = [text for text in row.differs if "weights" not in text and "training images not recorded" not in text]
    assert rest == ([difference] if difference else [])


def test_one_curve_for_each_online_probe(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(page, "plot_loss", lambda curves, levels, path, **options: drawn.append((curves, path)))
    monkeypatch.setattr(page, "drawing", lambda plot, alt, caption: caption)
    names = [f"online_probe/layer_{layer}/accuracy" for layer in (1, 2, 3)]
    run = Run("run", tmp_path, curves={name: [(0, 0.25), (4, 0.5)] for name in names})
    assert list(figures(run, tmp_path)) == ["Accuracy of the online probe during pretraining."]
    assert drawn[0][0] == {f"layer {layer}": ([0, 4], [25, 50]) for layer in (1, 2, 3)}


def test_what_differs_in_a_density():
    curves = {"val/nats_per_pixel": [(1, 2.0)], "test/nats_per_pixel": [(1, 2.1)]}
    (row,) = comparisons(large("PretrainModule", source="imagenet", n_images=5, n_drawn=128_000_000, curves=curves))
    assert (row.here, row.paper) == ("2.1000", "2.0466 L (README; ImageNet)")
    assert row.differs == ["data: imagenet (ImageNet)", "5 training images (1,281,167)"]
    (row,) = comparisons(large("PretrainModule", pretrained="weights", curves=curves))
    assert row.differs == [
        "data not recorded (ImageNet)",
        "training images not recorded (1,281,167)",
        "images drawn in training not recorded (128,000,000)",
        "started from weights (random weights)",
    ]


def test_bert_has_no_density_and_its_own_fine_tuning():
    run = large("PretrainModule", curves={"test/nats_per_pixel": [(1, 2.1)]})
    run.network = PRESETS["igpt_l"].resolve({**PRESETS["igpt_l"].to_dict(), "objective": "bert"})
    assert list(comparisons(run)) == []
    run.module, run.source, run.curves = "FineTuneModule", "cifar10", {"test/accuracy": [(1, 0.5)]}
    assert next(comparisons(run)).paper == "98.6 % L (section 4.6; CIFAR-10)"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "run does not exist; name the folder of a run"),
        (lambda path: path.write_text(""), "run is no folder"),
        (lambda path: path.mkdir(), r"run holds no run: looked in it and below for events\.out\.tfevents\*, metrics"),
        (lambda path: write_table(path, "step,val/loss\n1,2\n"), "run holds nothing of this package: looked for"),
        (lambda path: write_table(path, "val/accuracy\n2\n"), "metrics.csv is damaged"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    make(Path("run"))
    with pytest.raises(SystemExit, match=f"^lightning-igpt report: .*{message}[^\n]*$"):
        main(["report", "run"])
    assert not Path("report.html").exists()


def test_a_damaged_checkpoint_and_configuration_are_named(fitted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(next(path for path in fitted.rglob("version_0")), folder)
    for path in folder.rglob("*.ckpt"):
        path.write_bytes(b"no checkpoint")
    (folder / "config.yaml").write_text("model: [")
    run = read_run("run", folder)
    assert "config.yaml cannot be read" in run.warnings[0]
    assert "is no checkpoint" in run.warnings[1]
    assert run.module is None and run.network.n_embd == 8  # from hparams.yaml


def test_runs_keep_their_order_and_come_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in (2, 10, 1):
        save_png(PICTURE, Path(f"runs/lightning_logs/version_{number}/worst.png"))
    assert list(find_runs(Path("runs"))) == ["runs · version_1", "runs · version_2", "runs · version_10"]
    assert write_report("runs", "runs/lightning_logs/version_2").count("<img") == 3


def test_folders_on_the_command_line():
    assert gather_runs(["a b", "ü", "--out", "c", "d"]) == ['["a b", "ü", "d"]', "--out", "c"]
    assert gather_runs(["--help"]) == ["--help"]


def test_words_of_a_checkpoint_are_no_markup(fitted, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(fitted, folder)
    for path in folder.rglob("*.ckpt"):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["lightning_igpt"] |= {"class": "<script>alert(1)</script>", "version": "<img src=x>"}
        torch.save(checkpoint, path)
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script" not in page and "<img src=x>" not in page
