"""The time of a training step, forward, loss, backward and AdamW, compared with ``ImageGPT`` of ``transformers``.

Both sides start from the same weights, train on the same tokens with the same learning rate, and must give the same
loss in float32 before and after a first step; the peer has dropout 0 and plain AdamW. ``--layers``, ``--width`` and
``--size`` replace the preset's; the tiny recipes have 6, 96, and 8 or 16. The callback Throughput measures a step
within ``trainer.fit``.

Limit: 3 x the forward pass's operations (attention counted causally, ``planning.train_flops_per_token``) at the speed
of a large matrix product in the same precision. On a GPU, relative to the chip's nominal speed, that is the MFU.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from lightning_igpt.benchmarks import harness
from lightning_igpt.benchmarks.harness import PRECISIONS, Comparison, both_networks, random_tokens, transformers
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.objectives import next_pixel_loss
from lightning_igpt.optim import make_adam
from lightning_igpt.planning import train_flops_per_token

OURS, COMPILED, PEER = "ours", "ours, compiled", "transformers"
ADAM: Any = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.0}
CLOSE = (1e-5, 1e-3)  # of the loss before and after a step, which depends on the signs of the smallest gradients
WARM_UP = 2


def make_steps(
    config: ImageGPTConfig, tokens: Tensor, precision: str, *, compiled: bool
) -> dict[str, Callable[[], Tensor]]:
    """One training step of each side; a call returns its loss."""
    network, peer = both_networks(config, str(tokens.device))
    for module in peer.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    given = torch.cat([torch.full_like(tokens[:, :1], config.vocab_size), tokens[:, :-1]], 1)  # its start token first

    def their_loss() -> Tensor:
        return F.cross_entropy(peer(given, use_cache=False).logits.float().flatten(0, 1), tokens.flatten())

    def ours(network: ImageGPT) -> Callable[[], Tensor]:
        optimizer = make_adam(network.train().parameters(), **ADAM)
        return _step(network, optimizer, lambda: next_pixel_loss(network(tokens), tokens), precision)

    steps = {OURS: ours(network), PEER: _step(peer, AdamW(peer.parameters(), **ADAM), their_loss, precision)}
    if compiled:
        other = copy.deepcopy(network)
        for block in other.blocks():
            block.compile()
        steps[COMPILED] = ours(other)
    return steps


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
    own = {"compile": (False, "also measure ours compiled"), "layers": (None, "blocks instead of the preset's")}
    own |= {"width": (None, "width instead of the preset's"), "size": (None, "side of the images in pixels")}
    options = harness.parse("train_step", __doc__, words, tuple(PRECISIONS), batch_size=(4, "images"), **own)
    fields = {"n_layer": options.layers, "n_embd": options.width, "image_size": options.size}
    given = {name: value for name, value in fields.items() if value}
    config, precision = dataclasses.replace(PRESETS[options.preset], **given), options.precision
    tokens = random_tokens(config, options.batch_size, options.device)
    off = check_agreement(config, tokens)
    print(f"losses in float32 agree within {off:.1e}", flush=True)
    steps = make_steps(config, tokens, precision, compiled=options.compile)
    rows = harness.in_turns(steps, options.repeats, options.device, warm_up=WARM_UP)
    limit = harness.machine_limits(options.device, PRECISIONS[precision]).flops_per_second
    least = dict.fromkeys(rows, train_flops_per_token(config) * tokens.numel() / limit)
    comparison = Comparison(rows, COMPILED if options.compile else OURS, PEER, least, tokens.numel(), "tokens")
    shape = f"{config.n_layer} layers x {config.n_embd}, {config.n_positions} tokens"
    comparison.print_table(f"{shape}, batch {options.batch_size}, {precision}")
    comparison.print_result(options, transformers, losses_off=off, flops_per_second_limit=limit)


if __name__ == "__main__":
    main()
