"""OpenAI's checkpoints of Image GPT (github.com/openai/image-gpt), autoregressive and BERT.

Published as TensorFlow checkpoints; also, since TensorFlow is large, as an .npz file of the same variables by the same
names, with the palette beside them, which ``lightning-igpt convert`` writes and NumPy reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.weights.files import Ingredient, NumpyFile, TensorFile, assemble, replacing
from lightning_igpt.weights.names import Name, check_keys, rows
from lightning_igpt.weights.native import palette_for

PREFIX = "model/"
CENTERS = "kmeans_centers"  # what OpenAI calls its palette's file


class TensorFlowFile:
    """The files ``prefix.index`` and ``prefix.data-*``; optimizer slots and counters are skipped.

    Raises:
        ModuleNotFoundError: TensorFlow is not installed.
        ValueError: The files are damaged, or shards are missing.
    """

    def __init__(self, prefix: str) -> None:
        try:
            import tensorflow as tf
        except ModuleNotFoundError as error:
            message = 'reading a TensorFlow checkpoint needs TensorFlow: pip install "lightning-igpt[openai]"'
            raise ModuleNotFoundError(message) from error
        self.where = prefix
        try:
            self._reader = tf.train.load_checkpoint(prefix)
            self.shapes = {
                name.removeprefix(PREFIX): tuple(shape)
                for name, shape in self._reader.get_variable_to_shape_map().items()
                if name.startswith(PREFIX) and not _is_slot(name)
            }
        except Exception as error:
            raise ValueError(f"{prefix} cannot be opened as a TensorFlow checkpoint: {error}") from error
        self.names = set(self.shapes)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As TensorFile.read."""
        try:
            return {name: torch.from_numpy(np.array(self._reader.get_tensor(PREFIX + name))) for name in names}
        except Exception as error:
            raise ValueError(f"{self.where} is damaged, or one of its data files is missing: {error}") from error


class ArchiveFile(NumpyFile):
    """An .npz file of the same variables; its palette is no variable."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.shapes = {name.removeprefix(PREFIX): of for name, of in self.shapes.items() if name.startswith(PREFIX)}
        self.names = set(self.shapes)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """As TensorFile.read."""
        return {
            name.removeprefix(PREFIX): value for name, value in super().read(PREFIX + name for name in names).items()
        }


def is_checkpoint(prefix: str) -> bool:
    """Whether ``prefix`` names a TensorFlow checkpoint, as in ``model.ckpt-1000000``."""
    return Path(f"{prefix}.index").exists()


def load_checkpoint(prefix: str, palette: Palette | None = None) -> tuple[ImageGPT, Palette]:
    """A network from a TensorFlow checkpoint, which holds no palette, and the given palette or OpenAI's."""
    file = TensorFlowFile(prefix)
    network = from_file(file, read_config(file.shapes, file.names, prefix))
    return network, palette_for(network.config.vocab_size, palette, prefix)


def load_archive(path: Path, palette: Palette | None = None) -> tuple[ImageGPT, Palette]:
    """Network and palette from an .npz file that save_archive wrote; without a palette, the given one or OpenAI's."""
    file, colors = ArchiveFile(path), NumpyFile(path)
    network = from_file(file, read_config(file.shapes, file.names, str(path)))
    if CENTERS in colors.names:
        palette = Palette(colors.read([CENTERS])[CENTERS])
    return network, palette_for(network.config.vocab_size, palette, str(path))


def save_archive(path: Path, network: ImageGPT, palette: Palette) -> None:
    """Write OpenAI's variables, float32, and the palette, as an .npz file.

    Raises:
        ValueError: The network has biases, for which OpenAI's files have no place.
    """
    if network.config.bias:
        raise ValueError("OpenAI's files have no place for biases, and this network has some; convert it --to hf")
    arrays: dict[str, NDArray[Any]] = {CENTERS: palette.colors.numpy()}
    state, heads = network.state_dict(), network.config.n_head
    for row in rows(network.config):
        value = state[row.ours].cpu().float()
        value = value.T if row.openai_transposed else value
        for name, part in zip(row.openai, value.chunk(len(row.openai)), strict=True):
            array = part.contiguous().numpy()
            is_attention = "/attn/" in name
            arrays[PREFIX + name] = array.reshape(heads, -1, network.config.n_embd) if is_attention else array
    with replacing(path) as temporary:
        np.savez(temporary, **arrays)  # type: ignore[arg-type]


def read_config(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str], where: str) -> ImageGPTConfig:
    """The network's shape, read off the variables' shapes; heads come from q_proj.

    Raises:
        ValueError: The variables are not those of an Image GPT.
    """
    names = set(names)
    needed = {"wtet": 2, "wpe": 2, "h0/attn/q_proj": 3, "h0/mlp/c_fc/w": 2}
    wrong = [name for name, ndim in needed.items() if len(shapes.get(name, ())) != ndim]
    if wrong:
        raise ValueError(f"{where} is no Image GPT checkpoint: it lacks {wrong} among {sorted(names)[:8]} ...")
    vocab_size, n_embd = shapes["wtet"]
    inner = shapes["h0/mlp/c_fc/w"][1]
    return ImageGPTConfig(
        n_layer=len({name.split("/")[0] for name in names if name.startswith("h") and "/attn/" in name}),
        n_head=shapes["h0/attn/q_proj"][0],
        n_embd=n_embd,
        vocab_size=vocab_size,
        image_size=round(shapes["wpe"][0] ** 0.5),
        n_inner=None if inner == 4 * n_embd else inner,
        objective="autoregressive" if "sos" in names else "bert",
    )


def from_file(file: TensorFile, config: ImageGPTConfig) -> ImageGPT:
    """A network from OpenAI's variables, named without the prefix ``model/``.

    Raises:
        ValueError: Variables are missing, unexpected, or of the wrong shape.
    """
    check_keys({name for row in rows(config) for name in row.openai}, file.names, file.where)
    return assemble(config, {row.ours: _ingredient(row, config.n_embd) for row in rows(config)}, file)


def _ingredient(row: Name, width: int) -> Ingredient:
    def convert(*values: Tensor) -> Tensor:
        squares = [value.reshape(width, width) if "/attn/" in row.openai[0] else value for value in values]
        stacked = torch.cat(squares) if len(squares) > 1 else squares[0]
        return stacked.T if row.openai_transposed else stacked

    return Ingredient(row.openai, convert)


def _is_slot(name: str) -> bool:
    return "adam" in name.lower() or name.endswith("_step")
