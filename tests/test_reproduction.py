"""The status page names recipes that exist, and its numbers are those of the recipes, the journal and ``plan``."""

import re
import sys
from pathlib import Path

import pytest
import yaml

from lightning_igpt.commands import recipes

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reproduction.md").read_text(encoding="utf-8")
JOURNAL = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
RECIPES = {path.stem: path for path in recipes.folder().glob("*.yaml")}
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")
]  # of all tables
COSTS = [row for row in ROWS if re.fullmatch(r"`\w+`", row[0])]
STATES = {"small", "not run", "no", "done"}


def result(name):
    """A recipe's own words on what it gave."""
    return next(line for line in RECIPES[name].read_text().splitlines() if line.startswith("# Result:"))


def row(start):
    return next(row for row in ROWS if row[0].startswith(start))


def test_every_recipe_named_exists_and_every_paper_recipe_is_named():
    named = set(re.findall(r"`((?:cifar10|imagenet\d+|digits|photos)_\w+)`", PAGE))
    assert named <= set(RECIPES)
    of_the_paper = {name for name in RECIPES if "The paper\n# has no" not in RECIPES[name].read_text()}
    assert of_the_paper - named == set()


def test_every_row_has_a_status_and_only_what_was_run_has_a_result():
    rated = [row for row in ROWS if len(row) >= 4 and row[0] != "what" and not set(row[0]) <= {"-"}]
    assert len(rated) > 30 and {row[2] for row in rated} <= STATES
    for row in rated:
        if len(row) == 5:
            assert bool(row[3]) == (row[2] == "small") or row[2] == "no", row


@pytest.fixture(scope="module")
def planned():
    """The run of a recipe, as its page has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "docs" / "_ext"))
        import recipe_pages

        yield recipe_pages.plan
    sys.modules.pop("recipe_pages")


@pytest.mark.parametrize("cost", COSTS, ids=lambda row: row[0].strip("`"))
def test_costs_are_those_of_planning(cost, planned):
    name = cost[0].strip("`")
    run = planned(name)
    hours = run.flops / (run.mfu * run.device.peak(run.precision)) / 3600
    assert cost[1:] == [f"{run.flops:.1e}", f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"]
    claimed = re.search(r"it takes (\S+) floating-point", RECIPES[name].read_text())
    assert claimed is None or claimed[1] == cost[1]


def test_costs_are_given_for_every_recipe_that_trains_and_is_not_tiny():
    trained = {name for name in RECIPES if not re.search(r"_tiny_|_probe$", name)}
    assert trained - {row[0].strip("`") for row in COSTS} == {
        "imagenet48_s_pretrain", "imagenet64_s_pretrain", "imagenet64_m_pretrain"  # the paper has none of these
    }  # fmt: skip


def test_the_papers_numbers():
    """Chen et al. (2020), version 2, and the README of openai/image-gpt."""
    assert [row(letter)[1] for letter in "SML"] == [f"{nats} (README)" for nats in (2.0895, 2.0614, 2.0466)]
    probes = {"CIFAR-10, L (Table 1)": "96.3", "CIFAR-100, L (Table 1)": "82.8", "STL-10, L (Table 1)": "95.5"}
    for start, accuracy in probes.items():
        assert row(start)[1] == accuracy
    for labels, accuracy in {"4": "73.2 ± 1.5", "25": "87.6 ± 0.6", "400": "94.3 ± 0.1"}.items():
        assert [row[1] for row in ROWS if row[0] == labels] == [accuracy]
    for start, accuracy in {"CIFAR-10, L (section 4.5)": "99.0", "CIFAR-100, L (Table 3)": "88.5"}.items():
        assert [row[1] for row in ROWS if row[0] == start][-1] == accuracy
    assert row("CIFAR-10, fine-tuned")[1] == "98.6"


def test_results_are_those_of_the_recipes():
    shown = {
        "digits_tiny_pretrain": row("a network of 0.8")[3],
        "digits_tiny_bert": row("BERT, the small")[3],
        "digits_tiny_finetune": row("digits, fine-tuned")[3],
        "digits_tiny_probe": row("digits, fine-tuned")[3],
    }
    for name, text in shown.items():
        value = re.search(r"(?:nats_per_pixel|accuracy) (\d\.\d+)", result(name))[1]
        assert value in text, name


def test_results_at_small_size_are_those_of_the_journal():
    """Accuracies stand there as shares of 1, and here in %."""
    seeds = {
        "CIFAR-10, L (Table 1)": ["0.406", "0.386", "0.378", "0.453"],
        "CIFAR-10, L (section 4.5)": ["0.388", "0.386", "0.324", "0.325"],
        "likelihood and probe": ["2.845", "0.424", "2.646", "0.453"],
        "generative loss": ["0.388", "0.406"],
    }
    for start, values in seeds.items():
        for value in values:
            shown = value if value[0] != "0" else f"{100 * float(value):.1f}"
            assert value in JOURNAL and shown in row(start)[3], (start, value)
    for labels in (4, 25, 400):
        mean = next(row[3] for row in ROWS if row[0] == str(labels))
        assert re.search(rf"^\| {labels} \| {mean} \|", JOURNAL, re.MULTILINE)


def test_the_commands_of_the_cheap_reproductions_exist():
    lines = re.findall(r"^lightning-igpt .*$", PAGE, re.MULTILINE)
    assert len(lines) == 4
    for recipe in re.findall(r"--config (\w+)", "\n".join(lines)):
        assert yaml.safe_load(RECIPES[recipe].read_text())["model"]["init_args"]["pretrained"]
