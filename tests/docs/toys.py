"""Recipes and command lines made so small that they run in a second, and otherwise as the reader has them."""

import json
from pathlib import Path

import yaml

from lightning_igpt.__main__ import LIGHTNING_VERBS
from lightning_igpt.commands import recipes
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.palette import Palette

CONFIGS = ("--config", "-c")
BLOCKS = {"n_layer": 4, "n_head": 2, "n_embd": 16}
LARGEST_IMAGE = 32
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
    "limit_train_batches": 4,
    "limit_val_batches": 2,
    "limit_test_batches": 2,
    "limit_predict_batches": 2,
    "enable_progress_bar": "false",
    "enable_model_summary": "false",
}
STEPS = {"max_steps": 2, "val_check_interval": 1, "checkpoint_every": 1, "log_every_n_steps": 1}
# A command of these takes minutes as the page has it; it is run with what follows, which wins over what stands before.
EXTRA = {
    "quickstart": ["--steps", "2", "--epochs", "1", "--threads", "1"],
    "lowdata": ["--labels_per_class", "1", "2", "--n_subsets", "2"],
    "complete": ["--n_images", "2", "--n_samples", "1"],
}
HEAVY = (*LIGHTNING_VERBS, "quickstart", "lowdata")
BENCHMARKS = {  # python -m lightning_igpt.benchmarks.NAME
    "sample": ["--preset", "igpt_tiny", "--batch-size", "1", "--steps", "2", "--repeats", "1"],
    "train_step": ["--preset", "igpt_tiny", "--layers", "1", "--batch-size", "1", "--repeats", "1"],
    "features": ["--preset", "igpt_tiny", "--batch-size", "1", "--repeats", "1"],
    "probe": ["--rows", "200", "--width", "8", "--layers", "2", "--repeats", "1"],
    "quantize": ["--size", "4", "--batch-size", "2", "--peer-images", "1", "--table-repeats", "1", "--repeats", "1"],
    "data": ["--quick", "--seconds", "0.001", "--images", "64", "--rows", "2000"],
}


def small_network(network, palette="openai"):
    """The fields of a network with the shape of images and colours that was asked for, and few small blocks."""
    config = ImageGPTConfig.resolve(network)
    try:
        colors = len(Palette.load(palette))
    except (OSError, ValueError):  # a hub's, say
        colors = config.vocab_size
    shape = {"image_size": min(config.image_size, LARGEST_IMAGE), "vocab_size": colors, "objective": config.objective}
    return BLOCKS | shape


def small_recipe(recipe):
    """A recipe, or a part of one, at toy size; what refers to other values still does."""
    model, data = recipe.get("model", {}).get("init_args", {}), recipe.get("data", {}).get("init_args", {})
    if "model" in recipe and "pretrained" not in model:
        model["network"] = small_network(model.get("network", "igpt_tiny"), model.get("palette", "openai"))
    if isinstance(model.get("warmup_steps"), int):
        model["warmup_steps"] = min(1, model["warmup_steps"])
    if "data" in recipe:
        data |= {"batch_size": 128 if _is_probe(recipe) else 4, "num_workers": 0}
        recipe["data"]["init_args"] = data
    trainer = recipe.get("trainer", {})
    for name, value in {"max_epochs": 1, "accumulate_grad_batches": 1, **STEPS}.items():
        if isinstance(trainer.get(name), int):
            trainer[name] = value
    return recipe


def small_config(name, folder):
    """The path of a toy copy of a recipe; what is none (``config.yaml`` of a run, which is small) stays."""
    path = Path(name) if Path(name).exists() else recipes.find(name)
    copy = Path(folder, path.name)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(yaml.safe_dump(small_recipe(yaml.safe_load(path.read_text(encoding="utf-8")))), encoding="utf-8")
    return str(copy)


def small_words(words, folder):
    """The words of a command with toy recipes for recipes and small numbers for large ones."""
    verb, *words = words
    if verb not in HEAVY:
        return [verb, *words, *EXTRA.get(verb, [])]
    found, previous, probe = [], "", False
    for word in words:
        flag, equals, value = word.partition("=")
        if equals and flag.startswith("--") and not flag.endswith("+"):
            found += [flag, _small_value(flag, value, folder)]
        else:
            found.append(_small_value(previous, word, folder) if previous.startswith("--") else word)
        if previous in CONFIGS:
            probe = probe or _is_probe(yaml.safe_load(Path(found[-1]).read_text(encoding="utf-8")))
        probe = probe or word == "ProbeModule"
        previous = word
    if verb in LIGHTNING_VERBS and "--print_config" not in words:
        limits = {name: value for name, value in TRAINER.items() if not (name == "limit_train_batches" and probe)}
        found += [part for name, value in limits.items() for part in (f"--trainer.{name}", str(value))]
    return [verb, *found, *EXTRA.get(verb, [])]


def _is_probe(recipe):
    return "Probe" in str(recipe.get("model", recipe.get("data", {})).get("class_path"))


def _small_value(flag, value, folder):
    name = flag.removeprefix("--").rpartition(".")[2]
    if flag in CONFIGS:
        return small_config(value, folder)
    if name == "network" and value in PRESETS:
        return json.dumps(small_network(value))
    most = {"max_steps": 2, "max_epochs": 1, "batch_size": 8, "num_workers": 0, "warmup_steps": 1} | STEPS
    return str(min(int(value), most[name])) if name in most and value.isdecimal() else value
