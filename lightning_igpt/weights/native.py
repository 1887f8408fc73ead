"""One .safetensors file under this package's own parameter names, with the config in its header."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.weights.files import Ingredient, TensorFile, assemble, check_head
from lightning_igpt.weights.names import check_keys, rows
from lightning_igpt.weights.sealed import SafetensorsFile, save_sealed

log = logging.getLogger(__name__)

HEADER = "lightning_igpt"  # the key of the file's metadata
COLORS = "palette_colors"
HEAD = "head.weight"


def load_file(path: Path) -> tuple[ImageGPT, Palette, Tensor | None, dict[str, Any]]:
    """(network, palette, class head, header) of a file that save_file wrote.

    Raises:
        ValueError: The file is damaged, or another program wrote it.
    """
    file = SafetensorsFile(path)
    try:
        header = json.loads(file.metadata[HEADER])
        config, sha256 = ImageGPTConfig.resolve(header["network"]), header["palette_sha256"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} was not written by lightning-igpt convert (its header has no valid {HEADER!r}); "
            "a file by transformers is loaded by the name of its folder, which holds config.json too"
        ) from error
    check_keys({COLORS}, file.names & {COLORS}, str(path))
    network = read_network(config, file, str(path), prefix="")
    palette = check_palette(file.read([COLORS])[COLORS], config, sha256, str(path))
    head = check_head(file.read([HEAD])[HEAD], config.n_embd, str(path)) if HEAD in file.names else None
    return network, palette, head, header


def save_file(
    path: Path,
    network: ImageGPT,
    palette: Palette,
    head: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    card: dict[str, Any] | None = None,
) -> None:
    """Write network, palette and class head, float32."""
    header: dict[str, Any] = {"network": network.config.to_dict(), "palette_sha256": palette.sha256, "card": card or {}}
    tensors = {name: value.detach().cpu().float().contiguous() for name, value in network.state_dict().items()}
    tensors[COLORS] = palette.colors
    if head is not None:
        tensors[HEAD] = head.detach().cpu().float().contiguous()
        header["class_names"] = None if class_names is None else list(class_names)
    save_sealed(path, tensors, {HEADER: json.dumps(header)})


def read_network(config: ImageGPTConfig, file: TensorFile, where: str, *, prefix: str) -> ImageGPT:
    """A network from parameters under our own names, each with ``prefix`` before it; other names are left alone."""
    names = [row.ours for row in rows(config)]
    found = {name.removeprefix(prefix) for name in file.names if name.startswith(prefix)} - {COLORS, HEAD}
    check_keys(names, found, where)
    return assemble(config, {name: Ingredient((prefix + name,), lambda value: value) for name in names}, file)


def check_palette(colors: Any, config: ImageGPTConfig, sha256: str, where: str) -> Palette:
    """The palette of these colours, if it is the one that the network was trained with.

    Raises:
        ValueError: The number of colours or the hash is another.
    """
    try:
        palette = Palette(colors if isinstance(colors, Tensor) else torch.empty(0))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} is damaged: its palette cannot be used: {error}") from error
    if palette.sha256 != sha256 or len(palette) != config.vocab_size:
        raise ValueError(
            f"{where} is damaged: it holds {len(palette)} colours with the hash {palette.sha256[:12]}, but was written "
            f"with {config.vocab_size} colours and the hash {str(sha256)[:12]}"
        )
    return palette


def palette_for(vocab_size: int, palette: Palette | None, source: str) -> Palette:
    """The palette of weights in another program's files: the one found or given, else OpenAI's.

    No other palette was published with weights. What transformers' ``model.save_pretrained`` writes holds none.

    Raises:
        ValueError: The network has another number of colors than the palette.
    """
    colors = palette or Palette.load("openai")
    if len(colors) != vocab_size:
        raise ValueError(
            f"{source} has a network of {vocab_size} colors but "
            + (f"a palette of {len(colors)} (sha256 {colors.sha256[:12]})" if palette else "no palette")
            + "; name the palette that it was trained with: load_pretrained(source, palette=...) or --palette"
        )
    if palette is None:
        log.warning("%s has no palette; assuming OpenAI's, which also has 512 colors (if not, set palette=)", source)
    return colors
