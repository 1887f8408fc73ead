"""What is said of names that do not exist: one line, one wording, and the name that was meant."""

import pytest

from lightning_igpt.__main__ import main
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.palette import Palette
from lightning_igpt.planning import find_device
from lightning_igpt.spelling import closest, there_is_no

FIT = ["fit", "--config", "digits_tiny_pretrain"]


def test_one_wording():
    see = "See lightning-igpt recipes list"
    assert there_is_no("recipe", "xyz", ["xya"], see) == (
        "there is no recipe 'xyz'; did you mean 'xya'? See lightning-igpt recipes list"
    )
    assert there_is_no("recipe", "q", ["xya"], see) == "there is no recipe 'q'. See lightning-igpt recipes list"
    assert there_is_no("recipe", "q", ["xya"]) == "there is no recipe 'q'"


@pytest.mark.parametrize(
    ("word", "found"),
    [("--MAX-step", "--max_steps"), ("pretrainmodul", "PretrainModule"), ("zzz", None), ("", None)],
)
def test_case_and_dashes_do_not_matter(word, found):
    assert closest(word, ["--max_steps", "PretrainModule"]) == found


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["fitt"], 2, "lightning-igpt: there is no verb 'fitt'; did you mean 'fit'? See lightning-igpt --help"),
        (["recipes", "lst"], 2, "lightning-igpt recipes: there is no verb 'lst'; did you mean 'list'? It is one of"),
        (["launch", "slrm"], 2, "lightning-igpt launch: there is no verb 'slrm'; did you mean 'slurm'?"),
        (["data", "shw"], 2, "lightning-igpt data: there is no verb 'shw'; did you mean 'show'?"),
        (["recipes", "show", "digits_tiny_prob"], 1, "recipes: there is no recipe 'digits_tiny_prob'; did you mean"),
        (["fit", "--config", "digits_tiny_pretrian"], 1, "'; did you mean 'digits_tiny_pretrain'? See lightning-igpt"),
        (["plan", "--config", "gone/digits.yaml"], 1, "there is no file or recipe 'gone/digits.yaml'"),
        (["plan", "--network", "igpt_x"], 1, "there is no preset 'igpt_x'; did you mean 'igpt_xl'? Presets: igpt_tiny"),
        (["plan", "--device_kind", "h10"], 1, "there is no device 'h10'; did you mean 'h100'? Devices: b200"),
        (["plan", "--devics", "3"], 2, "plan: there is no option '--devics'; did you mean '--devices'? See"),
        (["launch", "slurm", "--confg", "x"], 2, "launch slurm: there is no option '--confg'; did you mean '--config'"),
        ([*FIT, "--max_step", "3"], 2, "fit: there is no option '--max_step'; did you mean '--trainer.max_steps'?"),
        ([*FIT, "--model", "PretrainModul"], 2, "--model: there is no class 'PretrainModul'; did you mean 'PretrainM"),
        ([*FIT, "--data", "ProbeDataModul"], 2, "--data: there is no class 'ProbeDataModul'; did you mean 'ProbeData"),
        ([*FIT, "--trainer.callbacks+=CompletionGri"], 2, "there is no class 'CompletionGri'; did you mean 'Completio"),
        (["fit", "--model.help", "ProbeModul"], 2, "--model: there is no class 'ProbeModul'; did you mean 'ProbeModu"),
        ([*FIT, "--model.lrr", "1"], 2, "model is a PretrainModule: there is no option 'lrr'; did you mean 'lr'? See"),
        (["palette", "show", "--palette", "opnai"], 1, "there is no palette 'opnai'; did you mean 'openai'?"),
    ],
)
def test_every_name_that_can_be_misspelt(words, status, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert (1 if isinstance(stop.value.code, str) else stop.value.code) == status
    message = str(stop.value.code) if status == 1 else capsys.readouterr().err.rstrip("\n")
    assert told in message and "\n" not in message


def test_a_misspelt_key_in_a_recipe(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("trainer: {max_stepz: 3}\n")
    with pytest.raises(SystemExit, match="2"):
        main([*FIT, "--config", str(tmp_path / "mine.yaml")])
    assert "there is no option 'trainer.max_stepz'; did you mean 'trainer.max_steps'?" in capsys.readouterr().err


def test_in_python_too():
    with pytest.raises(ValueError, match="there is no preset 'igpt_tinny'; did you mean 'igpt_tiny'"):
        ImageGPTConfig.resolve("igpt_tinny")
    with pytest.raises(ValueError, match="there is no device 'a1000'; did you mean 'a10"):
        find_device("a1000")
    with pytest.raises(ValueError, match="there is no palette 'gray'; did you mean 'gray:16'"):
        Palette.load("gray")
