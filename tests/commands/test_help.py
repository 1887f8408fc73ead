"""``--help`` of every verb, and short class names."""

import importlib
import re

import pytest
import yaml

from lightning_igpt import cli
from lightning_igpt.__main__ import LIGHTNING_VERBS, OWN_VERBS, main, usage
from lightning_igpt.commands.completion_table import parser_of
from lightning_igpt.commands.examples import EXAMPLES
from lightning_igpt.commands.parsers import subcommands, visible

NOISE = ("type:", "null", "Union[", "Optional[", "Literal[", "<class", ":paramref:", "``", "SUPPRESS", "==")


@pytest.fixture(scope="module")
def parsers():
    """The parser of every verb and sub-verb, by its words."""
    found = {name: part for name, (part, _) in subcommands(cli.parser()).items()}
    found |= {verb: parser_of(verb) for verb in OWN_VERBS if verb != "completion"}
    for verb, parser in list(found.items()):
        found |= {f"{verb} {name}": part for name, (part, _) in subcommands(parser).items()}
    return found


def shown(words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*words.split(), "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_every_verb_is_there(parsers):
    assert {*LIGHTNING_VERBS, *OWN_VERBS} - {"completion"} <= parsers.keys()
    assert {"data show", "palette fit", "launch slurm", "launch torchrun", "recipes copy"} <= parsers.keys()


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_the_list_of_verbs_fits_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = usage()
    assert max(map(len, text.splitlines())) <= columns
    assert all(f"\n  {verb:<12}{about.split()[0]}" in text for verb, about in (LIGHTNING_VERBS | OWN_VERBS).items())


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_help_fits_the_terminal_and_is_plain(parsers, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    for verb, parser in parsers.items():
        text = parser.format_help()
        body, _, examples = text.partition("\nexamples:\n")
        assert max(map(len, text.splitlines())) <= columns, verb
        assert " ".join(examples.replace("\\\n", " ").split()) == " ".join(EXAMPLES.get(verb, ())), verb
        assert not [word for word in NOISE if word in body], verb
        assert text.startswith(f"usage: lightning-igpt {verb} "[:-1]), verb
        assert examples or not EXAMPLES.get(verb), verb


def test_every_option_of_ours_is_explained(parsers):
    for verb, parser in parsers.items():
        missing = [one.dest for one in visible(parser) if not one.help and not one.dest.startswith("trainer.")]
        assert not missing, verb


def test_every_verb_has_examples_that_parse(parsers):
    assert {verb for verb in parsers if verb not in EXAMPLES} == {"launch worker"}  # which torchrun starts
    for verb, lines in EXAMPLES.items():
        assert all(line.startswith(f"lightning-igpt {verb.split()[0]}") for line in lines)
        for line in lines:
            words = line.split()[1:]
            options = {word for word in words[: [*words, "--"].index("--")] if word.startswith("--")}
            known = {name for name, part in parsers.items() if line.startswith(f"lightning-igpt {name}")}
            names = {option for name in known for one in visible(parsers[name]) for option in one.option_strings}
            rest = {option for option in options - names if not option.startswith("--data.")} - {"--dry_run"}
            assert not rest, line


def test_fits_help_is_of_bearable_length_and_tells_where_more_is(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = shown("fit", capsys)
    assert len(text.splitlines()) < 140
    assert all(word in text for word in ("--model.help", "--data.help", "--trainer.help", "recipes list", "--dry_run"))
    assert re.search(r"--trainer\.NAME:\n(  .*\n)*.*gradient_clip_val", text)
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--trainer.help"])
    assert "--trainer.gradient_clip_val X" in capsys.readouterr().out


def test_what_must_be_given_comes_first(capsys):
    text = shown("complete", capsys)
    assert text.startswith("usage: lightning-igpt complete --pretrained WEIGHTS --images SOURCE [options]\n")
    needed, options = text.index("needed:"), text.index("options:")
    assert needed < text.index("  --pretrained WEIGHTS") < options < text.index("  --out PATH")
    assert "usage: lightning-igpt palette fit SOURCE OUT [options]" in shown("palette fit", capsys)


def test_help_of_a_class_by_its_short_name(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--trainer.callbacks.help", "CompletionGrid"])
    assert "--trainer.callbacks.n_samples N" in capsys.readouterr().out


def test_help_verb_is_verb_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["help", "recipes", "show"])
    assert capsys.readouterr().out.startswith("usage: lightning-igpt recipes show NAME")


def test_a_switch_may_stand_alone_after_a_sub_verb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for overwrite in ([], ["--overwrite"]):
        assert main(["recipes", "copy", "digits_tiny_probe", *overwrite]) == 0


def config(capsys, *words):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", "digits_tiny_pretrain", *words, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


def class_at(path):
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def test_short_class_names_on_the_command_line(capsys):
    words = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "logs"]
    words += ["--trainer.callbacks+=CompletionGrid", "--trainer.callbacks+=ModelCheckpoint"]
    words += ["--trainer.strategy", "DDPStrategy", "--data", "PretrainDataModule", "--model", "PretrainModule"]
    trainer = config(capsys, *words)["trainer"]
    assert class_at(trainer["logger"]["class_path"]).__name__ == "TensorBoardLogger"
    assert [class_at(one["class_path"]).__name__ for one in trainer["callbacks"]][-2:] == [
        "CompletionGrid",
        "ModelCheckpoint",
    ]
    assert class_at(trainer["strategy"]["class_path"]).__name__ == "DDPStrategy"


def test_short_class_names_in_yaml(capsys, tmp_path):
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "x"}}
    trainer = {"logger": logger, "callbacks": [{"class_path": "OnlineProbe"}]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    trainer = config(capsys, "--config", str(tmp_path / "mine.yaml"))["trainer"]
    assert class_at(trainer["logger"]["class_path"]).__name__ == "CSVLogger"
    assert class_at(trainer["callbacks"][0]["class_path"]).__name__ == "OnlineProbe"


@pytest.mark.parametrize("name", ["lightning.pytorch.strategies.DDPStrategy", "DDPStrategy", "ddp", "auto"])
def test_a_strategy_may_be_a_class_without_options(name, capsys):
    taken = config(capsys, "--trainer.strategy", name)["trainer"]["strategy"]
    assert taken == name if "DDP" not in name else taken["class_path"] == "lightning.pytorch.strategies.DDPStrategy"
