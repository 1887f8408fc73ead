"""0 done, 1 something given was wrong, 2 wrong usage, 130 Ctrl-C, 141 nobody reads: the same for every verb."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_igpt
from lightning_igpt import cli
from lightning_igpt.__main__ import LIGHTNING_VERBS, OWN_VERBS, main
from lightning_igpt.commands import recipes

# What is wrong with what is given, though it is well formed.
WRONG = {
    "fit": ["--config", "nowhere"],
    "validate": ["--config", "nowhere"],
    "test": ["--config", "digits_tiny_pretrain"],
    "predict": ["--config", "digits_tiny_pretrain", "--ckpt_path", "nowhere.ckpt"],
    "quickstart": ["--steps", "0", "--dry_run"],
    "complete": ["--pretrained", "nowhere", "--images", "digits"],
    "score": ["--pretrained", "nowhere", "--images", "digits"],
    "lowdata": ["--pretrained", "nowhere", "--source", "digits"],
    "report": ["nowhere"],
    "demo": ["--pretrained", "nowhere"],
    "figures": ["--pretrained", "nowhere", "--images", "digits"],
    "data": ["show", "nowhere"],
    "palette": ["show", "--palette", "nowhere.npy"],
    "convert": ["nowhere", "out"],
    "plan": ["--network", "nothing"],
    "microbatch": ["--config", "nowhere"],
    "launch": ["slurm", "--config", "nowhere", "--nodes", "1", "--gpus", "1", "--time", "10"],
    "recipes": ["show", "nowhere"],
}
SUBVERBS = {"data": ["show"], "palette": ["show"], "launch": ["slurm"], "recipes": ["list"], "completion": ["bash"]}
PACKAGE = str(Path(lightning_igpt.__file__).parents[1])


@pytest.fixture(autouse=True)
def _work_in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_every_verb_is_tried():
    assert {*LIGHTNING_VERBS, *OWN_VERBS} - {"completion"} == WRONG.keys()  # which takes nothing but a shell


@pytest.mark.parametrize("verb", [*LIGHTNING_VERBS, *OWN_VERBS])
def test_a_wrong_option_is_2(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, *SUBVERBS.get(verb, []), "--no_such_option", "1"])
    assert stop.value.code == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith(f"lightning-igpt {verb}") and "--no_such_option" in told and "\n" not in told


@pytest.mark.parametrize("verb", WRONG)
def test_something_wrong_is_1_and_one_line(verb):
    with pytest.raises(SystemExit) as stop:
        main([verb, *WRONG[verb]])
    assert isinstance(stop.value.code, str)  # which the interpreter prints, and exits with 1
    assert stop.value.code.startswith(f"lightning-igpt {verb}") and "\n" not in stop.value.code


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (
            ["plan", "--devices", "many"],
            "plan: --devices is 'many'; it must be a whole number. See lightning-igpt plan",
        ),
        (["plan", "--mfu", "x"], "plan: --mfu is 'x'; it must be a number. See"),
        (["plan", "--objective", "x"], "plan: --objective is 'x'; it must be autoregressive or bert. See"),
        (["convert", "a", "b", "--check=x"], "convert: --check is 'x'; it must be true or false. See"),
        (
            ["fit", "--config", "digits_tiny_pretrain", "--trainer.max_steps", "x"],
            "fit: --trainer.max_steps is 'x'; it",
        ),
        (["score", "--images", "digits"], "score: --pretrained is missing. See lightning-igpt score --help"),
        (["score"], "score: --pretrained and --images are missing. See"),
        (["palette", "fit", "photos"], "palette fit: out is missing. See lightning-igpt palette fit --help"),
        (["recipes"], "recipes: say which verb of it: list, show, copy. See"),
        (["fit"], "fit: --data and --model are missing; name a recipe that has them by --config. See"),
        (["score", "--pretrained", "a", "--images", "b", "extra"], "score: 'extra' is one word too many. See"),
    ],
)
def test_wrong_usage_in_words(words, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert f"lightning-igpt {told}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trainer.precision", "int8"], "trainer: Precision 'int8' is invalid"),
        (["--trainer.strategy", "trap.Trap"], "trainer: You selected an invalid strategy name"),
        (["--trainer.accelerator", "tpuu"], "trainer: You selected an invalid accelerator"),
    ],
)
def test_what_lightning_refuses_is_told_in_one_line(options, told):
    with pytest.raises(SystemExit, match=told) as stop:
        main(["fit", "--config", "digits_tiny_pretrain", *options, "--dry_run"])
    assert "\n" not in stop.value.code


def test_ctrl_c_is_130(monkeypatch, capsys):
    def press():
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "names", press)
    assert main(["recipes", "list"]) == 130
    assert capsys.readouterr().err == "lightning-igpt: interrupted\n"


def test_ctrl_c_in_a_run_is_130_though_lightning_says_1(monkeypatch):
    def press(*args, **options):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    monkeypatch.setattr(cli, "run", press)
    assert main(["fit"]) == 130


def test_a_reader_that_goes_away_ends_it_quietly():
    code = "import sys; from lightning_igpt.__main__ import main; sys.exit(main(['completion', 'fish']))"
    words = [sys.executable, "-c", code]
    program = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONPATH": PACKAGE})
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait() == 141


@pytest.mark.parametrize("name", ["features", "quantize", "sample", "train_step"])
def test_a_benchmark_without_transformers_names_the_extra(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # which makes importing it fail
    for module in (f"lightning_igpt.benchmarks.{name}", "lightning_igpt.benchmarks.peers"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit, match=r"compares with transformers: pip install 'lightning-igpt\[hf\]'$"):
        importlib.import_module(f"lightning_igpt.benchmarks.{name}")
