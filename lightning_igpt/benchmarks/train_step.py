"""What a training step costs: forward, loss, backward and AdamW, ours beside the ``ImageGPT`` of ``transformers``.

Both sides start from the same weights, train on the same tokens with the same learning rate, and must give the same
loss in float32 before and after a first step; the peer has its dropout at 0 and the plain AdamW that its users would
take. ``--layers`` keeps a preset's width and takes fewer blocks, so that a step fits a machine without a GPU. With
``--trainer`` the same step is also driven by ``trainer.fit``, with a loader that holds its batch ready: what it takes
longer than the bare loop is the cost of Lightning and of this package's hooks.

Limit: 3 x the forward pass's operations (attention counted causally, ``planning.train_flops_per_token``) at the speed
of a large matrix product in the same precision. On a GPU that fraction, against the chip's nominal speed, is the MFU.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_igpt.benchmarks.harness import (
    PRECISIONS,
    Turns,
    as_json,
    conditions,
    in_turns,
    machine_limits,
    options_parser,
    positive,
    print_json,
    print_table,
    require,
    wait_for,
)
from lightning_igpt.benchmarks.peers import after_start, both_networks, random_tokens, transformers
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules import PretrainModule
from lightning_igpt.objectives import next_pixel_loss
from lightning_igpt.optim import make_adam
from lightning_igpt.planning import train_flops_per_token
from lightning_igpt.trainer import best_precision, make_trainer

OURS, COMPILED, PEER = "ours", "ours, compiled", "transformers"
LR = 1e-4
CLOSE = (1e-5, 1e-3)  # of the loss before and after a step; Adam's first one goes by the sign of the smallest gradients
WARM_UP = 2
FEW = 3  # steps of one turn through the trainer


def make_steps(
    config: ImageGPTConfig, tokens: Tensor, precision: str, *, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """One training step of each side; a call returns its loss."""
    device = str(tokens.device)
    network, peer = both_networks(config, device)
    steps = {OURS: _ours(network, tokens, precision), PEER: _theirs(peer, tokens, config.vocab_size, precision)}
    if compiled:
        other, _ = both_networks(config, device)
        for block in other.blocks():
            block.compile()
        steps[COMPILED] = _ours(other, tokens, precision)
    return steps


def _ours(network: ImageGPT, tokens: Tensor, precision: str) -> Callable[[], Tensor]:
    cast = _cast(network.train(), precision, tokens.device)
    optimizer = make_adam(network.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)

    def step() -> Tensor:
        optimizer.zero_grad()
        with cast():
            loss = next_pixel_loss(network(tokens), tokens)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def _theirs(peer: Any, tokens: Tensor, vocab_size: int, precision: str) -> Callable[[], Tensor]:
    for module in peer.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    cast, given = _cast(peer, precision, tokens.device), after_start(tokens, vocab_size)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)

    def step() -> Tensor:
        optimizer.zero_grad()
        with cast():
            logits = peer(given, use_cache=False).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def _cast(network: nn.Module, precision: str, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    if precision == "bf16-true":
        network.bfloat16()
    if precision != "bf16-mixed":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


def check_agreement(config: ImageGPTConfig, tokens: Tensor) -> float:
    """Insist on equal losses in float32, before and after a step; the difference before."""
    tokens = tokens[:1]
    steps = make_steps(config, tokens, "32-true", compiled=False)
    losses = {name: [float(step()), float(step())] for name, step in steps.items()}
    off = [abs(a - b) / b for a, b in zip(losses[OURS], losses[PEER], strict=True)]
    require(off[0] < CLOSE[0] and off[1] < CLOSE[1], f"losses {losses[OURS]} and {losses[PEER]}")
    require(losses[OURS][1] != losses[OURS][0], "the first step changed nothing")
    return off[0]


class _Ready(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """The same batch again and again, already where it is needed."""

    def __init__(self, tokens: Tensor) -> None:
        self.batch = {"tokens": tokens}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            yield self.batch


class _Clock(lightning.pytorch.Callback):
    """When each batch ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, trainer: lightning.pytorch.Trainer, *_: Any) -> None:
        wait_for(str(trainer.strategy.root_device))
        self.ends.append(time.perf_counter())


def through_the_trainer(config: ImageGPTConfig, tokens: Tensor, precision: str, repeats: int) -> Turns:
    """Seconds per step of ``trainer.fit`` with all that make_trainer adds, checkpoints apart."""
    module = PretrainModule(network=config.to_dict(), palette="openai", lr=LR, warmup_steps=1)
    loader = torch.utils.data.DataLoader(_Ready(tokens), batch_size=None)
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            max_steps=WARM_UP + repeats + 1,
            precision=precision,
            accelerator="gpu" if tokens.is_cuda else "cpu",
            devices=1,
            callbacks=[clock],
            default_root_dir=folder,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, loader)
    ends = clock.ends[WARM_UP:]
    return Turns(tuple(later - earlier for earlier, later in itertools.pairwise(ends)))


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Neither its greetings nor its advice among the figures."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def measure(options: Namespace) -> dict[str, Any]:
    """Check, time, print the table; return what the JSON line says beside the conditions."""
    preset = PRESETS[options.preset]
    config = dataclasses.replace(preset, n_layer=options.layers or preset.n_layer)
    tokens = random_tokens(config, options.batch_size, options.device)
    off = check_agreement(config, tokens)
    print(f"losses in float32 agree within {off:.1e}", flush=True)
    steps = make_steps(config, tokens, options.precision, compiled=options.compile)
    turns = in_turns(steps, repeats=options.repeats, device=options.device, warm_up=WARM_UP)
    limits = machine_limits(options.device, PRECISIONS[options.precision])
    work = float(train_flops_per_token(config) * tokens.numel())
    title = f"{options.preset}, {config.n_layer} layers, batch {options.batch_size}, {options.precision}"
    print_table(title, turns, peer=PEER, work=work, limit=limits.flops_per_second)
    found: dict[str, Any] = {}
    if options.trainer:
        found = overhead(config, tokens, options.precision, steps[OURS], options.repeats)
    best = turns[COMPILED if options.compile else OURS]
    return {
        "ratio_vs_peer": best.ratio_to(turns[PEER]),
        "fraction_of_limit": work / best.median / limits.flops_per_second,
        "tokens_per_second": round(tokens.numel() / best.median, 1),
        "flops_per_second": round(work / best.median),
        "flops_per_second_limit": round(limits.flops_per_second),
        "losses_off": float(f"{off:.2g}"),
        "layers": config.n_layer,
        "sides": as_json(turns),
        **found,
    }


def overhead(
    config: ImageGPTConfig, tokens: Tensor, precision: str, bare: Callable[[], Tensor], repeats: int
) -> dict[str, float]:
    """Seconds that a step of ``trainer.fit`` takes beyond one of the bare loop; both in turns of a few steps."""
    device = str(tokens.device)
    through: list[float] = []
    loop: list[float] = []
    for _ in range(repeats):
        through.append(through_the_trainer(config, tokens, precision, FEW).median)
        loop.append(in_turns({OURS: bare}, repeats=FEW, device=device)[OURS].median)
    fit, more = Turns(tuple(through)), statistics.median(a - b for a, b in zip(through, loop, strict=True))
    share = 1 / fit.ratio_to(Turns(tuple(loop))) - 1
    print(
        f"trainer.fit: {fit.median * 1e3:,.1f} ms per step, {more * 1e3:+,.1f} ms ({share:+.1%}) beside the bare loop"
    )
    return {"trainer_fit_s": float(f"{fit.median:.6g}"), "trainer_overhead": round(share, 4)}


def main(words: Sequence[str] | None = None) -> None:
    """Read the options, measure, print."""
    parser = options_parser("train_step", __doc__, preset="igpt_s", batch_size=4)
    parser.add_argument("--layers", type=positive, help="blocks (default: the preset's)")
    parser.add_argument("--trainer", action="store_true", help="also measure the same step driven by trainer.fit")
    options = parser.parse_args(words)
    options.precision = options.precision or best_precision(options.device.split(":")[0])
    with quiet_lightning():
        result = measure(options)
    asked = {"preset": options.preset, "batch_size": options.batch_size, "precision": options.precision}
    print_json("train_step", **result, **asked, **conditions(options.device, transformers, lightning))


if __name__ == "__main__":
    main()
