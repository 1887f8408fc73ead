"""One table of parameter names, read in both directions, between this package, transformers and OpenAI's TF files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple


class Name(NamedTuple):
    """One parameter's name in each format; ``{}`` stands for the block's number."""

    ours: str
    huggingface: str
    openai: str  # without the prefix "model/"


# q, k, v share one packed matrix here and in transformers; OpenAI's file has three, see openai.py.
PLAIN = [
    Name("wpe.weight", "transformer.wpe.weight", "wpe"),
    Name("ln_f.weight", "transformer.ln_f.weight", "ln_f/g"),
    Name("lm_head.weight", "lm_head.weight", "wtet"),
    Name("h.{}.ln_1.weight", "transformer.h.{}.ln_1.weight", "h{}/ln_1/g"),
    Name("h.{}.ln_2.weight", "transformer.h.{}.ln_2.weight", "h{}/ln_2/g"),
]
# Stored as (out, in) here and as (in, out) in the other two.
TRANSPOSED = [
    Name("h.{}.mlp.c_fc.weight", "transformer.h.{}.mlp.c_fc.weight", "h{}/mlp/c_fc/w"),
    Name("h.{}.mlp.c_proj.weight", "transformer.h.{}.mlp.c_proj.weight", "h{}/mlp/c_proj/w"),
]
ATTENTION_OUT = Name("h.{}.attn.c_proj.weight", "transformer.h.{}.attn.c_proj.weight", "h{}/attn/c_proj")
PACKED = Name("h.{}.attn.c_attn.weight", "transformer.h.{}.attn.c_attn.weight", "h{}/attn/{q,k,v}_proj")
BIASES = [
    "h.{}.attn.c_attn.bias",
    "h.{}.attn.c_proj.bias",
    "h.{}.mlp.c_fc.bias",
    "h.{}.mlp.c_proj.bias",
]


def expand(template: str, n_layer: int) -> list[str]:
    """The names a template stands for: one per block, or itself."""
    return [template.replace("{}", str(layer)) for layer in range(n_layer)] if "{}" in template else [template]


def check_keys(expected: Iterable[str], found: Iterable[str], where: str) -> None:
    """Raise unless both sides name the same parameters.

    Raises:
        ValueError: Lists what is missing (-) and what is unexpected (+).
    """
    expected, found = set(expected), set(found)
    if expected == found:
        return
    natural = lambda key: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", key)]  # noqa: E731
    lines = [f"- {key}" for key in sorted(expected - found, key=natural)]
    lines += [f"+ {key}" for key in sorted(found - expected, key=natural)]
    raise ValueError(f"{where}: parameters missing (-) or unexpected (+):\n" + "\n".join(lines))
