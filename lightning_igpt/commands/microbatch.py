"""``lightning-igpt microbatch``: the batch of a pretraining recipe that fits into the memory at hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, Literal, get_args

from lightning_igpt.commands.arguments import run_function
from lightning_igpt.commands.data import section_of
from lightning_igpt.commands.launch_batch import ACCUMULATE, BATCH, Recipe
from lightning_igpt.microbatch import AUTOCAST, GIB, MicroBatch, find_micro_batch, memory_of, place_of, readable
from lightning_igpt.model import Recomputing
from lightning_igpt.modules import PretrainModule

SHORT = {"bf16": "bf16-mixed", "32": "32-true"}  # Lightning's other names of the precisions that are tried
SHARDING = ("fsdp", "fullysharded", "modelparallel", "deepspeed")


def microbatch(
    config: str,
    devices: int | None = None,
    device: str = "auto",
    recompute: Recomputing | None = None,
    compile: bool | None = None,
    precision: Literal["bf16-mixed", "32-true"] | None = None,
    memory_gib: float | None = None,
) -> None:
    """Try training steps with ever better batch sizes, and print the options of fit for the largest that fits.

    The images of an optimiser step, which are batch_size x devices x num_nodes x accumulate_grad_batches, stay the
    recipe's; a recipe that names no devices is taken for one of one device. The steps are made by a copy of the
    network, of which one device holds the whole.

    Args:
        config: A pretraining recipe, by file or name.
        devices: Devices that share a step, all on one machine; default the recipe's, on all its machines.
        device: Where to try: cuda, cpu, or auto for the GPU where there is one.
        recompute: Activation checkpointing: none, selective (all but attention is computed again) or full. Default the
            recipe's, or none where it leaves the choice to fit.
        compile: Compile the blocks, as fit does in long runs on a GPU. Default the recipe's, or false where it leaves
            the choice to fit: compiled, a step takes less memory.
        precision: bf16-mixed or 32-true. Default the recipe's, or what the device computes fast.
        memory_gib: What may be used; default all memory of the GPU. On a CPU it must be given.
    """
    recipe = Recipe(config)
    module = _module_options(recipe, config)  # built last, since that takes long
    _check_whole_network(recipe, config)
    if devices is not None and devices < 1:
        raise ValueError(f"--devices is {devices}; it must be at least 1")
    world = recipe.batch.devices if devices is None else devices
    recipe.share(1, world)  # raises where the images cannot be shared
    how = _how(recipe, recompute, compile, precision)
    memory = _bytes(memory_gib)
    memory_of(place_of(device), memory)  # raises where there is none
    found = find_micro_batch(
        PretrainModule(**module), recipe.batch.together, devices=world, device=device, memory_bytes=memory, **how
    )
    for size, taken in sorted(found.tried.items()):
        print(f"{size:>6} images at once: {'not enough memory' if taken is None else readable(taken)}")
    if recipe.batch.open:
        print("The recipe names no number of devices; its step is taken for that of one.")
    options = place_options(recipe, devices) | fit_options(recipe, found, world)
    options |= how_options(recipe, how, compiled=compile, precision=precision)
    print("for fit:", *(f"--{name} {value}" for name, value in options.items()))


def place_options(recipe: Recipe, devices: int | None) -> dict[str, int]:
    """What to tell ``fit`` about devices and machines, where the recipe says something else.

    Args:
        recipe: The recipe.
        devices: What the user asked for, on one machine; None for the recipe's.
    """
    nodes = recipe.setting("trainer.num_nodes", 1)
    if devices is None:
        return {"trainer.devices": 1} if recipe.batch.open else {}
    if nodes > 1:
        return {"trainer.devices": devices, "trainer.num_nodes": 1}
    return {"trainer.devices": devices} if recipe.batch.open or devices != recipe.batch.devices else {}


def fit_options(recipe: Recipe, found: MicroBatch, devices: int) -> dict[str, Any]:
    """What to tell ``fit``: the batch, and the numbers of the recipe that count batches of a device, where they change.

    Args:
        recipe: The recipe.
        found: The batch, which keeps the recipe's step.
        devices: Devices that share a step, all together.
    """
    changes = recipe.share(1, devices, found.accumulate_grad_batches).changes
    batch = {BATCH: found.batch_size, ACCUMULATE: found.accumulate_grad_batches}
    return batch | {name: now for name, (_, now) in changes.items() if name not in batch}


def how_options(recipe: Recipe, how: dict[str, Any], *, compiled: bool | None, precision: str | None) -> dict[str, str]:
    """What to tell ``fit`` so that it makes the steps that were tried.

    Args:
        recipe: The recipe.
        how: What was tried.
        compiled: What the user asked for. Where nothing was asked for, compiling is left to ``fit``.
        precision: The same of the precision, for which ``fit`` then takes what suits the device, as the trials did.
    """
    options = {}
    if precision is not None and precision != _precision(recipe):
        options["trainer.precision"] = precision
    if how["recompute"] != recipe.get("trainer.recompute"):  # auto reckons, and may take another
        options["trainer.recompute"] = how["recompute"]
    if compiled is not None and compiled is not recipe.get("trainer.compile"):
        options["trainer.compile"] = str(compiled).lower()
    return options


def _module_options(recipe: Recipe, config: str) -> dict[str, Any]:
    """The arguments of the recipe's module."""
    section = section_of(recipe.sections, "model")
    model = section if isinstance(section, dict) else {"class_path": section}
    if str(model.get("class_path", "")).split(".")[-1] != PretrainModule.__name__:
        raise ValueError(f"{config} does not pretrain: its model is {model.get('class_path')}, not a PretrainModule")
    if not recipe.batch.matters:
        raise ValueError(f"{config} does not pretrain: its data are {recipe.get('data.class_path')}, in order and once")
    # At once, since there is no strategy that would do it later.
    return (model.get("init_args") or {}) | {"defer_init": False}


def _check_whole_network(recipe: Recipe, config: str) -> None:
    told = recipe.get("trainer.strategy", "auto")
    name = told if isinstance(told, str) else str(recipe.get("trainer.strategy.class_path"))
    if any(word in name.lower().replace("_", "") for word in SHARDING):
        raise ValueError(
            f"{config} has trainer.strategy {name}, which spreads the network over the devices, and microbatch tries "
            "steps of one device that holds all of it: name another strategy, such as ddp, or see what "
            f"`lightning-igpt plan --config {config}` reckons"
        )


def _how(recipe: Recipe, recompute: str | None, compiled: bool | None, precision: str | None) -> dict[str, Any]:
    """How to make the steps, as the options or else the recipe say it."""
    named = recipe.get("trainer.recompute", "auto")
    _check_word("trainer.recompute", named, ("auto", *get_args(Recomputing)))
    compiles = recipe.get("trainer.compile", "auto")
    _check_word("trainer.compile", compiles, ("auto", True, False))
    precision = precision or _precision(recipe)
    if precision is not None and precision not in AUTOCAST:
        raise ValueError(
            f"trainer.precision is {precision!r}, and microbatch tries {' and '.join(AUTOCAST)}: give --precision"
        )
    return {
        "recompute": recompute or ("none" if named == "auto" else named),
        "compiled": compiles is True if compiled is None else compiled,
        "precision": precision,
    }


def _precision(recipe: Recipe) -> str | None:
    """The recipe's, in full; None where it leaves the choice to ``fit``."""
    named = recipe.get("trainer.precision")
    return None if named is None else SHORT.get(str(named), str(named))


def _check_word(name: str, value: Any, words: tuple[Any, ...]) -> None:
    if not any(value is word or (isinstance(word, str) and value == word) for word in words):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(str, words)).lower()}")


def _bytes(memory_gib: float | None) -> int | None:
    if memory_gib is None:
        return None
    if not 0 < memory_gib < math.inf:
        raise ValueError(f"--memory-gib is {memory_gib}; it must be a number above 0")
    return max(1, int(memory_gib * GIB))


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    pairs = zip_longest(words, words[1:], fillvalue="--")
    # A switch that may also be left to the recipe: jsonargparse wants its value written.
    alone = [
        "--compile=true" if word == "--compile" and after.lower() not in ("true", "false", "null") else word
        for word, after in pairs
    ]
    return run_function(microbatch, alone, "microbatch")
