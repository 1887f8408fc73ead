"""``lightning-igpt microbatch``: the batch of a pretraining recipe that fits into the memory at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from lightning_igpt.commands.arguments import run_function
from lightning_igpt.commands.data import read_recipe, section_of
from lightning_igpt.microbatch import GIB, MicroBatch, find_micro_batch
from lightning_igpt.modules import PretrainModule


def microbatch(
    config: str,
    devices: int | None = None,
    device: str = "auto",
    recompute: Literal["none", "selective", "full"] = "none",
    compile: bool = False,
    precision: Literal["bf16-mixed", "32-true"] | None = None,
    memory_gib: float | None = None,
) -> None:
    """Try training steps with ever better batch sizes, and print the options of fit for the largest that fits.

    The images of an optimiser step, which are batch_size x devices x accumulate_grad_batches, stay the recipe's.

    Args:
        config: A pretraining recipe, by file or name.
        devices: Devices that share a step; default the recipe's.
        device: Where to try: cuda, cpu, or auto for the GPU where there is one.
        recompute: Activation checkpointing: none, selective (all but attention is computed again) or full.
        compile: Compile the blocks, as fit does in long runs on a GPU.
        precision: bf16-mixed or 32-true; default what the device computes fast.
        memory_gib: What may be used; default all memory of the GPU. On a CPU it must be given.
    """
    recipe = read_recipe([config])
    model, data, trainer = (section_of(recipe, name) or {} for name in ("model", "data", "trainer"))
    if str(model.get("class_path", "")).split(".")[-1] != PretrainModule.__name__:
        raise ValueError(f"{config} does not pretrain: its model is {model.get('class_path')}, not a PretrainModule")
    before = int(data.get("init_args", {}).get("batch_size", 0))
    if before < 1:
        raise ValueError(f"{config} names no data.init_args.batch_size, so how many images a step takes is not known")
    accumulated = int(trainer.get("accumulate_grad_batches") or 1)
    there = _devices(trainer)
    devices = there if devices is None else devices
    found = find_micro_batch(
        PretrainModule(**model.get("init_args", {})),
        before * there * accumulated,
        devices=devices,
        device=device,
        recompute=recompute,
        compiled=compile,
        precision=precision,
        memory_bytes=None if memory_gib is None else int(memory_gib * GIB),
    )
    for size, taken in sorted(found.tried.items()):
        print(f"{size:>6} images at once: {'not enough memory' if taken is None else f'{taken / GIB:.2f} GiB'}")
    options: dict[str, Any] = {"trainer.devices": devices} if devices != there else {}
    options |= fit_options(found, trainer, before, accumulated)
    options |= {} if recompute == "none" else {"trainer.recompute": recompute}
    print("for fit:", *(f"--{name} {value}" for name, value in options.items()))


def fit_options(found: MicroBatch, trainer: Mapping[str, Any], before: int, accumulated: int) -> dict[str, Any]:
    """What to tell ``fit``: the batch, and the numbers of the recipe that count batches.

    Args:
        found: The batch.
        trainer: The recipe's section.
        before: The recipe's images per device and batch.
        accumulated: The recipe's batches per step.
    """
    options: dict[str, Any] = {
        "data.init_args.batch_size": found.batch_size,
        "trainer.accumulate_grad_batches": found.accumulate_grad_batches,
    }
    every, validated = trainer.get("val_check_interval"), trainer.get("limit_val_batches")
    if isinstance(every, int):  # as many steps as before
        options["trainer.val_check_interval"] = max(1, every * found.accumulate_grad_batches // accumulated)
    if isinstance(validated, int):  # as many images as before, or a few more
        options["trainer.limit_val_batches"] = -(-validated * before // found.batch_size)
    return options


def _devices(trainer: Mapping[str, Any]) -> int:
    """How many devices the recipe asks for, over all nodes."""
    asked = trainer.get("devices", "auto")
    if isinstance(asked, list):
        each = len(asked)
    else:
        each = int(asked) if str(asked).isdecimal() else max(1, torch.cuda.device_count())
    return max(1, each) * int(trainer.get("num_nodes") or 1)


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    return run_function(microbatch, words, "microbatch")
