"""The time of one more pixel in full, half and int8 precision, compared with a cached step of ``transformers``.

All sides have the same weights and continue the same prompts from the same position, with filled caches. A turn is a
few steps, each a forward pass of one given pixel per image and a draw of the next. Before, their logits must agree with
a pass of the network over the whole image: ours in float32 to 1e-5 of the largest logit, the peer to 1e-3 (with two
threads its own logits vary by 1.5e-4 between runs).

Limits: the bytes that a step must read (weights of the products, and keys and values of the positions seen) over the
speed of a large copy or sum in the same run. OpenAI's own sampler has no cache: a pixel costs a pass over the whole
image, which is timed, too. Ratios in the last line are those of ``--precision`` (default: half).
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from lightning_igpt.benchmarks import harness
from lightning_igpt.benchmarks.harness import Comparison, both_networks, random_tokens, transformers
from lightning_igpt.config import PRESETS
from lightning_igpt.decoding import Decoder, Precision
from lightning_igpt.model import ImageGPT
from lightning_igpt.planning import cache_bytes, matrix_parameters
from lightning_igpt.sampling import draw

PEER = "transformers, cached"
WEIGHT_BYTES = {"full": 4.0, "half": 2.0, "int8": 1.0, PEER: 4.0}
CLOSE = {"full": 1e-5, "half": 0.01, "int8": 0.1, PEER: 1e-3}  # of the largest logit


@dataclass
class Side:
    """One batch of images whose cache holds the prompt."""

    logits: Callable[[Tensor], Tensor]  # one step: (B, 1) to (B, K)
    reset: Callable[[], object]  # return to the end of the prompt
    cache_bytes: int = 4  # of a value

    def run(self, pixels: Tensor) -> Tensor:
        """Logits (steps, B, K) after each of the pixels (B, steps), and a draw from each."""
        self.reset()
        logits = []
        for pixel in torch.split(pixels, 1, 1):
            logits.append(self.logits(pixel).clone())
            draw(logits[-1])
        return torch.stack(logits)


def ours(network: ImageGPT, prompt: Tensor, precision: Precision) -> Side:
    """The decoder of ``complete``."""
    decoder = Decoder(network, len(prompt), precision)
    decoder.start(prompt)
    cache, length = decoder.cache, decoder.cache.length

    def reset() -> None:
        cache.length = length
        cache.position.fill_(length)

    return Side(decoder.step, reset, cache.k.element_size())


def theirs(network: Any, prompt: Tensor, vocab_size: int) -> Side:
    """The peer, with the cache that its ``generate`` would use."""
    cache = transformers.DynamicCache(config=network.config)
    renamed = "cache" in inspect.signature(network.forward).parameters  # in transformers 5.24
    options = {"cache" if renamed else "past_key_values": cache, "use_cache": True}
    network(torch.cat([torch.full_like(prompt[:, :1], vocab_size), prompt], 1), **options)
    length = cache.get_seq_length()

    def reset() -> None:
        if steps := cache.get_seq_length() - length:
            cache.crop(-steps)

    return Side(lambda pixel: network(pixel, **options).logits[:, -1, :vocab_size], reset)


@torch.inference_mode()
def main(words: Sequence[str] | None = None) -> None:
    """Read the options, check, time, print."""
    own = {"batch_size": (1, "images"), "steps": (24, "pixels per repetition")}
    options = harness.parse("sample", __doc__, words, ("half", "full", "int8"), **own)
    total = PRESETS[options.preset].n_positions
    if options.steps > total - 2:
        raise SystemExit(f"--steps {options.steps} is too many; an image has {total} pixels, so at most {total - 2}")
    config, device, steps, batch = PRESETS[options.preset], options.device, options.steps, options.batch_size
    network, peer = both_networks(config, device)
    tokens = random_tokens(config, batch, device)
    given = (config.n_positions - steps) // 2
    prompt, pixels = tokens[:, :given], tokens[:, given : given + steps]
    names = [name for name in get_args(Precision) if torch.device(device).type == "cpu" or name != "int8"]
    sides = {name: ours(network, prompt, name) for name in names} | {PEER: theirs(peer, prompt, config.vocab_size)}
    expected = network(tokens)[:, given + 1 : given + 1 + steps].transpose(0, 1)
    runs = {name: functools.partial(side.run, pixels) for name, side in sides.items()}
    off = {name: harness.require_close(f"logits of {name}", run(), expected, CLOSE[name]) for name, run in runs.items()}
    rows = {name: turns.times(1 / steps) for name, turns in harness.in_turns(runs, options.repeats, device).items()}
    limit = harness.machine_limits(device).bytes_per_second
    seen = given + 1 + steps // 2
    share, matrices = seen / config.n_positions, matrix_parameters(config)
    cached = {name: cache_bytes(config, batch, side.cache_bytes) * share for name, side in sides.items()}
    least = {name: (matrices * WEIGHT_BYTES[name] + size) / limit for name, size in cached.items()}
    comparison = Comparison(rows, options.precision, PEER, least, batch, "pixels")
    comparison.print_table(f"one step, {options.preset}, batch {batch}, position {seen}")
    whole = harness.seconds_of(lambda: network(tokens), device)
    print(f"without a cache, as OpenAI's sampler: {whole * 1e3:,.0f} ms per pixel")
    comparison.print_result(options, transformers, bytes_per_second_limit=limit, logits_off=off, uncached_s=whole)


if __name__ == "__main__":
    main()
