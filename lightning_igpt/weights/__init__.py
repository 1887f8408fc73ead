"""Weights in and out: load_pretrained reads every format this package knows, save_pretrained writes transformers'."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.weights import checkpoint, huggingface, openai
from lightning_igpt.weights.positions import adapt_network

__all__ = ["Pretrained", "load_pretrained", "save_pretrained"]


@dataclass(frozen=True)
class Pretrained:
    """A network with the palette whose colours its tokens are.

    Attributes:
        network: The network, on the CPU, in float32.
        palette: Its palette.
        origin: Where both came from, in words.
    """

    network: ImageGPT
    palette: Palette
    origin: str

    @property
    def config(self) -> ImageGPTConfig:
        """The network's shape."""
        return self.network.config

    def adapted(self, config: ImageGPTConfig) -> Pretrained:
        """The same weights for another ``image_size`` or ``dropout``, and ``origin`` saying so."""
        if config == self.config:
            return self
        origin, old, new = self.origin, self.config.image_size, config.image_size
        if new != old:
            origin += f", positions interpolated from {old} x {old} to {new} x {new}"
        return replace(self, network=adapt_network(self.network, config), origin=origin)


def load_pretrained(source: str | Path) -> Pretrained:
    """Load a network and its palette.

    Args:
        source: A ``.ckpt`` file of this package's modules; a run folder that holds such files (the newest is taken);
            a folder or hub id in the layout of transformers' ImageGPT; or the prefix of an OpenAI TensorFlow
            checkpoint (its palette is ``openai``).

    Raises:
        FileNotFoundError: There is no such file, folder or hub repository.
        ValueError: What is there is no Image GPT, is damaged, or would have to run code to be opened.
    """
    text, path = str(source), Path(source)
    if re.match(r"[a-z][a-z0-9+.-]+://", text):
        raise ValueError(f"{text}: weights are not fetched from addresses; download the file and name its path")
    if openai.is_checkpoint(text):
        return Pretrained(openai.load_checkpoint(text), Palette.load("openai"), f"OpenAI checkpoint {text}")
    if path.is_file():
        return Pretrained(*checkpoint.load_checkpoint(path), f"checkpoint {path}")
    if path.is_dir():
        return _load_folder(path)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and path.suffix not in (".ckpt", ".pt", ".bin", ".safetensors"):
        return Pretrained(*huggingface.load_folder(_download(text)), f"hub repository {text}")
    raise FileNotFoundError(
        f"{text} does not exist; name a .ckpt file, a run folder, a Hugging Face folder or a hub id"
    )


def save_pretrained(folder: str | Path, network: ImageGPT, palette: Palette) -> None:
    """Write config.json, model.safetensors and preprocessor_config.json as transformers' ImageGPT classes read them.

    Args:
        folder: Where to; made if it does not exist.
        network: The network. One with the BERT objective is written too, and comes back exactly through
            load_pretrained, but transformers cannot run it: it has no mode without the causal mask.
        palette: Its palette.

    Raises:
        ValueError: Palette and network disagree on the number of colours.
    """
    huggingface.save_folder(Path(folder), network, palette)


def _load_folder(folder: Path) -> Pretrained:
    if (folder / "config.json").exists():
        return Pretrained(*huggingface.load_folder(folder), f"Hugging Face folder {folder}")
    found = sorted(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"{folder} holds neither config.json (Hugging Face layout) nor a .ckpt file (a run)")
    return Pretrained(*checkpoint.load_checkpoint(found[-1]), f"checkpoint {found[-1]}, the newest in {folder}")


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = ["config.json", "preprocessor_config.json", "model.safetensors", "pytorch_model.bin"]
    try:
        return Path(snapshot_download(repository, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{repository} is neither a path here nor a hub repository that can be reached: {error}"
        ) from error
