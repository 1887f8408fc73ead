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
from lightning_igpt.commands.completion_table import parser_of
from lightning_igpt.commands.lightning_parser import without_flags
from lightning_igpt.commands.parsers import options_of, subcommands

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
        (
            ["fit", "--config", "digits_tiny_pretrain", "--data.init_args.batch_size", "x"],
            "fit: --data.batch_size is 'x'; it must be a whole number. See lightning-igpt fit --data.help Pretrain",
        ),
        (
            ["data", "show", "digits", "--data.batch_size", "x"],
            "data show: --data.batch_size is 'x'; it must be a whole",
        ),
        (
            ["fit", "--config", "digits_tiny_pretrain", "--model.lr", "x"],
            "fit: --model.lr is 'x'; it must be a number.",
        ),
        (
            ["fit", "--config", "digits_tiny_pretrain", "--model.objective", "x"],
            "fit: --model.objective is 'x'; it must be autoregressive or bert. See lightning-igpt fit --model.help",
        ),
        (
            ["fit", "--trainer.callbacks+=CompletionGrid", "--trainer.callbacks.n_samples", "x"],
            "fit: --trainer.callbacks.n_samples is 'x'; it must be a whole number. See",
        ),
        (["fit", "--print"], "--print is short for --print_config; write it out. See"),
        (["fit", "--trainer.log", "x"], "--trainer.log is short for several options: --trainer.log"),
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
    said = capsys.readouterr().err
    assert said.startswith("lightning-igpt") and told in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--trainer.devices", "abc", "--trainer.accelerator", "cpu"], "trainer: `devices` selected with"),
        (["--trainer.overfit_batches", "-3"], "trainer: "),
    ],
)
def test_what_lightning_refuses_is_told_in_one_line(options, told):
    with pytest.raises(SystemExit, match=told) as stop:
        main(["fit", "--config", "digits_tiny_pretrain", *options, "--dry_run"])
    assert "\n" not in stop.value.code


SEEDED = {
    "fit": ["--config", "digits_tiny_pretrain", "--dry_run"],
    "quickstart": ["--dry_run"],
    "complete": ["--pretrained", "nowhere", "--images", "digits"],
    "lowdata": ["--pretrained", "nowhere", "--source", "digits"],
    "figures": [],
    "palette": ["fit", "digits", "out.npy"],
}


def test_every_verb_with_a_seed_is_tried():
    parsers = {verb: parser_of(verb) for verb in OWN_VERBS if verb != "completion"}
    parts = {verb: [one, *(part for part, _ in subcommands(one).values())] for verb, one in parsers.items()}
    seeded = {verb for verb, found in parts.items() if any("--seed" in options_of(part) for part in found)}
    assert seeded | {"fit"} == SEEDED.keys()


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
@pytest.mark.parametrize("verb", SEEDED)
def test_a_seed_out_of_range_is_refused_with_its_range(verb, seed):
    option = "seed_everything" if verb == "fit" else "seed"
    with pytest.raises(SystemExit) as stop:
        main([verb, *SEEDED[verb], f"--{option}", seed])
    assert stop.value.code == f"lightning-igpt {verb}: {option} is {seed}; it must be from 0 to 4294967295"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--dry"], ([], True, False)),
        (["--dr", "x"], (["x"], True, False)),
        (["--dry-ru"], ([], True, False)),
        (["--dry_run=true"], ([], True, False)),
        (["--dry-run=false"], ([], False, False)),
        (["--d", "--dry_runs", "--data", "--dry_x"], (["--d", "--dry_runs", "--data", "--dry_x"], False, False)),
    ],
)
def test_ways_to_write_dry_run(words, found):
    assert without_flags(words) == found


def test_the_beginning_of_an_option_will_do(capsys):
    words = ["--tru", "my_package", "--dry", "--trainer.max_st", "3"]
    assert main(["fit", "--config", "digits_tiny_pretrain", *words]) == 0
    said = capsys.readouterr().out
    assert "length      3 steps" in said and "nothing was trained" in said


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
