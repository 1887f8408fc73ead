"""How our own verbs read their words: from a function's signature and docstring."""

from typing import Literal

import pytest

from lightning_igpt.__main__ import main
from lightning_igpt.commands.arguments import read_words


def show(
    name: str,
    numbers: list[int] | None = None,
    budgets: tuple[int, ...] = (4, 25),
    most: int | None = None,
    share: float = 0.5,
    check: bool = False,
    compile: bool | None = None,
    kind: Literal["a", "b"] = "a",
    layer: Literal["all"] | int = "all",
    seed: int = 0,
) -> None:
    """Print 100% of its arguments.

    Args:
        name: A ``name``.
        numbers: Some numbers.
        budgets: More numbers.
        most: A limit.
        share: A share.
        check: A switch.
        compile: Another.
        kind: A word.
        layer: A word or a number.
        seed: A seed.
    """
    print(name, numbers, budgets, most, share, check, compile, kind, layer, seed, sep="|")


def run(words, positional=False, sub=""):
    """Call ``show`` as a verb, or as its sub-verb, would be called."""
    name, options = read_words({sub: show}, words, "lightning-igpt show", positional=positional)
    assert name == sub
    show(**options)


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        ([], "None|(4, 25)|None|0.5|False|None|a|all|0"),
        (["--numbers", "1", "2", "--budgets", "3"], "[1, 2]|[3]|None|0.5|False|None|a|all|0"),
        (["--check", "--compile", "false", "--most=7"], "None|(4, 25)|7|0.5|True|False|a|all|0"),
        (["--share", "1e-3", "--kind", "b", "--layer", "12"], "None|(4, 25)|None|0.001|False|None|b|12|0"),
    ],
)
def test_every_kind_of_parameter_is_read(words, printed, capsys):
    for named in (["--name", "x:1:4"], ["x:1:4"]):
        run([*named, *words], len(named) == 1)
        assert capsys.readouterr().out == f"x:1:4|{printed}\n"
    run(["it", "--name", "x:1:4", *words], sub="it")
    assert capsys.readouterr().out == f"x:1:4|{printed}\n"


@pytest.mark.parametrize(
    "words",
    [
        ["--most", "1:4"],
        ["--share", "x"],
        ["--kind", "c"],
        ["--check=x"],
        ["--layer", "x"],
        ["--mos=3"],
        ["extra"],
        ["--numbers"],
        ["--name"],
    ],
)
def test_wrong_usage_is_one_line_that_names_it(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(["--name", "x", *words])
    said = capsys.readouterr().err
    assert said.startswith("lightning-igpt show: ") and said.endswith("See lightning-igpt show --help\n")
    assert words[-1].partition("=")[0] in said and said.count("\n") == 1


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(SystemExit) as stop:
        main(["quickstart", "--seed", seed])
    assert stop.value.code == f"lightning-igpt quickstart: seed is {seed}; it must be from 0 to 4294967295"


def test_help_explains_every_parameter(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        run(["--help"])
    text = capsys.readouterr().out
    assert "usage: lightning-igpt show --name NAME [options]" in text and "100% of its arguments" in text
    for name, explained in {"budgets N [N ...]": "More numbers. Default: 4 25.", "kind a|b": "A word."}.items():
        assert f"--{name}" in text and explained in text
