"""0 done, 1 something given was wrong, 2 wrong usage, 130 Ctrl-C, 141 no reader: the same for every verb."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

import lightning_igpt
from lightning_igpt import cli
from lightning_igpt.__main__ import LIGHTNING_VERBS, OWN_VERBS, main
from lightning_igpt.commands import recipe_words, recipes
from lightning_igpt.commands.arguments import one_line_errors

# What is wrong with what is given, though it is well formed.
WRONG = {
    "fit": ["--config", "nowhere"],
    "validate": ["--config", "nowhere"],
    "test": ["--config", "digits_tiny_pretrain"],
    "predict": ["--config", "digits_tiny_pretrain", "--ckpt_path", "nowhere.ckpt"],
    "quickstart": ["--steps", "0"],
    "complete": ["--pretrained", "nowhere", "--images", "digits"],
    "score": ["--pretrained", "nowhere", "--images", "digits"],
    "lowdata": ["--pretrained", "nowhere", "--source", "digits"],
    "distance": ["--source", "nowhere"],
    "features": ["--source", "nowhere"],
    "report": ["nowhere"],
    "demo": ["--pretrained", "nowhere"],
    "data": ["show", "nowhere"],
    "palette": ["show", "--palette", "nowhere.npy"],
    "convert": ["nowhere", "out"],
    "plan": ["--network", "nothing"],
    "recipes": ["show", "nowhere"],
    "scaling": ["fit", "nowhere"],
}
SUBVERBS = {"data": ["show"], "palette": ["show"], "recipes": ["list"], "scaling": ["fit"]}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(lightning_igpt.__file__).parents[1])}


@pytest.fixture(autouse=True)
def _work_in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("verb", [*LIGHTNING_VERBS, *OWN_VERBS])
def test_a_wrong_option_is_2(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, *SUBVERBS.get(verb, []), "--no_such_option", "1"])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--no_such_option" in last or "required" in last


@pytest.mark.parametrize("verb", [*LIGHTNING_VERBS, *OWN_VERBS])
def test_something_wrong_is_1_and_one_line(verb):
    with pytest.raises(SystemExit) as stop:
        main([verb, *WRONG[verb]])
    assert isinstance(stop.value.code, str)  # which the interpreter prints, and exits with 1
    assert stop.value.code.startswith(f"lightning-igpt {verb}") and "\n" not in stop.value.code


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data.batch_size", "x"], "batch_size"),
        (["--model", "PretrainModul"], "PretrainModul"),
        (["--trainer.max_stepz", "1"], "trainer.max_stepz"),
    ],
)
def test_wrong_usage_of_a_recipe_is_one_line_that_names_it(words, named, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "digits_tiny_pretrain", *words])
    said = capsys.readouterr().err
    assert said.startswith("lightning-igpt fit: ") and said.endswith("See lightning-igpt fit --help\n")
    assert named in said and said.count("\n") == 1


def test_options_of_our_classes_are_checked_without_torch_and_others_are_left_to_them(tmp_path):
    (tmp_path / "other.yaml").write_text("model:\n  class_path: somewhere.Network\n")
    words = ["fit", "--model", "PretrainModule", "--data=PretrainDataModule"]
    words += ["--data.init_args.batch_size=3", "--data.image_size", "8"]
    recipe_words.check([*words, "--model.network.n_layer", "3", "--data.help", "--model.betas+", "1"])
    for other in (["-c", "other.yaml"], ["--model", "BoringModel"]):
        recipe_words.check([*words, *other, "--model.lrr", "1"])
    recipe_words.check(["fit", "-c", "/dev/null", "--model.lrr", "1"])  # as from a pipe, whose class is not known yet
    with pytest.raises(SystemExit):
        recipe_words.check([*words, "--model.lrr", "1"])


@pytest.mark.parametrize("signal_number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped(signal_number, status):
    words = ["fit", "--config", "digits_tiny_pretrain", "--trainer.enable_progress_bar", "false"]
    command = [sys.executable, "-m", "lightning_igpt", *words, "--trainer.accelerator", "cpu"]
    obey = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    program = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, preexec_fn=obey)
    for line in program.stderr:
        if line.startswith("precision"):  # training starts
            program.send_signal(signal_number)
            break
    said = program.communicate()[1]
    assert program.returncode == status and "--resume auto" in said


@pytest.mark.parametrize(("kind", "status"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_status_though_lightning_or_rich_say_1(kind, status, monkeypatch):
    def stop(*args, **options):
        try:
            raise kind
        except kind:
            sys.exit(1)

    monkeypatch.setattr(cli, "run", stop)
    assert main(["fit"]) == status


def test_a_reader_that_goes_away_ends_it_quietly():
    code = "import sys; from lightning_igpt.__main__ import main; sys.exit(main(['recipes', 'list']))"
    program = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, env=ENVIRONMENT)
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait() == 141


@pytest.mark.skipif(os.name != "posix", reason="shells close streams this way")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams(closed):
    words = [sys.executable, "-m", "lightning_igpt", "recipes", "copy", "digits_tiny_probe"]
    done = subprocess.run(["sh", "-c", f'exec "$0" "$@" {closed}', *words], env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    assert Path("digits_tiny_probe.yaml").read_bytes() == recipes.find("digits_tiny_probe").read_bytes()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "/none"), "/none: No such .* kept there; set HF_HOME"),
        (NotADirectoryError(20, "Not a directory", "/else"), r"/else: Not a directory$"),
        (OSError("\x1b[31mred\udcff"), r"x: \\x1b\[31mred\\udcff$"),
    ],
)
def test_errors_of_the_system_name_purpose_and_variable(error, said, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/none/deep")
    with pytest.raises(SystemExit, match=said), one_line_errors("lightning-igpt x"):
        raise error
