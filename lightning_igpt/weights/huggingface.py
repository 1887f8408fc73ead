"""To and from the folder layout of transformers' ImageGPT: config.json, model.safetensors, preprocessor_config.json.

Differences between the two state dicts: transformers keeps ``sos`` as the last row of ``wte``, stores projections as
(in, out), and always has biases, which are zero in the published networks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import NORM_EPS, ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.weights.names import ATTENTION_OUT, BIASES, PACKED, PLAIN, TRANSPOSED, check_keys, expand

MARKER = "lightning_igpt"  # the key of config.json that holds what transformers has no word for
SWITCHES = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")


def read_config(config: Mapping[str, Any], *, bias: bool) -> ImageGPTConfig:
    """Our config from the values of transformers' config.json.

    Raises:
        ValueError: The file describes another model, or a variant of the network that this package does not compute.
    """
    if config.get("model_type") != "imagegpt":
        raise ValueError(f"config.json is of model_type {config.get('model_type')!r}, not 'imagegpt'")
    for switch in SWITCHES:
        if config.get(switch):
            raise ValueError(f"config.json sets {switch}; no published Image GPT does, and it is not supported")
    if config.get("activation_function", "quick_gelu") != "quick_gelu" or not config.get("scale_attn_weights", True):
        raise ValueError("config.json changes activation_function or scale_attn_weights from the published network's")
    if config.get("layer_norm_epsilon", NORM_EPS) != NORM_EPS:
        raise ValueError(f"config.json has layer_norm_epsilon {config['layer_norm_epsilon']}; here it is {NORM_EPS}")
    n_positions = config.get("n_positions", 1024)
    image_size = round(n_positions**0.5)
    if image_size**2 != n_positions:
        raise ValueError(f"config.json has n_positions {n_positions}, which is no square image")
    return ImageGPTConfig(
        n_layer=config.get("n_layer", 24),
        n_head=config.get("n_head", 8),
        n_embd=config.get("n_embd", 512),
        vocab_size=config.get("vocab_size", 513) - 1,
        image_size=image_size,
        n_inner=config.get("n_inner"),
        objective=config.get(MARKER, {}).get("objective", "autoregressive"),
        bias=bias,
    )


def from_state_dict(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> ImageGPT:
    """A network from transformers' state dict and config; biases that are all zero are left out."""
    state = {key: value for key, value in state.items() if not key.endswith((".attn.bias", ".attn.masked_bias"))}
    biased = any(value.any() for key, value in state.items() if key.endswith(".bias"))
    ours = read_config(config, bias=bool(biased))
    check_keys(_their_names(ours.n_layer), state, "Hugging Face weights")
    wte = state["transformer.wte.weight"]  # (K + 1, D)
    mine = {"wte.weight": wte[:-1]}
    if ours.objective == "autoregressive":
        mine["sos"] = wte[-1]
    for template, transposed in _tensors(with_bias=bool(biased)):
        for layer in range(ours.n_layer if "{}" in template else 1):
            key = template.replace("{}", str(layer))
            value = state[_theirs(key)]
            mine[key] = value.T if transposed else value
    with torch.device("meta"):
        network = ImageGPT(ours)
    network.load_state_dict({key: value.float().contiguous() for key, value in mine.items()}, assign=True)
    return network.requires_grad_(True)


def to_state_dict(network: ImageGPT) -> dict[str, Tensor]:
    """The state dict that transformers' ImageGPTForCausalImageModeling loads."""
    config, state = network.config, network.state_dict()
    sos = network.sos if network.sos is not None else torch.zeros(config.n_embd)
    theirs = {"transformer.wte.weight": torch.cat([state["wte.weight"], sos.detach()[None].to(state["wte.weight"])])}
    for template, transposed in _tensors(with_bias=True):
        for key in expand(template, config.n_layer):
            value = state.get(key)
            if value is None:
                value = torch.zeros_like(state[key.replace(".bias", ".weight")][:, 0])
            theirs[_theirs(key)] = (value.T if transposed else value).contiguous().clone()
    return theirs


def to_config(config: ImageGPTConfig) -> dict[str, Any]:
    """The values of config.json."""
    return {
        "architectures": ["ImageGPTForCausalImageModeling"],
        "model_type": "imagegpt",
        "vocab_size": config.vocab_size + 1,
        "n_positions": config.n_positions,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.n_inner,
        "activation_function": "quick_gelu",
        "layer_norm_epsilon": NORM_EPS,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "tie_word_embeddings": False,
        MARKER: {"objective": config.objective},
    }


def to_processor(palette: Palette, image_size: int) -> dict[str, Any]:
    """The values of preprocessor_config.json."""
    return {
        "image_processor_type": "ImageGPTImageProcessor",
        "clusters": palette.to_list(),
        "do_color_quantize": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 2,
        "size": {"height": image_size, "width": image_size},
    }


def load_folder(folder: Path) -> tuple[ImageGPT, Palette]:
    """Network and palette from a folder in the layout of transformers.

    Raises:
        FileNotFoundError: A file is missing; the message says which.
        ValueError: The files disagree with each other or describe another network.
    """
    config = json.loads(_need(folder, "config.json").read_text())
    if (folder / "model.safetensors").exists():
        state = safetensors.torch.load_file(folder / "model.safetensors")
    else:
        path = _need(folder, "pytorch_model.bin", "model.safetensors or pytorch_model.bin")
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    network = from_state_dict(state, config)
    palette = Palette.load(str(_need(folder, "preprocessor_config.json")))
    if len(palette) != network.config.vocab_size:
        raise ValueError(
            f"{folder}: preprocessor_config.json has {len(palette)} colours, config.json {network.config.vocab_size}"
        )
    return network, palette


def save_folder(folder: Path, network: ImageGPT, palette: Palette) -> None:
    """Write a folder that transformers' ImageGPT classes load as it is."""
    if len(palette) != network.config.vocab_size:
        raise ValueError(f"the palette has {len(palette)} colours, the network {network.config.vocab_size}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_config(network.config), indent=2) + "\n")
    processor = to_processor(palette, network.config.image_size)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    state = {key: value.cpu() for key, value in to_state_dict(network).items()}
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def _need(folder: Path, name: str, wording: str = "") -> Path:
    if not (folder / name).exists():
        raise FileNotFoundError(f"{folder} has no {wording or name}")
    return folder / name


def _tensors(*, with_bias: bool) -> list[tuple[str, bool]]:
    """(our name template, stored transposed by transformers?) of all but the token embedding."""
    rows = [(name.ours, False) for name in PLAIN]
    rows += [(name.ours, True) for name in [*TRANSPOSED, ATTENTION_OUT, PACKED]]
    return rows + ([(bias, False) for bias in BIASES] if with_bias else [])


def _theirs(key: str) -> str:
    return key if key.startswith("lm_head") else f"transformer.{key}"


def _their_names(n_layer: int) -> list[str]:
    names = ["transformer.wte.weight"]
    for template, _ in _tensors(with_bias=True):
        names += [_theirs(key) for key in expand(template, n_layer)]
    return names
