"""The status page: its costs are those of planning, its results those of the recipes and the journal."""

import re

import pytest
import yaml

from lightning_igpt.commands import recipes
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.planning import find_device, parameter_count, train_flops_per_token
from tests.docs.pages import PAGES, table

PAGE = "docs/reproduction.md"
MFU = ((200e6, 0.33), (900e6, 0.45), (1e12, 0.50))  # docs/reference/planning.md


def row(start):
    return table(PAGE, f"{re.escape(start)}.*")[0]


@pytest.mark.parametrize("cost", [row for row in table(PAGE, r"`\w+`") if len(row) == 3], ids=lambda cost: cost[0])
def test_costs_are_those_of_planning(cost):
    recipe = yaml.safe_load(recipes.find(cost[0].strip("`")).read_text(encoding="utf-8"))
    options, trainer = recipe["model"]["init_args"], recipe["trainer"]
    config = ImageGPTConfig.resolve(options["network"])
    config = ImageGPTConfig(**config.to_dict() | {"objective": options.get("objective", config.objective)})
    images = 64 * 2_000_000 if "_xl_" in cost[0] else 128 * trainer["max_steps"]
    flops = train_flops_per_token(config) * config.n_positions * images
    share = next(share for size, share in MFU if parameter_count(config) <= size)
    hours = flops / share / find_device("h100").peak("bf16-mixed") / 3600
    assert cost[1:] == [f"{flops:.1e}", f"{hours:,.0f}" if hours >= 10 else f"{hours:.1f}"]


def test_results_are_those_of_the_recipes():
    shown = {
        "digits_tiny_pretrain": row("a network of 0.8")[3],
        "digits_tiny_bert": row("BERT, the small")[3],
        "digits_tiny_finetune": row("digits, fine-tuned")[3],
        "digits_tiny_probe": row("digits, fine-tuned")[3],
    }
    for name, text in shown.items():
        header = recipes.find(name).read_text(encoding="utf-8")
        assert re.search(r"^# Result: \S+/(?:nats_per_pixel|accuracy) (\d\.\d+)", header, re.MULTILINE)[1] in text, name


def test_results_at_small_size_are_those_of_the_journal():
    """Accuracies are fractions of 1 in the journal and % on this page."""
    seeds = {
        "CIFAR-10, L (Table 1)": ["0.406", "0.386", "0.378", "0.453"],
        "CIFAR-10, L (section 4.5)": ["0.388", "0.386", "0.324", "0.325"],
        "likelihood and probe": ["2.845", "0.424", "2.646", "0.453"],
    }
    for start, values in seeds.items():
        for value in values:
            assert value in PAGES["docs/experiments.md"], value
            assert (value if value[0] != "0" else f"{100 * float(value):.1f}") in row(start)[3], (start, value)
