"""One table of parameter names, read in both directions, between this package, transformers and OpenAI's TF files.

Two formats differ from ours in more than names. transformers keeps ``sos`` as the last row of ``wte``. OpenAI's files
hold q, k and v separately, with the shape (heads, head width, in), and c_proj with (heads, head width, out): squares of
equal size with opposite roles, so the first kind is used as it lies and the second is transposed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lightning_igpt.config import ImageGPTConfig

MAX_LINES = 30  # of a message; a file may hold any number of names


class Name(NamedTuple):
    """One parameter in each format; ``{}`` stands for the block's number."""

    ours: str
    huggingface: str
    huggingface_transposed: bool
    openai: tuple[str, ...]  # without the prefix "model/"; several are stacked; none where the format has no such thing
    openai_transposed: bool = False


TABLE = (
    Name("wte.weight", "transformer.wte.weight", False, ("wte",)),
    Name("sos", "transformer.wte.weight", False, ("sos",)),
    Name("wpe.weight", "transformer.wpe.weight", False, ("wpe",)),
    Name("h.{}.ln_1.weight", "transformer.h.{}.ln_1.weight", False, ("h{}/ln_1/g",)),
    Name(
        "h.{}.attn.c_attn.weight",
        "transformer.h.{}.attn.c_attn.weight",
        True,
        ("h{}/attn/q_proj", "h{}/attn/k_proj", "h{}/attn/v_proj"),
    ),
    Name("h.{}.attn.c_attn.bias", "transformer.h.{}.attn.c_attn.bias", False, ()),
    Name("h.{}.attn.c_proj.weight", "transformer.h.{}.attn.c_proj.weight", True, ("h{}/attn/c_proj",), True),
    Name("h.{}.attn.c_proj.bias", "transformer.h.{}.attn.c_proj.bias", False, ()),
    Name("h.{}.ln_2.weight", "transformer.h.{}.ln_2.weight", False, ("h{}/ln_2/g",)),
    Name("h.{}.mlp.c_fc.weight", "transformer.h.{}.mlp.c_fc.weight", True, ("h{}/mlp/c_fc/w",), True),
    Name("h.{}.mlp.c_fc.bias", "transformer.h.{}.mlp.c_fc.bias", False, ()),
    Name("h.{}.mlp.c_proj.weight", "transformer.h.{}.mlp.c_proj.weight", True, ("h{}/mlp/c_proj/w",), True),
    Name("h.{}.mlp.c_proj.bias", "transformer.h.{}.mlp.c_proj.bias", False, ()),
    Name("ln_f.weight", "transformer.ln_f.weight", False, ("ln_f/g",)),
    Name("lm_head.weight", "lm_head.weight", False, ("wtet",)),
)


def rows(config: ImageGPTConfig) -> Iterator[Name]:
    """The table for one network: every block's parameters by their full names, those that it lacks left out."""
    blocks = [name for name in TABLE if "{}" in name.ours and (config.bias or not name.ours.endswith(".bias"))]
    first = next(index for index, name in enumerate(TABLE) if "{}" in name.ours)
    outside = [name for name in TABLE if "{}" not in name.ours and (config.objective != "bert" or name.ours != "sos")]
    yield from (name for name in outside if TABLE.index(name) < first)
    for layer in range(config.n_layer):
        yield from (_numbered(name, layer) for name in blocks)
    yield from (name for name in outside if TABLE.index(name) > first)


def check_keys(expected: Iterable[str], found: Iterable[str], where: str, hint: str = "") -> None:
    """Raise unless both sides name the same parameters.

    Raises:
        ValueError: Lists what is missing (-) and what is unexpected (+), then the hint.
    """
    expected, found = set(expected), set(found)
    if expected == found:
        return
    natural = lambda key: [part.zfill(9) if part.isdecimal() else part for part in re.split(r"(\d+)", key)]  # noqa: E731
    lines = [f"- {key}" for key in sorted(expected - found, key=natural)]
    lines += [f"+ {key}" for key in sorted(found - expected, key=natural)]
    more = [f"... and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
    listed = "\n".join([*(line[:200] for line in lines[:MAX_LINES]), *more])
    raise ValueError(f"{where}: parameters missing (-) or unexpected (+):\n{listed}{hint}")


def _numbered(name: Name, layer: int) -> Name:
    number = str(layer)
    return name._replace(
        ours=name.ours.replace("{}", number),
        huggingface=name.huggingface.replace("{}", number),
        openai=tuple(one.replace("{}", number) for one in name.openai),
    )
