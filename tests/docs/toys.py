"""Recipes and command lines at a size that runs in a second; everything else as on the page."""

import json
from pathlib import Path

import yaml

from lightning_igpt.__main__ import LIGHTNING_VERBS
from lightning_igpt.commands import recipes
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.palette import Palette

BLOCKS = {"n_layer": 4, "n_head": 2, "n_embd": 16}
LIMITS = {name: n for name, n in zip(("train", "val", "test", "predict"), (4, 2, 2, 2), strict=True)}
TRAINER = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
TRAINER |= {"enable_progress_bar": "false", "enable_model_summary": "false"}
LARGEST = {"max_steps": 2, "max_epochs": 1, "batch_size": 8, "num_workers": 0, "warmup_steps": 1}
LARGEST |= {"val_check_interval": 1, "checkpoint_every": 1, "log_every_n_steps": 1, "accumulate_grad_batches": 1}
EXTRA = {  # appended to the words of a verb
    "quickstart": ["--steps", "2"],
    "lowdata": ["--labels_per_class", "1", "2", "--n_subsets", "2"],
    "complete": ["--n_images", "2", "--n_samples", "1"],
}
HEAVY = (*LIGHTNING_VERBS, "quickstart", "lowdata")  # verbs that take minutes on the page


def small_network(network, palette="openai"):
    """Few small blocks, with the image size (at most 32), colors and objective of the network."""
    config = ImageGPTConfig.resolve(network)
    colors = Palette.load(palette)
    shape = {"image_size": min(config.image_size, 32), "vocab_size": len(colors), "objective": config.objective}
    shape["tokens_per_pixel"] = colors.tokens_per_pixel
    return BLOCKS | shape


def is_probe(recipe):
    return "Probe" in str(recipe.get("model", {}).get("class_path"))


def small_recipe(recipe):
    """A recipe at toy size."""
    model, data, trainer = (recipe.get(part, {}) for part in ("model", "data", "trainer"))
    options = model.get("init_args", {})
    if "network" in options:
        options["network"] = small_network(options["network"], options.get("palette", "openai"))
    for part in (options, trainer):
        part |= {name: min(value, LARGEST[name]) for name, value in part.items() if name in LARGEST}
    if data:
        size = 128 if is_probe(recipe) else 4
        data["init_args"] = data.get("init_args", {}) | {"batch_size": size, "num_workers": 0}
    return recipe


def small_words(words, folder):
    """The words of a command with toy recipes instead of recipes, followed by options that keep it small."""
    verb, *words = words
    if verb not in HEAVY:
        return [verb, *words, *EXTRA.get(verb, [])]
    probe = "ProbeModule" in words
    for place, word in enumerate(words):
        name, before = word.rpartition(".")[2], words[place - 1]
        if before == "--config":
            path = Path(word) if Path(word).exists() else recipes.find(word)
            recipe = small_recipe(yaml.safe_load(path.read_text(encoding="utf-8")))
            probe = probe or is_probe(recipe)
            words[place] = str(Path(folder, path.name))
            Path(words[place]).write_text(yaml.safe_dump(recipe), encoding="utf-8")
        elif before.endswith("network") and word in PRESETS:
            words[place] = json.dumps(small_network(word))
        elif word.startswith("--") and name in LARGEST:
            words[place + 1] = str(min(int(words[place + 1]), LARGEST[name]))
    if verb in LIGHTNING_VERBS and "--print_config" not in words:
        limits = {f"limit_{part}_batches": n for part, n in LIMITS.items() if not (probe and part == "train")}
        words += [part for name, value in (TRAINER | limits).items() for part in (f"--trainer.{name}", str(value))]
    return [verb, *words, *EXTRA.get(verb, [])]
