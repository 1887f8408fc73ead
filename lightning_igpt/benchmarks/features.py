"""The time of the pooled features of all layers, compared with a plain pass and ``ImageGPTModel`` of ``transformers``.

All sides get the same weights and tokens. The peer returns all hidden states, which are then normed and averaged over
the positions; in float32 its features must equal ours. The plain pass includes the head.

The limit: the operations of the plain pass (``planning.forward_flops_per_token``), for the middle layer those of half
the blocks, at the speed of a large matrix product.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_igpt.benchmarks import harness
from lightning_igpt.benchmarks.harness import (
    PRECISIONS,
    Comparison,
    Turns,
    after_start,
    both_networks,
    random_tokens,
    transformers,
)
from lightning_igpt.config import PRESETS
from lightning_igpt.planning import forward_flops_per_token

CLOSE = 1e-4  # of the largest feature
FORWARD, ALL, MIDDLE = "plain forward", "all layers", "middle layer"
PEER = "transformers, all layers"


def their_features(theirs: Any, tokens: Tensor) -> Tensor:
    """(B, L + 1, D): ``ImageGPT.features`` from the hidden states that the peer returns."""
    given = after_start(tokens, theirs.config.vocab_size - 1)
    states = theirs(given, output_hidden_states=True, use_cache=False).hidden_states
    normed = [block.ln_1(state) for block, state in zip(theirs.h, states[:-1], strict=True)]
    return torch.stack([state.mean(1) for state in (*normed, states[-1])], 1)  # the last is already normed


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
    ours = sides[ALL]()
    difference = harness.require_close("features", ours, sides[PEER](), CLOSE)
    middle = ours[:, config.n_layer // 2 : config.n_layer // 2 + 1]
    harness.require_close("features of the middle layer alone", sides[MIDDLE](), middle, CLOSE)
    for each in (network, model):
        each.to(torch.bfloat16 if options.precision == "bf16-true" else torch.float32)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=options.precision == "bf16-mixed"):
        return harness.in_turns(sides, options.repeats, device), difference


def main(words: Sequence[str] | None = None) -> None:
    """Read the options, compare, print."""
    options = harness.parse("features", __doc__, words, tuple(PRECISIONS), batch_size=(2, "images"))
    config = PRESETS[options.preset]
    rows, difference = measure(options)
    limit = harness.machine_limits(options.device, PRECISIONS[options.precision]).flops_per_second
    tokens = options.batch_size * config.n_positions
    forward = forward_flops_per_token(config) * tokens / limit
    blocks = forward - 2 * config.vocab_size * config.n_embd * tokens / limit  # without the head
    half = blocks * (config.n_layer // 2) / config.n_layer
    least = {FORWARD: forward, ALL: blocks, MIDDLE: half, PEER: blocks}
    comparison = Comparison(rows, ALL, PEER, least, tokens, "tokens")
    comparison.print_table(f"{options.preset}, {options.batch_size} images, {options.precision}")
    to_forward = {name: 1 / turns.ratio_to(rows[FORWARD]) for name, turns in rows.items()}
    comparison.print_result(options, transformers, times_forward=to_forward, largest_difference=difference)


if __name__ == "__main__":
    main()
