"""The time of the pooled features of all layers, compared with a plain pass and ``ImageGPTModel`` of ``transformers``.

All sides get the same weights and tokens. The peer returns all hidden states, which are then normed and averaged over
the positions; in float32 its features must equal ours. The plain pass includes the head.

The limit: the operations of the plain pass (``planning.forward_flops_per_token``), for the middle layer those of half
the blocks, at the speed of a large matrix product.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_igpt.benchmarks import harness
from lightning_igpt.benchmarks.harness import Turns
from lightning_igpt.benchmarks.peers import after_start, both_networks, random_tokens, transformers
from lightning_igpt.config import PRESETS
from lightning_igpt.planning import forward_flops_per_token
from lightning_igpt.trainer import best_precision

CLOSE = 1e-4  # of the largest feature
FORWARD, ALL, MIDDLE = "plain forward", "all layers", "middle layer"
PEER = "transformers, all layers"


def their_features(theirs: Any, tokens: Tensor) -> Tensor:
    """(B, L + 1, D): ``ImageGPT.features`` from the hidden states that the peer returns."""
    given = after_start(tokens, theirs.config.vocab_size - 1)
    states = theirs(given, output_hidden_states=True, use_cache=False).hidden_states
    normed = [block.ln_1(state) for block, state in zip(theirs.h, states[:-1], strict=True)]
    return torch.stack([state.mean(1) for state in (*normed, states[-1])], 1)  # the last is already normed


def check_agreement(sides: dict[str, Callable[[], Tensor]]) -> float:
    """Check for equal features; return the largest difference."""
    ours, theirs = sides[ALL](), sides[PEER]()
    difference = harness.largest_difference(ours, theirs)
    harness.require(difference <= CLOSE, f"features differ by {difference:.1e} of the largest, more than {CLOSE:.0e}")
    middle = harness.largest_difference(sides[MIDDLE]()[:, 0], ours[:, ours.shape[1] // 2])
    harness.require(middle <= CLOSE, f"the middle layer alone differs by {middle:.1e} from what it is among all")
    return difference


@torch.no_grad()
def measure(options: Namespace) -> tuple[dict[str, Turns], float]:
    """Turns of every side, and the largest difference of features."""
    config, device = PRESETS[options.preset], options.device
    network, model = both_networks(config, device)
    tokens, layers = random_tokens(config, options.batch_size, device), list(range(config.n_layer + 1))
    sides: dict[str, Callable[[], Tensor]] = {
        FORWARD: lambda: network(tokens),
        ALL: lambda: network.features(tokens, layers),
        MIDDLE: lambda: network.features(tokens, [config.n_layer // 2]),
        PEER: lambda: their_features(model.transformer, tokens),
    }
    difference = check_agreement(sides)
    for each in (network, model):
        each.to(torch.bfloat16 if options.precision == "bf16-true" else torch.float32)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=options.precision == "bf16-mixed"):
        return harness.in_turns(sides, repeats=options.repeats, device=device), difference


def main(words: Sequence[str] | None = None) -> None:
    """Read the options, compare, print."""
    parser = harness.options_parser(
        "features", __doc__, preset="igpt_s", batch_size=2, precisions=tuple(harness.PRECISIONS)
    )
    options = parser.parse_args(words)
    config = PRESETS[options.preset]
    options.precision = options.precision or best_precision(options.device.split(":")[0])
    rows, difference = measure(options)
    limit = harness.machine_limits(options.device, harness.PRECISIONS[options.precision]).flops_per_second
    tokens = options.batch_size * config.n_positions
    forward = float(forward_flops_per_token(config) * tokens)
    blocks = forward - 2.0 * config.vocab_size * config.n_embd * tokens  # without the head
    half = blocks * (config.n_layer // 2) / config.n_layer
    work = {FORWARD: forward, ALL: blocks, MIDDLE: half, PEER: blocks}
    title = f"{options.preset}, {options.batch_size} images, {options.precision}"
    harness.print_table(title, rows, peer=PEER, work=work, limit=limit)
    to_forward = {name: 1 / rows[name].ratio_to(rows[FORWARD]) for name in rows if name != FORWARD}
    print("\ntimes a plain forward: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in to_forward.items()))
    harness.print_result(
        options,
        rows,
        transformers,
        ratio_vs_peer=rows[ALL].ratio_to(rows[PEER]),
        fraction_of_limit=blocks / limit / rows[ALL].median,
        times_forward={name: round(ratio, 4) for name, ratio in to_forward.items()},
        largest_difference=float(f"{difference:.2g}"),
    )


if __name__ == "__main__":
    main()
