"""OpenAI's TensorFlow checkpoints of Image GPT (github.com/openai/image-gpt), autoregressive and BERT."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.weights.native import Name, Pretrained, Source, assemble, check_keys, palette_for, rows

PREFIX = "model/"


def load_checkpoint(path: Path, palette: Palette | None = None) -> Pretrained:
    """A network from ``path.index`` and ``path.data-*``, which hold no palette, and the given palette or OpenAI's."""
    try:
        import tensorflow as tf
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('this needs TensorFlow: pip install ".[openai]"') from error
    prefix = str(path)
    reader = tf.train.load_checkpoint(prefix)
    shapes = {
        name.removeprefix(PREFIX): tuple(shape)
        for name, shape in reader.get_variable_to_shape_map().items()
        if name.startswith(PREFIX) and "adam" not in name.lower() and not name.endswith("_step")  # no slots
    }
    network = from_variables(shapes, lambda name: torch.from_numpy(np.array(reader.get_tensor(PREFIX + name))), prefix)
    colors = palette_for(network.config, palette, prefix)
    return Pretrained(network, colors, f"OpenAI checkpoint {prefix}", path=path)


def from_variables(shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], where: str) -> ImageGPT:
    """A network from OpenAI's variables, named without the prefix ``model/``; their shapes say its config."""
    config = _config_of(shapes, where)
    check_keys({name for row in rows(config) for name in row.openai}, shapes, where)
    return assemble(config, {row.ours: _source(row, config.n_embd) for row in rows(config)}, read, where)


def _config_of(shapes: Mapping[str, tuple[int, ...]], where: str) -> ImageGPTConfig:
    needed = {"wtet": 2, "wpe": 2, "h0/attn/q_proj": 3, "h0/mlp/c_fc/w": 2}
    wrong = [name for name, ndim in needed.items() if len(shapes.get(name, ())) != ndim]
    if wrong:
        raise ValueError(f"{where} is no Image GPT checkpoint: it lacks {wrong} among {sorted(shapes)[:8]} ...")
    vocab_size, n_embd = shapes["wtet"]
    inner = shapes["h0/mlp/c_fc/w"][1]
    return ImageGPTConfig(
        n_layer=len({name.split("/")[0] for name in shapes if name.startswith("h") and "/attn/" in name}),
        n_head=shapes["h0/attn/q_proj"][0],
        n_embd=n_embd,
        vocab_size=vocab_size,
        image_size=round(shapes["wpe"][0] ** 0.5),
        n_inner=None if inner == 4 * n_embd else inner,
        objective="autoregressive" if "sos" in shapes else "bert",
    )


def _source(row: Name, width: int) -> Source:
    def convert(*values: Tensor) -> Tensor:
        squares = [value.reshape(width, width) if "/attn/" in row.openai[0] else value for value in values]
        stacked = torch.cat(squares) if len(squares) > 1 else squares[0]
        return stacked.T if row.openai_transposed else stacked

    return Source(row.openai, convert)
