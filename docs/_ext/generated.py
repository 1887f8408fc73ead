"""Sphinx extension: writes the pages made from the code (options, recipes, costs) before the sources are read."""

import contextlib
import io
import os
from dataclasses import replace
from pathlib import Path

import yaml

from lightning_igpt.__main__ import LIGHTNING_VERBS, OWN_VERBS, main
from lightning_igpt.commands import recipes
from lightning_igpt.config import PRESETS
from lightning_igpt.planning import (
    RECOMPUTE,
    find_device,
    forward_flops_per_token,
    largest_batch,
    parameter_count,
    training_bytes,
)

PARTS = {
    "data": ["data show"],
    "palette": ["palette fit", "palette show"],
    "recipes": ["recipes list", "recipes show", "recipes copy"],
}


def help_of(words):
    """What ``--help`` prints after a verb."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main([*words.split(), "--help"])
    return out.getvalue().rstrip()


def help_page():
    os.environ["COLUMNS"] = "100"
    lines = ["# Options", ""]
    for verb in [*LIGHTNING_VERBS, *OWN_VERBS]:
        for words in PARTS.get(verb, [verb]):
            lines += [f"## {words}", "", "````text", help_of(words), "````", ""]
    return "\n".join(lines)


def summary(text):
    """The sentence and the result in a recipe's header."""
    head = [line.removeprefix("#").strip() for line in text[: text.index("\n\n")].splitlines()]
    result = [line.removeprefix("Result: ").partition("(")[0].strip() for line in head if line.startswith("Result: ")]
    return head[0], result[0] if result else "not run in full"


def recipes_page():
    texts = {name: recipes.find(name).read_text(encoding="utf-8") for name in recipes.names()}
    lines = [
        "# Shipped recipes",
        "",
        "`--config` takes these names; [Recipes](../how-to/recipes.md) explains the format.",
    ]
    lines += ["", "| recipe | what | result |", "|---|---|---|"]
    for name, text in texts.items():
        sentence, result = summary(text)
        lines.append(f"| [{name}](#{name.replace('_', '-')}) | {sentence} | {result} |")
    for name, text in texts.items():
        assert {"model", "data", "trainer"} <= {*yaml.safe_load(text)}, name
        lines += ["", f"({name.replace('_', '-')})=", f"## {name}", "", "```yaml", text.rstrip(), "```"]
    return "\n".join([*lines, ""])


def costs_page():
    lines = [
        "# Costs",
        "",
        "Training with AdamW in bf16-mixed on one GPU, not compiled, without dropout, computed by the formulas of",
        "[`plan`](planning.md). Three values are those of `recompute` none / selective / full.",
        "",
        "| network | parameters | tokens | FLOPs per image | GiB per image | images at once on 24 GB | on 80 GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in ("s", "m", "l"):
        for side in (32, 48, 64):
            config = replace(PRESETS[f"igpt_{size}"], image_size=side)
            totals = [[sum(training_bytes(config, n, recompute=how).values()) for n in (1, 2)] for how in RECOMPUTE]
            cells = [f"{size.upper()}, {side} × {side}", f"{parameter_count(config):,}", f"{config.n_positions:,}"]
            cells.append(f"{3 * forward_flops_per_token(config) * config.n_positions:.1e}")
            cells.append(" / ".join(f"{(two - one) / 2**30:.2f}" for one, two in totals))
            for kind in ("rtx4090", "h100"):
                usable = find_device(kind).usable
                cells.append(" / ".join(str(largest_batch(config, usable, recompute=how)) for how in RECOMPUTE))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


PAGES = {"help": help_page, "recipes": recipes_page, "costs": costs_page}


def write(source):
    """Write all pages; unchanged ones keep their time, so that Sphinx does not read them again."""
    for name, make in PAGES.items():
        path, text = Path(source, "reference", f"{name}.md"), make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app):
    app.connect("builder-inited", lambda app: write(app.srcdir))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
