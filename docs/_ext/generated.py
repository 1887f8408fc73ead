"""Sphinx extension: writes the pages made from the code (options, recipes, costs, public names) and from notebooks."""

import ast
import base64
import contextlib
import io
import json
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import yaml

import lightning_igpt
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
    "scaling": ["scaling plan", "scaling fit"],
}
EXAMPLES = Path(__file__).parent / "examples.py"
MEMBERS = {  # options of autodoc; other classes show their docstring alone
    "ImageGPTConfig": [
        ":members: n_positions, mlp_width, to_dict, resolve",
        ":exclude-members: n_layer, n_head, n_embd, vocab_size, image_size, n_inner, objective, bias, dropout",
    ],
    "PRESETS": [":no-value:"],
    "ImageGPT": [":members: forward, hidden, features"],
    "KVCache": [":members:"],
    "Palette": [":members:"],
    "PretrainModule": [":members: config, tokens_of, predict_step"],
    "ProbeModule": [
        ":members: config, tokens_of, best_layer, results, accuracy_by_layer, c_by_layer, predict_step",
    ],
    "FineTuneModule": [":members: config, tokens_of, predict_step"],
    "ModelCard": [
        ":members: resolve, known, filled",
        ":exclude-members: title, data, steps, nats_per_pixel, accuracy, measured_at, license, notes, origin",
    ],
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
    lines += ["", "| recipe | purpose | result |", "|---|---|---|"]
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
        "| network | parameters | tokens | FLOPs per image | GiB per image | images on 24 GB | images on 80 GB |",
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


def examples():
    """For each public name its example, and which of the example's variables are made on which other page."""
    homes, pages = {}, {}
    cells = re.findall(r"^# %% (\w+)\n(.*?)(?=\n# %%|\Z)", EXAMPLES.read_text(encoding="utf-8"), re.M | re.S)
    for page, text in cells:
        names = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)]
        made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        used = {node.id: homes[node.id] for node in names if node.id in homes and node.id not in made}
        pages[page] = (text, used)
        homes |= dict.fromkeys(made, page)
    return pages


def name_page(name, example, used):
    """The page of one public name: its docstring and an example."""
    value = getattr(lightning_igpt, name)
    kind = "class" if isinstance(value, type) else "function" if callable(value) else "data"
    directive = [f".. auto{kind}:: lightning_igpt.{name}", *(f"   {line}" for line in MEMBERS.get(name, []))]
    imports = [f"import {module}" for module in ("datasets", "torch") if f"{module}." in example]
    imports += [""] * bool(imports) + ["import lightning_igpt as igpt", ""]
    shown = ["## Example", "", "```python", *imports, example.rstrip(), "```"]
    where = ", ".join(f"`{variable}` by the example of [{page}]({page}.md)" for variable, page in sorted(used.items()))
    shown += ["", f"Made elsewhere: {where}."] if used else []
    return "\n".join([f"# {name}", "", "```{eval-rst}", *directive, "```", "", *shown, ""])


def notebook_page(path):
    """A notebook with its outputs as Markdown; pictures are written next to it."""
    lines, number = [], 0
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        code, source = cell["cell_type"] == "code", "".join(cell["source"])
        lines += ["```python", source, "```", ""] if code else [source, ""]
        for output in cell.get("outputs", []):
            if text := "".join(output.get("text", [])):
                lines += ["```text", text.rstrip(), "```", ""]
            if picture := output.get("data", {}).get("image/png"):
                number += 1
                path.with_name(f"{path.stem}-{number}.png").write_bytes(base64.b64decode("".join(picture)))
                lines += [f"![Output {number} of the notebook]({path.stem}-{number}.png)", ""]
    return "\n".join(lines)


PAGES = {"help": help_page, "recipes": recipes_page, "costs": costs_page}
PAGES |= {f"api/{name}": partial(name_page, name, *example) for name, example in examples().items()}


def write(source):
    """Write all pages; unchanged ones keep their time, so that Sphinx does not read them again."""
    for name, make in PAGES.items():
        path, text = Path(source, "reference", f"{name}.md"), make()
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for path in Path(source, "notebooks").glob("*.ipynb"):
        path.with_suffix(".md").write_text(notebook_page(path), encoding="utf-8")


def setup(app):
    app.connect("builder-inited", lambda app: write(app.srcdir))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
