"""One table of parameter names, read in both directions, between this package, transformers and OpenAI's TF files.

Two formats differ from ours in more than names. transformers keeps ``sos`` as the last row of ``wte``. OpenAI's files
hold q, k and v separately, with the shape (heads, head width, in), and c_proj with (heads, head width, out): squares of
equal size with opposite roles, so the first kind is used as it lies and the second is transposed.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby, product
from typing import NamedTuple

from lightning_igpt.config import ImageGPTConfig

MAX_LINES = 30  # of a message; a file may hold any number of names


class Name(NamedTuple):
    """One parameter in each format; ``{}`` stands for the block's number."""

    ours: str
    openai: tuple[str, ...]  # without the prefix "model/"; several are stacked; none where the format has no such thing
    huggingface_transposed: bool = False
    openai_transposed: bool = False

    @property
    def huggingface(self) -> str:
        """The name in transformers."""
        return self.ours if self.ours == "lm_head.weight" else f"transformer.{self.ours.replace('sos', 'wte.weight')}"


TABLE = (
    Name("wte.weight", ("wte",)),
    Name("sos", ("sos",)),
    Name("wpe.weight", ("wpe",)),
    Name("h.{}.ln_1.weight", ("h{}/ln_1/g",)),
    Name("h.{}.attn.c_attn.weight", ("h{}/attn/q_proj", "h{}/attn/k_proj", "h{}/attn/v_proj"), True),
    Name("h.{}.attn.c_attn.bias", ()),
    Name("h.{}.attn.c_proj.weight", ("h{}/attn/c_proj",), True, True),
    Name("h.{}.attn.c_proj.bias", ()),
    Name("h.{}.ln_2.weight", ("h{}/ln_2/g",)),
    Name("h.{}.mlp.c_fc.weight", ("h{}/mlp/c_fc/w",), True, True),
    Name("h.{}.mlp.c_fc.bias", ()),
    Name("h.{}.mlp.c_proj.weight", ("h{}/mlp/c_proj/w",), True, True),
    Name("h.{}.mlp.c_proj.bias", ()),
    Name("ln_f.weight", ("ln_f/g",)),
    Name("lm_head.weight", ("wtet",)),
)


def rows(config: ImageGPTConfig) -> Iterator[Name]:
    """The table for one network: every block's parameters by their full names, those that it lacks left out."""
    lacks = {row.ours for row in TABLE if row.ours.endswith(".bias") and not config.bias}
    lacks |= {"sos"} if config.objective == "bert" else set()
    for in_blocks, group in groupby(TABLE, lambda row: "{}" in row.ours):
        present = [row for row in group if row.ours not in lacks]
        for layer, row in product(map(str, range(config.n_layer if in_blocks else 1)), present):
            names = tuple(name.replace("{}", layer) for name in row.openai)
            yield row._replace(ours=row.ours.replace("{}", layer), openai=names)


def check_keys(expected: Iterable[str], existing: Iterable[str], where: str) -> None:
    """Raise a ValueError that lists what is missing (-) and unexpected (+), unless both are the same."""
    missing, unexpected = set(expected) - set(existing), set(existing) - set(expected)
    lines = [f"- {key}"[:200] for key in sorted(missing)] + [f"+ {key}"[:200] for key in sorted(unexpected)]
    if lines:
        more = [f"... and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
        listed = "\n".join([*lines[:MAX_LINES], *more])
        raise ValueError(f"{where}: parameters missing (-) or unexpected (+):\n{listed}")
