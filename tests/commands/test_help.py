"""``--help`` of every verb fits the terminal, shows all that can be given, and its examples parse."""

import pytest
import yaml

from lightning_igpt import cli
from lightning_igpt.__main__ import LIGHTNING_VERBS, OWN_VERBS, main
from lightning_igpt.commands.help import EXAMPLES

VERBS = [verb for verb in EXAMPLES if verb != "data show"]


def shown(words, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*words, "--help"])
    return capsys.readouterr().out


def test_every_verb_has_examples():
    assert {verb.split()[0] for verb in EXAMPLES} == {*LIGHTNING_VERBS, *OWN_VERBS}


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_the_terminal_and_ends_with_examples(verb, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(verb.split(), capsys)
    assert max(map(len, text.splitlines())) <= 80
    assert text.startswith(f"usage: lightning-igpt {verb} ")
    examples = " ".join(text.rpartition("examples:\n")[2].replace("\\\n", " ").split())
    assert examples == " ".join(f"lightning-igpt {line}" for line in EXAMPLES[verb])
    options = {word for word in examples.split() if word.startswith("--") and not word.startswith("--data.")}
    assert options <= {*text.rpartition("examples:")[0].split()} | {"--open", "--check"}


def test_the_list_of_verbs_fits_the_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == main([]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert all(f"\n  {verb:<12}{about[:20]}" in text for verb, about in (LIGHTNING_VERBS | OWN_VERBS).items())


@pytest.mark.parametrize(
    "words, named",
    [
        (["--trainer.callbacks.help", "CompletionGrid"], "--trainer.callbacks.n_samples"),
        (["--model.help", "PretrainModule"], "--model.objective"),
    ],
)
def test_help_of_a_class_by_its_short_name(words, named, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", *words])
    assert named in capsys.readouterr().out


def test_completion_of_options(capsys):
    pytest.importorskip("shtab")
    with pytest.raises(SystemExit, match="0"):
        cli.run(["fit", "--print_completion", "shtab-bash"])
    script = capsys.readouterr().out
    assert "--model.lr" in script and "--trainer.max_steps" in script and len(script) < 1_000_000


def test_short_class_names(capsys, tmp_path):
    words = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "logs", "--data.source", "photos"]
    words += ["--trainer.callbacks+=CompletionGrid", "--trainer.callbacks+=ModelCheckpoint"]
    (tmp_path / "mine.yaml").write_text("trainer: {strategy: DDPStrategy, callbacks: [{class_path: OnlineProbe}]}")
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "-c", "digits_tiny_pretrain", "-c", str(tmp_path / "mine.yaml"), *words, "--print_config"])
    recipe = yaml.safe_load(capsys.readouterr().out)
    trainer = recipe["trainer"]
    named = [trainer["logger"], trainer["strategy"], *trainer["callbacks"]]
    assert [entry["class_path"].rsplit(".", 1)[1] for entry in named] == [
        *("TensorBoardLogger", "DDPStrategy", "OnlineProbe", "CompletionGrid", "ModelCheckpoint")
    ]
    assert recipe["data"]["init_args"]["source"] == "photos"
