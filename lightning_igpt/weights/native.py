"""Networks from tensors under this package's names, and the ``.safetensors`` file of them with the config inside."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.images import BILINEAR, Filter
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.weights.card import ModelCard
from lightning_igpt.weights.safety import read_safetensors, save_safetensors

log = logging.getLogger(__name__)

HEADER = "lightning_igpt"  # the key of the file's metadata
COLORS, HEAD = "palette_colors", "head.weight"
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


# transformers keeps ``sos`` as the last row of ``wte``. OpenAI's files hold q, k and v separately, with the shape
# (heads, head width, in), and c_proj with (heads, head width, out): squares of equal size with opposite roles, so the
# first kind is used as it lies and the second is transposed.
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


@dataclass(frozen=True)
class Pretrained:
    """A network with the palette whose colors its tokens are.

    Attributes:
        network: The network, on the CPU, in float32.
        palette: Its palette.
        origin: Where both came from, in words.
        head: Weight of a fine-tuned network's class head, float32 (C, D), which reads the mean over positions of
            ``network.hidden``; None where there is none.
        class_names: Names of its classes, where they are known.
        card: What is known of the training.
        path: The file or folder that was read; None for what came from the hub.
    """

    network: ImageGPT
    palette: Palette
    origin: str
    head: Tensor | None = None
    class_names: list[str] | None = None
    card: ModelCard = field(default_factory=ModelCard)
    path: Path | None = None

    @property
    def config(self) -> ImageGPTConfig:
        """The network's shape."""
        return self.network.config

    @property
    def resize_filter(self) -> Filter:
        """The filter that makes images small for this network: the recorded one, else bilinear."""
        return self.card.resize or BILINEAR

    @property
    def lineage(self) -> str:
        """Where the weights came from and what those were trained from, without the folders that files lie in."""
        words, card = self.origin if self.path is None else self.path.absolute().name, self.card
        facts = [] if card.steps is None else [f"{card.steps:,} step{'' if card.steps == 1 else 's'}"]
        facts += [] if card.data is None else [f"on {card.data}"]
        words += f" ({' '.join(facts)})" if facts else ""
        return words + (f", trained from {card.origin}" if card.origin else "")

    def adapted(self, config: ImageGPTConfig) -> Pretrained:
        """The same parameters in a network of another ``image_size`` or ``dropout``, and ``origin`` saying so."""
        if config == self.config:
            return self
        origin, card, old, new = self.origin, self.card, self.config.image_size, config.image_size
        if new != old:
            origin += f", positions interpolated from {old} x {old} to {new} x {new}"
            card = replace(card, nats_per_pixel=None, accuracy=None, measured_at=None)  # of the old size
        state = self.network.state_dict()
        state["wpe.weight"] = interpolate_positions(state["wpe.weight"], new, config.tokens_per_pixel)
        with torch.device("meta"):
            network = ImageGPT(config)
        network.load_state_dict(state, assign=True)
        return replace(self, network=network.requires_grad_(True), origin=origin, card=card)


class Source(NamedTuple):
    """What one parameter is made of: tensors of a file, and the function that converts them."""

    names: tuple[str, ...]
    convert: Callable[..., Tensor] = lambda value: value


def assemble(
    config: ImageGPTConfig, sources: Mapping[str, Source], read: Callable[[str], Tensor], where: str
) -> ImageGPT:
    """A network in float32 from the tensors that ``read`` gives, checked and copied one parameter at a time."""
    with torch.device("meta"):
        network = ImageGPT(config)
    state = {}
    for name, value in network.state_dict().items():
        names, convert = sources[name]
        state[name] = _converted([read(one) for one in names], convert, value.shape, f"{where}: {' + '.join(names)}")
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(True)


def read_network(config: ImageGPTConfig, state: Mapping[str, Tensor], where: str, *, prefix: str = "") -> ImageGPT:
    """A network from parameters under our own names, each with ``prefix`` before it; other names are left alone."""
    sources = {row.ours: Source((prefix + row.ours,)) for row in rows(config)}
    existing = {name.removeprefix(prefix) for name in state if name.startswith(prefix)} - {COLORS, HEAD}
    check_keys(sources, existing, where)
    return assemble(config, sources, state.__getitem__, where)


def load_file(path: Path) -> Pretrained:
    """What save_file wrote; ValueError where the file is damaged or another program's."""
    state, metadata = read_safetensors(path)
    try:
        header = json.loads(metadata[HEADER])
        config, sha256 = ImageGPTConfig.resolve(header["network"]), header["palette_sha256"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} was not written by convert; for transformers' files, name the folder") from error
    network = read_network(config, state, str(path))
    palette = check_palette(state.get(COLORS), config, sha256, str(path))
    head, names = None, header.get("class_names")
    if HEAD in state:
        head = check_head(state[HEAD], config.n_embd, str(path))
        names = None if names is None else labels(head, names)
    return Pretrained(network, palette, f"file {path}", head, names, ModelCard.read(header.get("card")), path)


def save_file(
    path: Path,
    network: ImageGPT,
    palette: Palette,
    head: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    card: dict[str, Any] | None = None,
) -> None:
    """Write network, palette and class head; the weights keep their dtype."""
    header: dict[str, Any] = {"network": network.config.to_dict(), "palette_sha256": palette.sha256, "card": card or {}}
    tensors = network.state_dict() | {COLORS: palette.colors}
    if head is not None:
        tensors[HEAD] = head
        header["class_names"] = None if class_names is None else list(class_names)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_safetensors(path, tensors, {HEADER: json.dumps(header)})


def check_palette(colors: Tensor | None, config: ImageGPTConfig, sha256: Any, where: str) -> Palette:
    """The palette of these colors; ValueError unless it is the one that the network was trained with."""
    shape, expected = None if colors is None else tuple(colors.shape), (config.vocab_size, 3 // config.tokens_per_pixel)
    if colors is None or shape != expected:
        raise ValueError(f"{where} is damaged: its palette has the shape {shape}; the network's needs {expected}")
    palette = Palette(colors)
    if palette.sha256 != sha256:
        hashes = f"its colors have the hash {palette.sha256[:12]}, but were written with {str(sha256)[:12]}"
        raise ValueError(f"{where} is damaged: {hashes}")
    return palette


def palette_for(config: ImageGPTConfig, palette: Palette | None, source: str) -> Palette:
    """The palette of weights in another program's files: theirs or the one given, else OpenAI's, if that fits."""
    colors, vocab_size = palette or Palette.load("openai"), config.vocab_size
    if palette is None and config.tokens_per_pixel == 3:
        return Palette.load("rgb")
    check_tokens_per_pixel(colors, config)
    if len(colors) != vocab_size:
        what = f"a palette of {len(colors)} (sha256 {colors.sha256[:12]})" if palette else "no palette"
        cure = "name the palette that it was trained with: load_pretrained(source, palette=...) or --palette"
        raise ValueError(f"{source} has a network of {vocab_size} colors but {what}; {cure}")
    if palette is None:
        log.warning("%s has no palette; assuming OpenAI's, which also has 512 colors (if not, set palette=)", source)
    return colors


def check_tokens_per_pixel(palette: Palette, config: ImageGPTConfig) -> None:
    """ValueError where a pixel is one token of the palette and three of the network, or the other way round."""
    mine, theirs = palette.tokens_per_pixel, config.tokens_per_pixel
    if mine != theirs:
        text = f"a pixel has {mine} token{'s' * (mine > 1)} of the palette but {theirs} of the network"
        cure = f"take another palette, or set the network's tokens_per_pixel to {mine} and vocab_size to {len(palette)}"
        raise ValueError(f"{text}; {cure}")


def check_head(head: Any, n_embd: int, where: str) -> Tensor:
    """A class head as float32 (C, D), copied; ValueError where its shape, type or values cannot be."""
    if not isinstance(head, Tensor) or head.ndim != 2 or head.shape[1] != n_embd or not len(head):
        shape = tuple(head.shape) if isinstance(head, Tensor) else type(head).__name__
        raise ValueError(f"{where}: the class head is {shape}; it must be a tensor (classes, {n_embd})")
    return _converted([head.detach().cpu()], lambda value: value, head.shape, f"{where}: the class head")


def labels(head: Tensor, names: Sequence[str] | None) -> list[str]:
    """Names of a head's classes: those given, of which no two may be the same, or as transformers calls them."""
    if names is None:
        return [f"LABEL_{number}" for number in range(len(head))]
    texts = [str(name) for name in names]
    if len(texts) != len(head) or len(set(texts)) != len(texts):
        raise ValueError(f"class_names has {len(set(texts))} different names, the head {len(head)} classes")
    return texts


def interpolate_positions(table: Tensor, image_size: int, tokens_per_pixel: int = 1) -> Tensor:
    """Stretch or shrink a table of positions in two dimensions, bicubic, averaging where it shrinks.

    Row t of the table (S * S, D) belongs to the pixel that is predicted at t, in raster order, so the table is an image
    of D channels, and with n tokens per pixel one of n D channels. The result is (n * image_size * image_size, D), the
    table itself where the size stays.
    """
    side, width = round((len(table) / tokens_per_pixel) ** 0.5), table.shape[1]
    if side == image_size:
        return table
    grid = table.reshape(side * side, -1).T.reshape(1, -1, side, side)  # (1, n D, S, S)
    grid = F.interpolate(grid, size=(image_size, image_size), mode="bicubic", antialias=image_size < side)
    return grid.flatten(2)[0].T.reshape(-1, width).contiguous()


def _converted(values: list[Tensor], convert: Callable[..., Tensor], shape: torch.Size, where: str) -> Tensor:
    """One parameter in float32, copied; ``where`` is the file and the names in it."""
    shapes = " + ".join(str(tuple(value.shape)) for value in values)
    if not all(value.is_floating_point() for value in values):
        raise ValueError(f"{where} is of type {values[0].dtype}; weights must be floating-point numbers")
    converted: Tensor = convert(*values)
    if converted.shape != shape:
        needed = f"{tuple(shape)} after conversion, not {tuple(converted.shape)}"
        raise ValueError(f"{where} has the shape {shapes}; the network described there needs {needed}")
    copy = converted.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if not torch.linalg.vector_norm(copy, ord=torch.inf).isfinite():  # one pass, no further copy
        what = f"{int((~copy.isfinite()).sum())} of {copy.numel()} values are not finite"
        raise ValueError(f"{where}: {what}; the training diverged, or the file is damaged")
    return copy
