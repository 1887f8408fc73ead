"""A page for each recipe, made from its file and from what ``lightning-igpt plan`` reckons."""

import contextlib
import io
import json
import re
from pathlib import Path

import yaml

from lightning_igpt.__main__ import main
from lightning_igpt.commands import recipes

KINDS = {"pretrain": "pretraining", "bert": "pretraining, BERT", "probe": "linear probe", "finetune": "fine-tuning"}
OPTION = re.compile(r"(--[a-z][\w.]*\w)")
SIGNS = ("Device:", "Result:", "Not run in full:")
ORDER = ("digits", "cifar10", "imagenet32", "imagenet48", "imagenet64")


def header(text):
    """What a recipe's head says: the sentence, remarks, and by their signs device, result and why it was not run."""
    sentence, *rest = (line.removeprefix("#").strip() for line in text[: text.index("\n\n")].splitlines())
    paragraphs = [""]
    for line in rest:
        if not line or line.startswith("lightning-igpt fit"):
            continue
        if paragraphs[-1].endswith(".") or line.startswith(SIGNS):
            paragraphs.append(line)
        else:
            paragraphs[-1] = f"{paragraphs[-1]} {line}".strip()
    parts = [re.split(r"(`[^`]*`)", text) for text in paragraphs]
    paragraphs = ["".join(part if part[:1] == "`" else OPTION.sub(r"`\1`", part) for part in text) for text in parts]
    said = [part.partition(": ") for part in paragraphs if part.startswith(SIGNS)]
    remarks = [part for part in paragraphs if part and not part.startswith(SIGNS)]
    return sentence, remarks, {sign.lower(): value for sign, _, value in said}


def plan(name):
    """What ``lightning-igpt plan`` says of a recipe; None of a probe, which trains no network."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            main(["plan", "--config", name, "--format", "json"])
    except SystemExit:
        return None
    return json.loads(out.getvalue())


def pretrained(recipe):
    """The recipe whose weights a recipe starts from, by name; None where it starts from none."""
    name = Path(str(recipe["model"]["init_args"].get("pretrained"))).name
    return name if name in recipes.names() else None


def power(number):
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('0123456789-', '⁰¹²³⁴⁵⁶⁷⁸⁹⁻'))}"


def hours(seconds):
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"


def facts(recipe, planned, on_gpu):
    """Rows of the table of what a recipe costs."""
    network, run = planned["network"], planned["run"]
    side, objective = network["image_size"], network["objective"]
    rows = {
        "network": f"{network['n_layer']} blocks, {network['n_head']} heads, width {network['n_embd']}, {objective}",
        "images": f"{side} × {side}, {network['tokens_per_image']:,} tokens of {network['vocab_size']} colours",
        "parameters": f"{network['parameters']:,}",
    }
    if recipe["model"]["class_path"] == "ProbeModule":
        forward = network["forward_flops_per_token"] * network["tokens_per_image"]
        return rows | {"operations": f"{power(forward)} per image: a forward pass, once"}
    rows["a step"] = f"{run['batch_size']} images, {power(run['flops_per_step'])} operations"
    rows["the run"] = f"{run['steps']:,} steps, {run['images']:,.0f} images, {power(run['flops'])} operations"
    rows["checkpoint"] = f"{planned['files']['checkpoint_bytes'] / 1e6:,.0f} MB"
    if on_gpu:
        device, chosen = planned["device"], planned["strategy"]
        layout = {"single": "one device", "ddp": "DDP", "fsdp": "FSDP"}[chosen["strategy"]]
        memory = f"{chosen['bytes'] / 2**30:.0f} GiB on each of {run['devices']} {device['name']}"
        rows["memory"] = f"{memory} ({layout}, recompute {chosen['recompute']})"
        rows["time"] = f"{hours(run['seconds'])} at {run['mfu']:.0%} MFU; not below {hours(run['floor_seconds'])}"
    return rows


def page(name):
    """The page of a recipe."""
    text = recipes.find(name).read_text(encoding="utf-8")
    recipe = yaml.safe_load(text)
    sentence, remarks, said = header(text)
    lines = [f"# {name}", "", sentence, ""]
    lines += ["```bash", f"lightning-igpt fit --config {name}", "```", ""]
    if before := pretrained(recipe):
        lines += [f"It starts from the run of [{before}]({before}.md).", ""]
    lines += [line for remark in remarks for line in (remark, "")]
    planned = plan(name) or (plan(before) if before else None)
    rows = {
        "measured": said.get("result"),
        "not run in full": said.get("not run in full"),
    }
    rows |= {"device": said.get("device")} | (
        facts(recipe, planned, "GPU" in said.get("device", "")) if planned else {}
    )
    lines += ["| | |", "|---|---|", *(f"| {key} | {value.replace('|', '/')} |" for key, value in rows.items() if value)]
    lines += ["", "Operations, memory and time are what [`plan`](../planning.md) reckons.", ""]
    return "\n".join([*lines, "## The file", "", "```yaml", text.rstrip(), "```", ""])


def index():
    """The table of all recipes, with the table of contents."""
    names = sorted(recipes.names(), key=lambda name: (place(name), name))
    lines = [
        "# Recipes",
        "",
        "YAML files that come with the package, and names that `--config` knows. [](../../how-to/recipes.md)",
    ]
    lines[-1] += " tells how to write one.\n"
    lines += ["| recipe | what | parameters | measured |", "|---|---|---|---|"]
    for name in names:
        text = recipes.find(name).read_text(encoding="utf-8")
        planned = plan(name) or plan(pretrained(yaml.safe_load(text)) or name)
        size = f"{planned['network']['parameters'] / 1e6:,.1f} M" if planned else ""
        result = re.split(r"[;(]", header(text)[2].get("result", ""))[0].strip()
        lines.append(f"| [{name}]({name}.md) | {KINDS[name.rpartition('_')[2]]} | {size} | {result} |")
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *names, "```", ""])


def place(name):
    data = name.partition("_")[0]
    return ORDER.index(data) if data in ORDER else len(ORDER)


def pages():
    """All pages by name."""
    return {name: page(name) for name in recipes.names()} | {"index": index()}
