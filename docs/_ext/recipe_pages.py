"""A page for each recipe, made from its file, with its cost by ``lightning_igpt.planning``."""

import re
from dataclasses import replace
from pathlib import Path

import yaml

from lightning_igpt.commands import recipes
from lightning_igpt.commands.plan import make_run
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.planning import Schedule, checkpoint_bytes, choose, forward_flops_per_token, parameter_count

KINDS = {"pretrain": "pretraining", "bert": "pretraining, BERT", "probe": "linear probe", "finetune": "fine-tuning"}
OPTION = re.compile(r"(--[a-z][\w.]*\w)")
SIGNS = ("Device:", "Result:", "Not run in full:")
IMAGES = {"digits": 1293, "uoft-cs/cifar10": 45_000}  # in the training part, without the tenth held out
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
    """The run of a recipe on H100s; None of a probe, which trains no network, and where the length is unknown."""
    recipe = yaml.safe_load(recipes.find(name).read_text(encoding="utf-8"))
    data, trainer = recipe["data"]["init_args"], recipe["trainer"]
    unknown = "max_steps" not in trainer and data["source"] not in IMAGES
    if recipe["model"]["class_path"] == "ProbeModule" or unknown:
        return None
    devices, parts = trainer.get("devices", 1) * trainer.get("num_nodes", 1), trainer.get("accumulate_grad_batches", 1)
    batch = data["batch_size"] * devices * parts
    steps = trainer.get("max_steps") or trainer["max_epochs"] * -(-(IMAGES[data["source"]] * parts // batch) // parts)
    return make_run(network(recipe), Schedule(batch, steps), "h100", devices)


def network(recipe):
    """The network of a recipe, or of the recipe that it starts from."""
    options = recipe["model"]["init_args"]
    if "network" not in options:
        return network(yaml.safe_load(recipes.find(pretrained(recipe)).read_text(encoding="utf-8")))
    changes = {name: options[name] for name in ("objective", "image_size") if options.get(name)}
    return replace(ImageGPTConfig.resolve(options["network"]), **changes)


def pretrained(recipe):
    """The recipe whose weights a recipe starts from, by name; None where it starts from none."""
    name = Path(str(recipe["model"]["init_args"].get("pretrained"))).name
    return name if name in recipes.names() else None


def power(number):
    mantissa, exponent = f"{number:.2e}".split("e")
    return f"{mantissa} × 10{str(int(exponent)).translate(str.maketrans('0123456789-', '⁰¹²³⁴⁵⁶⁷⁸⁹⁻'))}"


def hours(seconds):
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:,.1f} minutes"


def facts(recipe, run, on_gpu):
    """Rows of the table of what a recipe costs."""
    config, device = run.config, run.device
    side, objective = config.image_size, config.objective
    rows = {
        "network": f"{config.n_layer} blocks, {config.n_head} heads, width {config.n_embd}, {objective}",
        "images": f"{side} × {side}, {config.n_positions:,} tokens of {config.vocab_size} colors",
        "parameters": f"{parameter_count(config):,}",
    }
    if recipe["model"]["class_path"] == "ProbeModule":
        forward = forward_flops_per_token(config) * config.n_positions
        return rows | {"operations": f"{power(forward)} per image: a forward pass, once"}
    batch, steps = run.schedule.batch_size, run.schedule.steps
    rows["a step"] = f"{batch} images, {power(run.flops / steps)} operations"
    rows["the run"] = f"{steps:,} steps, {batch * steps:,} images, {power(run.flops)} operations"
    rows["checkpoint"] = f"{checkpoint_bytes(config, run.precision) / 1e6:,.0f} MB"
    if on_gpu:
        parts = recipe["trainer"].get("accumulate_grad_batches", 1)
        chosen = choose(config, batch // run.devices // parts, run.devices, device.usable, run.precision)
        layout = {"single": "one device", "ddp": "DDP", "fsdp": "FSDP"}[chosen.strategy]
        memory = f"{chosen.bytes / 2**30:.0f} GiB on each of {run.devices} {device.name}"
        rows["memory"] = f"{memory} ({layout}, recompute {chosen.recompute})"
        floor = run.floor_device_seconds / run.devices
        rows["time"] = f"{hours(run.seconds)} at {run.mfu:.0%} MFU; not below {hours(floor)}"
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
    lines += ["", "Operations, memory and time are computed, as by [`plan`](../planning.md).", ""]
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
        size = f"{parameter_count(planned.config) / 1e6:,.1f} M" if planned else ""
        result = re.split(r"[;(]", header(text)[2].get("result", ""))[0].strip()
        lines.append(f"| [{name}]({name}.md) | {KINDS[name.rpartition('_')[2]]} | {size} | {result} |")
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *names, "```", ""])


def place(name):
    data = name.partition("_")[0]
    return ORDER.index(data) if data in ORDER else len(ORDER)


def pages():
    """All pages by name."""
    return {name: page(name) for name in recipes.names()} | {"index": index()}
