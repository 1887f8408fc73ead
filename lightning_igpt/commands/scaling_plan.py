"""``lightning-igpt scaling plan``: a study of sizes and budgets as recipes and a script."""

import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf

from lightning_igpt.commands import recipes
from lightning_igpt.commands.arguments import check_folder
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.files import shown, write_text
from lightning_igpt.scaling import Run, steps_for

HEAD = ("run", "N", "N, all", "tokens", "FLOPs", "6 N D", "tokens / N")
SCRIPT = """#!/bin/sh
# Trains the runs of a study one after another, and continues where it was stopped. Start it where the study was
# planned; options, such as --data.source FOLDER, are passed on to each run.
set -e
for run in {names}; do
  lightning-igpt fit --config {folder}/"$run".yaml --resume auto "$@"
done
"""


def plan(
    recipe: str,
    *,
    budgets: list[float],
    sizes: list[str],
    out: str = "runs/scaling",
    batch_size: int | None = None,
    lr: Literal["recipe", "hint"] = "recipe",
    overwrite: bool = False,
) -> None:
    """Write a recipe for each budget and size, and a script that trains them all and can be resumed.

    Args:
        recipe: The base, which says all but size and steps: a file or a shipped recipe that pretrains from scratch.
        budgets: Training operations of a run, one or more, such as 1e14 4e14. Steps are what comes closest.
        sizes: Presets, WIDTHxDEPTH such as 96x6, or WIDTHxDEPTHxHEADS; by default, heads are as many as keep them at
            least as wide as the recipe's.
        out: Folder for recipes, script and runs. Missing folders are made.
        batch_size: Images per optimizer step. Default: the recipe's.
        lr: The recipe's learning rate for all sizes; or hint, for 0.0283 N^-1/4, which the rates of Henighan et al.
            (2020) follow. That is for Adam, and N leaves out embeddings.
        overwrite: Replace the recipes of another plan.
    """
    folder = Path(out)
    check_folder(folder, "--out")
    base: Any = OmegaConf.to_container(OmegaConf.load(Path(recipe) if Path(recipe).exists() else recipes.find(recipe)))
    options = base.setdefault("model", {}).setdefault("init_args", {})
    data = base.setdefault("data", {}).setdefault("init_args", {})
    if not str(base["model"].get("class_path")).endswith("PretrainModule") or options.get("pretrained"):
        raise ValueError(f"{recipe} does not pretrain from scratch; take a recipe such as cifar10_tiny_pretrain")
    batch = data["batch_size"] = batch_size or data.get("batch_size", 128)
    if not all(0 < budget < math.inf for budget in budgets) or batch < 1:
        raise ValueError(f"budgets are {budgets} and batch_size is {batch}; they must be above 0")
    given = {name: options[name] for name in ("image_size", "objective") if options.get(name)}
    network = replace(ImageGPTConfig.resolve(options.get("network") or "igpt_s"), **given)
    rows, files = [(*HEAD, "steps", "lr", "lr hint")], dict[Path, str]()
    for budget in sorted(set(budgets)):
        for size in dict.fromkeys(sizes):
            config = sized(size, network)
            steps, name = steps_for(budget, config, batch), f"{size}_{budget:.4g}".replace("+", "")
            run = Run(name, config, steps * batch)
            hint = float(f"{0.0283 * run.block_parameters**-0.25:.3g}")
            rate = hint if lr == "hint" else options.get("lr", 0.003)
            files[folder / f"{name}.yaml"] = _recipe(base, run, steps, rate, folder, recipe)
            rows.append((*cells(run), f"{steps:,}", f"{rate:g}", f"{hint:g}"))
    names = " ".join(shlex.quote(name) for name, *_ in rows[1:])
    files[folder / "run.sh"] = SCRIPT.format(names=names, folder=shlex.quote(str(folder)))
    for file, text in files.items():
        if file.exists() and file.read_text(encoding="utf-8") != text and not overwrite:
            raise FileExistsError(f"{file} is of another plan; name another --out, or pass --overwrite to replace it")
    for file, text in files.items():
        write_text(file, text)
    print_table(rows)
    used = "is used" if lr == "hint" else "is not used: --lr hint does"
    print(f"The hint, 0.0283 N^-1/4 (Henighan et al., 2020), is a place to start a search, and {used}.")
    print(f"next: sh {shown(folder / 'run.sh')}, then lightning-igpt scaling fit {shown(folder)}")


def sized(size: str, base: ImageGPTConfig) -> ImageGPTConfig:
    """A preset's or WIDTHxDEPTH[xHEADS] network for the images, colors and objective of ``base``."""
    match = re.fullmatch(r"(\d+)x(\d+)(?:x(\d+))?", size)
    if match is None and size not in PRESETS:
        raise ValueError(f"the size {size} is neither WIDTHxDEPTH, such as 96x6, nor one of {', '.join(PRESETS)}")
    preset = PRESETS.get(size, base)
    width, depth, heads = match.groups() if match else (preset.n_embd, preset.n_layer, preset.n_head)
    width = int(width)
    most = max(1, width * base.n_head // base.n_embd)
    heads = heads or next(n for n in range(most, 0, -1) if width % n == 0)
    inner = base.n_inner and base.n_inner * width // base.n_embd
    return replace(base, n_layer=int(depth), n_head=int(heads), n_embd=width, n_inner=inner)


def _recipe(base: Any, run: Run, steps: int, lr: float, folder: Path, origin: str) -> str:
    """The text of a run's recipe. The run validates at its end only, where the fits read the metric."""
    recipe = json.loads(json.dumps(base))
    model, trainer = recipe["model"]["init_args"], recipe.setdefault("trainer", {})
    if (model.get("warmup_steps") or 0) > steps:
        what = f"{run.name} has {steps} steps and the recipe's warmup_steps is {model['warmup_steps']}"
        raise ValueError(f"{what}; leave it out of the recipe, or raise the budget")
    model |= {"network": {name: value for name, value in asdict(run.config).items() if value is not None}, "lr": lr}
    batches = steps * int(trainer.get("accumulate_grad_batches") or 1)
    trainer |= {"max_steps": steps, "val_check_interval": batches, "default_root_dir": str(folder / run.name)}
    trainer.pop("max_epochs", None)
    head = f"# {run.name}: {run.point().c:.4g} FLOPs; planned from {origin} by lightning-igpt scaling plan.\n#\n"
    return f"{head}# lightning-igpt fit --config {folder / run.name}.yaml --resume auto\n\n{OmegaConf.to_yaml(recipe)}"


def cells(run: Run) -> tuple[str, ...]:
    """The row of a run under ``HEAD``."""
    n, d, c, _ = run.point()
    every = run.point(embeddings=True).n
    return run.name, f"{n:,.0f}", f"{every:,.0f}", f"{d:.3e}", f"{c:.3e}", f"{6 * n * d:.3e}", f"{d / n:.4g}"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in columns, the first flush left."""
    first, *widths = (max(map(len, column)) for column in zip(*rows, strict=True))
    for name, *texts in rows:
        right = (text.rjust(width) for text, width in zip(texts, widths, strict=True))
        print("  ".join([shown(name).ljust(first), *right]).rstrip())
