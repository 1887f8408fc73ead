"""What is said of names that do not exist: one line, one wording, and the name that was meant."""

from typing import get_args

import pytest
from lightning.fabric.plugins.precision.precision import _PRECISION_INPUT_STR, _PRECISION_INPUT_STR_ALIAS
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from lightning_igpt.__main__ import main
from lightning_igpt.commands.trainer_names import PRECISIONS, check_names
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
        (["plan", "--network", "igpt_x"], 1, "there is no preset 'igpt_x'; the presets are igpt_tiny"),
        (["plan", "--device_kind", "h10"], 1, "there is no device 'h10'; did you mean 'h100'? Devices: b200"),
        (["plan", "--devics", "3"], 2, "plan: there is no option '--devics'; did you mean '--devices'? See"),
        (["launch", "slurm", "--confg", "x"], 2, "launch slurm: there is no option '--confg'; did you mean '--config'"),
        ([*FIT, "--max_step", "3"], 2, "fit: there is no option '--max_step'; did you mean '--trainer.max_steps'?"),
        ([*FIT, "--model", "PretrainModul"], 2, "--model: there is no class 'PretrainModul'; did you mean 'PretrainM"),
        ([*FIT, "--data", "ProbeDataModul"], 2, "--data: there is no class 'ProbeDataModul'; did you mean 'ProbeData"),
        ([*FIT, "--trainer.callbacks+=CompletionGri"], 2, "there is no class 'CompletionGri'; did you mean 'Completio"),
        (["fit", "--model.help", "ProbeModul"], 2, "--model: there is no class 'ProbeModul'; did you mean 'ProbeModu"),
        ([*FIT, "--model.lrr", "1"], 2, "model is a PretrainModule: there is no option 'lrr'; did you mean 'lr'? See"),
        (
            [*FIT, "--trainer.accelerator", "gpuu"],
            1,
            "accelerator 'gpuu'; did you mean 'gpu'? It is one of auto, gpu, cpu",
        ),
        (
            [*FIT, "--trainer.strategy", "dddp"],
            1,
            "there is no strategy 'dddp'; did you mean 'ddp'? It is one of auto,",
        ),
        (
            [*FIT, "--trainer.strategy", "trap.Trap"],
            1,
            "there is no strategy 'trap.Trap'. It is one of auto, fsdp2, ddp",
        ),
        ([*FIT, "--trainer.precision", "bf16-mix"], 1, "no precision 'bf16-mix'; did you mean 'bf16-mixed'? It is one"),
        ([*FIT, "--dryrun"], 2, "fit: there is no option '--dryrun'; did you mean '--dry_run'? See lightning-igpt fit"),
        ([*FIT, "--trsut", "x"], 2, "fit: there is no option '--trsut'; did you mean '--trust'? See"),
        (["palette", "show", "--palette", "opnai"], 1, "there is no palette 'opnai'; a palette is 'openai'"),
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


def test_what_is_registered_with_lightning_is_known():
    class Own(SingleDeviceStrategy):
        pass

    StrategyRegistry.register("own_strategy", Own, description="of a test")
    try:
        check_names({"strategy": "own_strategy", "accelerator": "cpu", "precision": "32"})
    finally:
        StrategyRegistry.remove("own_strategy")
    check_names({"strategy": {"class_path": "any.Class"}, "precision": None})
    check_names({"strategy": "DDP", "precision": 16})  # as Lightning takes them


def test_all_precisions_of_lightning_are_known():
    named = {*get_args(_PRECISION_INPUT_STR), *get_args(_PRECISION_INPUT_STR_ALIAS)}
    assert named == {*PRECISIONS}


def test_in_python_too():
    with pytest.raises(ValueError, match="there is no preset 'igpt_tinny'; the presets are igpt_tiny"):
        ImageGPTConfig.resolve("igpt_tinny")
    with pytest.raises(ValueError, match="there is no device 'a1000'; did you mean 'a10"):
        find_device("a1000")
    with pytest.raises(ValueError, match="there is no palette 'gray'; a palette is"):
        Palette.load("gray")
