"""What the features of all layers cost, beside a plain forward pass and ``ImageGPTModel`` of ``transformers``.

All sides get the same weights and tokens. The peer returns all hidden states, which are then normed and averaged over
the positions, as its users would; in float32 its features must equal ours before anything is timed. The plain pass
includes the colour head; the features of all layers should take no more than 1.1 times as long, those of the middle
layer alone no more than 0.55 times.

The limit: the operations of the plain pass (``planning.forward_flops_per_token``), for the middle layer those of half
the blocks, at the speed of a large matrix product.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lightning_igpt.benchmarks.harness import (
    PRECISIONS,
    Turns,
    as_json,
    conditions,
    in_turns,
    largest_difference,
    machine_limits,
    options_parser,
    print_json,
    print_table,
    require,
)
from lightning_igpt.benchmarks.peers import after_start, both_networks, random_tokens, transformers
from lightning_igpt.config import PRESETS
from lightning_igpt.model import ImageGPT
from lightning_igpt.planning import forward_flops_per_token
from lightning_igpt.trainer import best_precision

CLOSE = 1e-4  # of the largest feature
FORWARD, ALL, MIDDLE, COMPILED = "plain forward", "all layers", "middle layer", "all layers, compiled"
PEER = "transformers, all layers"


def their_features(theirs: Any, tokens: Tensor) -> Tensor:
    """(B, L + 1, D): what ``ImageGPT.features`` gives, from the hidden states that the peer returns."""
    states = theirs(
        after_start(tokens, theirs.config.vocab_size - 1), output_hidden_states=True, use_cache=False
    ).hidden_states
    normed = [block.ln_1(state) for block, state in zip(theirs.h, states[:-1], strict=True)]
    return torch.stack([state.mean(1) for state in (*normed, states[-1])], 1)  # it has normed the last itself


def sides_of(network: ImageGPT, theirs: Any, tokens: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name."""
    depth = network.config.n_layer
    return {
        FORWARD: lambda: network(tokens),
        ALL: lambda: network.features(tokens, range(depth + 1)),
        MIDDLE: lambda: network.features(tokens, [depth // 2]),
        PEER: lambda: their_features(theirs, tokens),
    }


def check_agreement(sides: dict[str, Callable[[], Tensor]]) -> float:
    """Insist on equal features; the largest difference."""
    ours, theirs = sides[ALL](), sides[PEER]()
    difference = largest_difference(ours, theirs)
    require(difference <= CLOSE, f"features differ by {difference:.1e} of the largest, more than {CLOSE:.0e}")
    middle = largest_difference(sides[MIDDLE]()[:, 0], ours[:, ours.shape[1] // 2])
    require(middle <= CLOSE, f"the middle layer alone differs by {middle:.1e} from what it is among all")
    return difference


def with_precision(network: ImageGPT, theirs: Any, precision: str, device: str) -> AbstractContextManager[Any]:
    """Cast both networks, or the context that casts as they go."""
    if precision == "bf16-true":
        for each in (network, theirs):
            each.bfloat16()
    return torch.autocast(torch.device(device).type, torch.bfloat16) if precision == "bf16-mixed" else nullcontext()


def measure(options: Namespace, precision: str) -> tuple[dict[str, Turns], float]:
    """Turns of every side, and the largest difference of features."""
    config, device = PRESETS[options.preset], options.device
    network, model = both_networks(config, device)
    theirs, tokens = model.transformer, random_tokens(config, options.batch_size, device)
    sides = sides_of(network, theirs, tokens)
    with torch.no_grad():
        difference = check_agreement(sides)
        if options.compile:
            compiled, layers = torch.compile(network.features), list(range(config.n_layer + 1))
            sides[COMPILED] = lambda: compiled(tokens, layers)
        with with_precision(network, theirs, precision, device):
            return in_turns(sides, repeats=options.repeats, device=device), difference


def main(words: Sequence[str] | None = None) -> None:
    """Read the options, compare, print."""
    options = options_parser("features", __doc__, preset="igpt_s", batch_size=2).parse_args(words)
    config, precision = PRESETS[options.preset], options.precision or best_precision(options.device.split(":")[0])
    rows, difference = measure(options, precision)
    limit = machine_limits(options.device, PRECISIONS[precision]).flops_per_second
    tokens = options.batch_size * config.n_positions
    forward = float(forward_flops_per_token(config) * tokens)
    blocks = forward - 2.0 * config.vocab_size * config.n_embd * tokens  # all but the colour head
    half = blocks * (config.n_layer // 2) / config.n_layer
    work = {FORWARD: forward, ALL: blocks, COMPILED: blocks, MIDDLE: half, PEER: blocks}
    print_table(f"{options.preset}, {options.batch_size} images, {precision}", rows, peer=PEER, work=work, limit=limit)
    to_forward = {name: 1 / rows[name].ratio_to(rows[FORWARD]) for name in rows if name != FORWARD}
    print("\ntimes a plain forward: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in to_forward.items()))
    print_json(
        "features",
        ratio_vs_peer=rows[ALL].ratio_to(rows[PEER]),
        fraction_of_limit=blocks / limit / rows[ALL].median,
        times_forward={name: round(ratio, 4) for name, ratio in to_forward.items()},
        largest_difference=float(f"{difference:.2g}"),
        preset=options.preset,
        batch_size=options.batch_size,
        precision=precision,
        sides=as_json(rows),
        **conditions(options.device, transformers),
    )


if __name__ == "__main__":
    main()
