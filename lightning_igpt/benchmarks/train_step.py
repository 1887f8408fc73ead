"""The time of a training step, forward, loss, backward and AdamW, compared with ``ImageGPT`` of ``transformers``.

Both sides start from the same weights, train on the same tokens with the same learning rate, and must give the same
loss in float32 before and after a first step; the peer has dropout 0 and plain AdamW. ``--layers`` uses fewer blocks
than the preset. The callback Throughput measures a step within ``trainer.fit``.

Limit: 3 x the forward pass's operations (attention counted causally, ``planning.train_flops_per_token``) at the speed
of a large matrix product in the same precision. On a GPU, relative to the chip's nominal speed, that is the MFU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_igpt.benchmarks import harness
from lightning_igpt.benchmarks.peers import after_start, both_networks, random_tokens, transformers
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.objectives import next_pixel_loss
from lightning_igpt.optim import make_adam
from lightning_igpt.planning import train_flops_per_token
from lightning_igpt.trainer import best_precision

OURS, COMPILED, PEER = "ours", "ours, compiled", "transformers"
LR = 1e-4
CLOSE = (1e-5, 1e-3)  # of the loss before and after a step, which depends on the signs of the smallest gradients
WARM_UP = 2


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
    optimizer = make_adam(network.train().parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    return _step(network, optimizer, lambda: next_pixel_loss(network(tokens), tokens), precision)


def _theirs(peer: Any, tokens: Tensor, vocab_size: int, precision: str) -> Callable[[], Tensor]:
    for module in peer.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    given = after_start(tokens, vocab_size)

    def loss() -> Tensor:
        return F.cross_entropy(peer(given, use_cache=False).logits.float().flatten(0, 1), tokens.flatten())

    optimizer = torch.optim.AdamW(peer.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)
    return _step(peer, optimizer, loss, precision)


def _step(
    network: nn.Module, optimizer: torch.optim.Optimizer, loss_of: Callable[[], Tensor], precision: str
) -> Callable[[], Tensor]:
    device, mixed = next(network.parameters()).device.type, precision == "bf16-mixed"
    if precision == "bf16-true":
        network.bfloat16()

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def check_agreement(config: ImageGPTConfig, tokens: Tensor) -> float:
    """Check for equal losses in float32, before and after a step; return the difference before."""
    tokens = tokens[:1]
    steps = make_steps(config, tokens, "32-true", compiled=False)
    losses = {name: [float(step()), float(step())] for name, step in steps.items()}
    off = [abs(a - b) / b for a, b in zip(losses[OURS], losses[PEER], strict=True)]
    harness.require(off[0] < CLOSE[0] and off[1] < CLOSE[1], f"losses {losses[OURS]} and {losses[PEER]}")
    harness.require(losses[OURS][1] != losses[OURS][0], "the first step changed nothing")
    return off[0]


def main(words: Sequence[str] | None = None) -> None:
    """Read the options, measure, print."""
    parser = harness.options_parser(
        "train_step", __doc__, preset="igpt_s", batch_size=4, precisions=tuple(harness.PRECISIONS)
    )
    parser.add_argument("--compile", action="store_true", help="also measure ours compiled")
    parser.add_argument("--layers", type=int, help="blocks (default: the preset's)")
    options = parser.parse_args(words)
    preset = PRESETS[options.preset]
    precision = options.precision = options.precision or best_precision(options.device.split(":")[0])
    config = dataclasses.replace(preset, n_layer=options.layers or preset.n_layer)
    tokens = random_tokens(config, options.batch_size, options.device)
    off = check_agreement(config, tokens)
    print(f"losses in float32 agree within {off:.1e}", flush=True)
    steps = make_steps(config, tokens, precision, compiled=options.compile)
    turns = harness.in_turns(steps, repeats=options.repeats, device=options.device, warm_up=WARM_UP)
    limit = harness.machine_limits(options.device, harness.PRECISIONS[precision]).flops_per_second
    work = float(train_flops_per_token(config) * tokens.numel())
    title = f"{options.preset}, {config.n_layer} layers, batch {options.batch_size}, {precision}"
    harness.print_table(title, turns, peer=PEER, work=dict.fromkeys(turns, work), limit=limit)
    best = turns[COMPILED if options.compile else OURS]
    harness.print_result(
        options,
        turns,
        transformers,
        ratio_vs_peer=best.ratio_to(turns[PEER]),
        fraction_of_limit=work / best.median / limit,
        tokens_per_second=round(tokens.numel() / best.median, 1),
        flops_per_second_limit=round(limit),
        losses_off=float(f"{off:.2g}"),
        layers=config.n_layer,
    )


if __name__ == "__main__":
    main()
