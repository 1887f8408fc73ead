from collections.abc import Sequence
from typing import Literal

import pytest

from lightning_igpt.commands.arguments import run_function


def show(
    config: str | None = None,
    count: int = 1,
    most: int | None = None,
    share: float | None = None,
    word: str = "",
    check: bool = False,
    compile: bool | None = None,
    kind: Literal["a", "b"] = "a",
) -> None:
    print(config, count, most, share, word, check, compile, kind)


def shown(capsys, *words: str, function=show) -> Sequence[str]:
    run_function(function, list(words), "show")
    return capsys.readouterr().out.split()


@pytest.mark.parametrize("before", [[], ["it"]])
@pytest.mark.parametrize("words", [["--count", "1:4"], ["--most=1:4"], ["--count", "1:04:00"], ["--share", "1:4.5"]])
def test_numbers_to_the_base_of_sixty_are_refused(words, before):
    with pytest.raises(SystemExit) as stop:
        run_function({"it": show} if before else show, [*before, *words], "show")
    option, value = " ".join(words).replace("=", " ").split()
    assert stop.value.code == (
        f"lightning-igpt show: {option.removeprefix('--')} is {value!r}, which is no number; write one without colons"
    )


def test_words_with_colons_and_plain_numbers_are_taken(capsys):
    assert shown(capsys, "--word", "x:1:4", "--count", "64", "--share", "0.5")[1:5] == ["64", "None", "0.5", "x:1:4"]


@pytest.mark.parametrize("name", ["check", "compile"])
def test_switches_may_stand_alone(name, capsys):
    place = {"check": -3, "compile": -2}[name]
    assert shown(capsys, f"--{name}", "--word", "x")[place] == "True"
    assert shown(capsys, "--word", "x", f"--{name}")[place] == "True"
    assert shown(capsys, "--word", "x", f"--{name}", "false")[place] == "False"
    assert shown(capsys, "--word", "x", f"--{name}=false")[place] == "False"
    assert shown(capsys, "--word", "x", "--compile", "null")[-2] == "None"


def test_config_has_a_short_name(capsys):
    assert shown(capsys, "-c", "mine.yaml", "--word", "x")[0] == "mine.yaml"
