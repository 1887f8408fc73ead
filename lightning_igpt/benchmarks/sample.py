"""What one more pixel costs: ours in full, half and int8 precision beside the cached ``ImageGPT`` of ``transformers``.

All sides have the same weights and continue the same prompts from the same position, with their caches filled. A turn
is a few steps, each of them a forward pass of one pixel per picture and a draw. Before, all are fed the same pixels and
must agree with a pass of the network over the whole picture: ours in float32 to 1e-5 of the largest logit, the peer to
1e-3 (with two threads its own logits vary by 1.5e-4 from one run to another); how far half and int8 are off is printed.

Limits: the bytes that a step must read (weights of the products, and keys and values of the positions seen) over the
speed of a large copy or sum, in the same run. OpenAI's own sampler keeps no cache: a pixel costs it a pass over the
whole picture, which is timed, too, and the number of its products is counted.

``ratio_vs_peer`` and ``fraction_of_limit`` of the last line are those of ``--precision`` (default: half).
"""

from __future__ import annotations

import inspect
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_igpt.benchmarks.harness import (
    as_json,
    conditions,
    in_turns,
    largest_difference,
    machine_limits,
    options_parser,
    positive,
    print_json,
    print_table,
    require,
    seconds_of,
)
from lightning_igpt.benchmarks.peers import both_networks, random_tokens, transformers
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.decoding import Decoder, Precision
from lightning_igpt.model import ImageGPT
from lightning_igpt.planning import forward_flops_per_token
from lightning_igpt.sampling import draw

PEER = "transformers, cached"
CLOSE = {"full": 1e-5, "half": 0.01, "int8": 0.1, PEER: 1e-3}  # of the largest logit


class Ours:
    """One batch of pictures in one precision; ``back`` forgets the steps of a turn."""

    def __init__(self, network: ImageGPT, prompt: Tensor, precision: Precision) -> None:
        self.decoder = Decoder(network, len(prompt), precision)
        self.decoder.start(prompt)
        self.length = self.decoder.cache.length

    def back(self) -> None:
        """To where the prompt ends."""
        cache = self.decoder.cache
        cache.length = self.length
        cache.position.fill_(self.length)

    def logits(self, pixel: Tensor) -> Tensor:
        """One step: (B, 1) to (B, K)."""
        return self.decoder.step(pixel)


class Theirs:
    """The peer, with the cache that its ``generate`` would use."""

    def __init__(self, network: Any, prompt: Tensor, vocab_size: int) -> None:
        start = torch.full_like(prompt[:, :1], vocab_size)
        self.network, self.vocab_size = network, vocab_size
        self.cache = transformers.DynamicCache(config=network.config)
        renamed = "cache" in inspect.signature(network.forward).parameters  # in transformers 5.24
        self.options = {"cache" if renamed else "past_key_values": self.cache, "use_cache": True}
        network(torch.cat([start, prompt], 1), **self.options)
        self.length = self.cache.get_seq_length()

    def back(self) -> None:
        """To where the prompt ends."""
        if steps := self.cache.get_seq_length() - self.length:
            self.cache.crop(-steps)

    def logits(self, pixel: Tensor) -> Tensor:
        """One step: (B, 1) to (B, K)."""
        logits: Tensor = self.network(pixel, **self.options).logits[:, -1, : self.vocab_size]
        return logits


def turn(side: Ours | Theirs, pixel: Tensor, steps: int) -> None:
    """Draw ``steps`` pixels, each given the ones before."""
    side.back()
    for _ in range(steps):
        pixel = draw(side.logits(pixel))[:, None]


def fed(side: Ours | Theirs, pixels: Tensor) -> Tensor:
    """Logits (steps, B, K) after each of some given pixels (B, steps)."""
    side.back()
    return torch.stack([side.logits(pixel).clone() for pixel in torch.split(pixels, 1, 1)])


def step_bytes(config: ImageGPTConfig, batch_size: int, seen: int, weight_bytes: float, cache_bytes: int) -> float:
    """What a step at position ``seen`` must read."""
    matrices = config.n_layer * (4 * config.n_embd**2 + 2 * config.n_embd * config.mlp_width)
    matrices += config.vocab_size * config.n_embd
    return matrices * weight_bytes + 2 * config.n_layer * batch_size * config.n_embd * seen * cache_bytes


def measure(options: Namespace) -> dict[str, Any]:
    """Check, time, print the table; return what the JSON line says beside the conditions."""
    config, device, steps = PRESETS[options.preset], options.device, options.steps
    network, peer = both_networks(config, device)
    tokens = random_tokens(config, options.batch_size, device)
    given = (config.n_positions - steps) // 2
    prompt, pixels = tokens[:, :given], tokens[:, given : given + steps]
    on_cpu = torch.device(device).type == "cpu"
    names = [name for name in get_args(Precision) if on_cpu or name != "int8"]
    sides: dict[str, Ours | Theirs] = {name: Ours(network, prompt, name) for name in names}
    sides[PEER] = Theirs(peer, prompt, config.vocab_size)

    expected = network(tokens)[:, given + 1 : given + 1 + steps].transpose(0, 1)
    off = {name: largest_difference(fed(side, pixels), expected) for name, side in sides.items()}
    for name, value in off.items():
        print(f"{name}: logits within {value:.1e} of the largest")
        require(value < CLOSE[name], f"logits of {name} differ by {value:.1e} of the largest, allowed {CLOSE[name]}")

    runs: dict[str, Callable[[], object]] = {
        name: lambda side=side: turn(side, pixels[:, :1], steps)  # type: ignore[misc]
        for name, side in sides.items()
    }
    turns = in_turns(runs, repeats=options.repeats, device=device)
    limits = machine_limits(device)
    seen = given + 1 + steps // 2
    sizes = {"full": 4.0, "half": 2.0, "int8": 1.0, PEER: 4.0}
    caches = {
        name: side.decoder.cache.k.element_size() if isinstance(side, Ours) else 4 for name, side in sides.items()
    }
    work = {name: steps * step_bytes(config, options.batch_size, seen, sizes[name], caches[name]) for name in sides}
    title = f"one step, {options.preset}, batch {options.batch_size}, position {seen}"
    print_table(title, turns, peer=PEER, work=work, limit=limits.bytes_per_second, per=steps)

    whole = seconds_of(lambda: network(tokens), device)
    chosen = turns[options.precision]
    print(
        f"without a cache, as OpenAI's sampler: {whole * 1e3:,.0f} ms per pixel, {whole * steps / chosen.median:,.0f} x"
    )
    return {
        "ratio_vs_peer": chosen.ratio_to(turns[PEER]),
        "fraction_of_limit": work[options.precision] / chosen.median / limits.bytes_per_second,
        "ratio_vs_no_cache": round(whole * steps / chosen.median, 1),
        "no_cache_flops_per_pixel": forward_flops_per_token(config) * config.n_positions * options.batch_size,
        "bytes_per_second_limit": round(limits.bytes_per_second),
        "logits_off": {name: float(f"{value:.3g}") for name, value in off.items()},
        "steps_per_turn": steps,
        "sides": as_json(turns),
    }


@torch.inference_mode()
def main(words: Sequence[str] | None = None) -> None:
    """Read the options, measure, print."""
    parser = options_parser("sample", __doc__, preset="igpt_s", batch_size=1, precisions=get_args(Precision))
    parser.add_argument("--steps", type=positive, default=24, help="pixels of one turn (default 24)")
    options = parser.parse_args(words)
    options.precision = options.precision or "half"
    total = PRESETS[options.preset].n_positions
    if options.steps > total - 2:
        parser.error(f"--steps {options.steps} is too many; a picture has {total} pixels, so at most {total - 2}")
    if options.compile:
        print("--compile: sampling runs no compiled code, so there is nothing to compare")
    result = measure(options)
    asked = {"preset": options.preset, "batch_size": options.batch_size, "precision": options.precision}
    print_json("sample", **result, **asked, **conditions(options.device, transformers))


if __name__ == "__main__":
    main()
