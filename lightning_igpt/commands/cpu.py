"""How fast this CPU trains a network, by a few training steps, for ``plan`` and ``--dry_run``."""

import math
import os
import statistics
import timeit
from dataclasses import replace
from typing import Any

import torch

from lightning_igpt import planning
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.modules import PretrainModule
from lightning_igpt.planning import Device
from lightning_igpt.private import multiplies_bfloat16
from lightning_igpt.trainer import best_precision as best_precision

STEPS, TRIAL = 5, 1e11  # steps that are timed, and the most operations of one of them
PHYSICAL = ("SC_PAGE_SIZE", "SC_PHYS_PAGES")


def measured_cpu(config: ImageGPTConfig, images: int, precision: str, optimizer: Any = "adam") -> Device:
    """This CPU, with torch's threads; its peak is the speed at which it trains such a network, ``images`` at once."""
    name, memory = f"this CPU (threads: {torch.get_num_threads()})", math.prod(map(os.sysconf, PHYSICAL))
    speed, source = train_speed(config, images, precision, optimizer) / 1e12, "measured in training steps"
    return Device(name, memory, speed, None, speed, math.inf, "", multiplies_bfloat16("cpu"), source=source)


def train_speed(config: ImageGPTConfig, images: int, precision: str, optimizer: Any = "adam") -> float:
    """Operations per second: the median of a few training steps, of fewer images, blocks, tokens if they take long."""

    def flops() -> int:  # per image
        return planning.train_flops_per_token(config) * config.n_positions

    images = max(1, min(images, int(TRIAL // flops())))
    config = replace(config, n_layer=1) if flops() > TRIAL else config
    config = replace(config, image_size=8) if flops() > TRIAL else config
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        colors = "rgb" if config.tokens_per_pixel == 3 else torch.rand(config.vocab_size, 3).tolist()
        module = PretrainModule(config.to_dict(), colors, optimizer=optimizer)
        module.train().to(torch.bfloat16 if precision == "bf16-true" else torch.float32)
        module.log = lambda *_, **__: None  # type: ignore[method-assign]  # there is no trainer
        adam, tokens = module._optimizer(), torch.randint(config.vocab_size, (images, config.n_positions))

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=precision.endswith("-mixed")):
                loss = module.training_step({"tokens": tokens}, 0)
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
            adam.zero_grad()

        return images * flops() / statistics.median(timeit.repeat(step, number=1, repeat=STEPS + 2)[2:])
