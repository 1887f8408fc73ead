"""To and from the folder layout of transformers' ImageGPT: config.json, weights, preprocessor_config.json.

transformers always has biases, which are zero in the published networks. Its classifier has a class head in place of
the colour head; the colour head then lies beside it in a file of its own, which transformers does not look at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import NORM_EPS, ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.weights.files import (
    Ingredient,
    ShardedFile,
    TensorFile,
    TorchFile,
    assemble,
    check_head,
    read_json,
)
from lightning_igpt.weights.names import Name, check_keys, rows
from lightning_igpt.weights.native import palette_for
from lightning_igpt.weights.sealed import SafetensorsFile, save_sealed

MARKER = "lightning_igpt"  # the key of config.json that holds what transformers has no word for
SWITCHES = ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention")
CONFIG, PROCESSOR, COLOR_HEAD = "config.json", "preprocessor_config.json", "lm_head.safetensors"
SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DOWNLOADS = (CONFIG, PROCESSOR, COLOR_HEAD, SAFE, SAFE_INDEX, "model-*.safetensors", PICKLED, "pytorch_model*.bin*")
HEAD, LM_HEAD = "score.weight", "lm_head.weight"
# The key of the weights' metadata that repeats what the JSON files say of the network and its palette. The weights were
# trained with both, so a file that says another thing is damaged or belongs to other weights. All else in those files
# is the user's to edit: the names of classes, the card, what transformers alone reads.
WRITTEN = "lightning_igpt_network"


class Folder(NamedTuple):
    """What a folder holds; head and class_names are None where there is no class head."""

    network: ImageGPT
    palette: Palette
    head: Tensor | None  # (C, D)
    class_names: list[str] | None
    card: Any


def read_config(config: Mapping[str, Any], *, bias: bool = False) -> ImageGPTConfig:
    """Our config from the values of transformers' config.json.

    Raises:
        ValueError: The file describes another model, or a variant of the network that this package does not compute.
    """
    if config.get("model_type") != "imagegpt":
        raise ValueError(f"config.json is of model_type {config.get('model_type')!r}, not 'imagegpt'")
    for switch in SWITCHES:
        if config.get(switch):
            raise ValueError(f"config.json sets {switch}; no published Image GPT does, and it is not supported")
    for name, published in {"activation_function": "quick_gelu", "scale_attn_weights": True}.items():
        if config.get(name, published) != published:
            raise ValueError(f"config.json has {name} {config[name]!r}; the published network has {published!r}")
    if config.get("layer_norm_epsilon", NORM_EPS) != NORM_EPS:
        raise ValueError(f"config.json has layer_norm_epsilon {config['layer_norm_epsilon']}; here it is {NORM_EPS}")
    sizes = {"n_layer": 24, "n_head": 8, "n_embd": 512, "vocab_size": 513, "n_positions": 1024}
    sizes = {name: config.get(name, default) for name, default in sizes.items()}
    for name, value in [*sizes.items(), ("n_inner", config.get("n_inner") or 1)]:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config.json has {name} {value!r}; it must be a whole number from 1 on")
    n_positions = sizes.pop("n_positions")
    image_size = math.isqrt(n_positions)
    if image_size**2 != n_positions:
        raise ValueError(f"config.json has n_positions {n_positions}, which is no square image")
    sizes["vocab_size"] -= 1  # sos is no colour
    try:
        return ImageGPTConfig(
            **sizes,
            image_size=image_size,
            n_inner=config.get("n_inner"),
            objective=_marker(config).get("objective", "autoregressive"),
            bias=bias,
            dropout=_marker(config).get("dropout", 0.0),  # transformers' own default of 0.1 is not the paper's
        )
    except ValueError as error:
        raise ValueError(f"config.json describes no network: {error}") from error


def from_file(file: TensorFile, config: Mapping[str, Any]) -> ImageGPT:
    """A network from transformers' weights and config; biases that are all zero are left out.

    Raises:
        ValueError: Parameters are missing, unexpected, or of the wrong shape.
    """
    with_biases = read_config(config, bias=True)
    found = {name for name in file.names if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # causal masks
    check_keys({row.huggingface for row in rows(with_biases)}, found, file.where, _hint(found))
    biases = file.read(name for name in found if name.endswith(".bias"))
    biased = any(bool(value.any()) for value in biases.values())
    ours = read_config(config, bias=biased)
    return assemble(ours, {row.ours: _ingredient(row) for row in rows(ours)}, file)


def to_state_dict(network: ImageGPT) -> dict[str, Tensor]:
    """The state dict that transformers' ImageGPTForCausalImageModeling loads, on the CPU."""
    state = {name: value.cpu() for name, value in network.state_dict().items()}
    start = state.get("sos", torch.zeros_like(state["wte.weight"][0]))
    theirs = {"transformer.wte.weight": torch.cat([state["wte.weight"], start[None]])}  # (K + 1, D)
    for row in rows(ImageGPTConfig(**{**network.config.to_dict(), "bias": True})):
        if row.huggingface not in theirs:
            value = state.get(row.ours)
            if value is None:  # a bias that our network does not have
                value = torch.zeros_like(state[row.ours.replace(".bias", ".weight")][:, 0])
            theirs[row.huggingface] = (value.T if row.huggingface_transposed else value).contiguous().clone()
    return theirs


def to_config(
    config: ImageGPTConfig,
    palette: Palette,
    class_names: Sequence[str] | None = None,
    card: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The values of config.json."""
    values: dict[str, Any] = {
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
        MARKER: {
            "objective": config.objective,
            "dropout": config.dropout,
            "palette_sha256": palette.sha256,
            "card": dict(card or {}),
        },
    }
    if class_names is not None:
        values["architectures"] = ["ImageGPTForImageClassification"]
        values["id2label"] = {str(number): name for number, name in enumerate(class_names)}
        values["label2id"] = {name: number for number, name in enumerate(class_names)}
    return values


def to_processor(palette: Palette, image_size: int) -> dict[str, Any]:
    """The values of preprocessor_config.json."""
    return {
        "image_processor_type": "ImageGPTImageProcessor",
        "clusters": palette.to_list(),
        "palette_sha256": palette.sha256,
        "do_color_quantize": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 2,
        "size": {"height": image_size, "width": image_size},
    }


def load_folder(folder: Path, palette: Palette | None = None) -> Folder:
    """What a folder in the layout of transformers holds.

    Args:
        folder: It holds config.json, weights, and mostly preprocessor_config.json with the palette.
        palette: The network's palette, for folders without one.

    Raises:
        FileNotFoundError: A file is missing; the message says which.
        ValueError: A file is damaged, would have to run code, describes another network, or disagrees with another.
    """
    config = read_json(_need(folder, CONFIG))
    if (folder / PROCESSOR).is_file() and "clusters" in read_json(folder / PROCESSOR):
        palette = Palette.load(str(folder / PROCESSOR))
    palette = palette_for(read_config(config).vocab_size, palette, str(folder))
    file = _open_weights(folder)
    _check_palette(folder, config, palette)
    beside = folder / COLOR_HEAD
    color_head = SafetensorsFile(beside) if HEAD in file.names and beside.exists() else None
    for one in (file, color_head):
        _check_written(folder, config, palette, one)
    head = file.read([HEAD])[HEAD] if HEAD in file.names else None
    network = from_file(file if head is None else _WithColorHead(file, color_head), config)
    head = None if head is None else check_head(head, network.config.n_embd, file.where)
    return Folder(network, palette, head, _labels_of(config, head), _marker(config).get("card"))


def save_folder(
    folder: Path,
    network: ImageGPT,
    palette: Palette,
    head: Tensor | None = None,
    class_names: Sequence[str] | None = None,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that transformers' ImageGPT classes load as it is."""
    if len(palette) != network.config.vocab_size:
        raise ValueError(
            f"the palette has {len(palette)} colours (sha256 {palette.sha256[:12]}), the network "
            f"{network.config.vocab_size}; save a network with the palette that it was trained with"
        )
    names = None if head is None else labels(head, class_names)
    texts = {
        CONFIG: json.dumps(to_config(network.config, palette, names, card), indent=2),
        PROCESSOR: json.dumps(to_processor(palette, network.config.image_size), indent=2),
    }
    state, written = to_state_dict(network), {WRITTEN: json.dumps(_facts(network.config, palette))}
    _check_place(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (COLOR_HEAD, SAFE_INDEX, PICKLED, PICKLED_INDEX):  # of another network that was saved here before
        (folder / stale).unlink(missing_ok=True)
    if head is not None:
        save_sealed(folder / COLOR_HEAD, {LM_HEAD: state.pop(LM_HEAD)}, written)
        state[HEAD] = head
    save_sealed(folder / SAFE, state, written)
    for name, text in texts.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")


def labels(head: Tensor, names: Sequence[str] | None) -> list[str]:
    """Names of a head's classes: those given, or as transformers calls them.

    Raises:
        ValueError: There are more or fewer names than classes, or one twice.
    """
    if names is None:
        return [f"LABEL_{number}" for number in range(len(head))]
    texts = [str(name) for name in names]
    if len(texts) != len(head) or len(set(texts)) != len(texts):
        raise ValueError(f"class_names has {len(set(texts))} different names, the head {len(head)} classes")
    return texts


class _WithColorHead:
    """A classifier's weights, with the colour head from the file beside them and without the class head."""

    def __init__(self, file: TensorFile, color_head: SafetensorsFile | None) -> None:
        self.where, self._file, self._color_head = file.where, file, color_head
        self.names = file.names - {HEAD} | (color_head.names if color_head else set())

    def read(self, names: Any) -> dict[str, Tensor]:
        wanted = set(names)
        found = self._file.read(wanted - {LM_HEAD})
        if LM_HEAD in wanted and self._color_head is not None:
            found |= self._color_head.read([LM_HEAD])
        return found


def _open_weights(folder: Path) -> TensorFile:
    if (folder / SAFE).is_file():
        return SafetensorsFile(folder / SAFE)
    if (folder / SAFE_INDEX).is_file():
        return ShardedFile(folder / SAFE_INDEX, SafetensorsFile)
    if (folder / PICKLED_INDEX).is_file() and not (folder / PICKLED).is_file():
        return ShardedFile(folder / PICKLED_INDEX, TorchFile)
    return TorchFile(_need(folder, PICKLED, f"{SAFE} or {PICKLED}"))


def _ingredient(row: Name) -> Ingredient:
    if row.ours == "wte.weight":
        return Ingredient((row.huggingface,), lambda wte: wte[:-1])
    if row.ours == "sos":
        return Ingredient((row.huggingface,), lambda wte: wte[-1])
    return Ingredient(
        (row.huggingface,), (lambda value: value.T) if row.huggingface_transposed else (lambda value: value)
    )


def _marker(config: Mapping[str, Any]) -> Mapping[str, Any]:
    marker = config.get(MARKER, {})
    return marker if isinstance(marker, Mapping) else {}


def _hint(found: set[str]) -> str:
    if LM_HEAD not in found and any(name.startswith("transformer.") for name in found):
        return "\nThis looks like a classifier saved by transformers, which keeps no colour head (lm_head)."
    if "wte.weight" in found:
        return "\nThis looks like transformers' ImageGPTModel; save an ImageGPTForCausalImageModeling."
    return ""


def _check_palette(folder: Path, config: Mapping[str, Any], palette: Palette) -> None:
    expected = _marker(config).get("palette_sha256", palette.sha256)
    if palette.sha256 != expected:
        raise ValueError(
            f"{folder}: {CONFIG} says that the network uses the palette {str(expected)[:12]}, but this one is "
            f"{palette.sha256[:12]}: restore {PROCESSOR}, or name the palette (palette=)"
        )


def _facts(config: ImageGPTConfig, palette: Palette) -> dict[str, Any]:
    """What WRITTEN says; of biases the weights themselves tell."""
    facts = {name: value for name, value in config.to_dict().items() if name != "bias"}
    return facts | {"palette_sha256": palette.sha256}


def _check_written(folder: Path, config: Mapping[str, Any], palette: Palette, file: TensorFile | None) -> None:
    if not isinstance(file, SafetensorsFile) or WRITTEN not in file.metadata:
        return
    written = json.loads(file.metadata[WRITTEN])
    for name, value in _facts(read_config(config), palette).items():
        if written.get(name, value) != value:
            place = PROCESSOR if name == "palette_sha256" else CONFIG
            raise ValueError(
                f"{folder / place} has {name} {value!r}, but {Path(file.where).name} was written with "
                f"{written[name]!r}; the former is damaged or belongs to other weights: restore it, or save the "
                "network anew"
            )


def _labels_of(config: Mapping[str, Any], head: Tensor | None) -> list[str] | None:
    names = config.get("id2label")
    if head is None or not isinstance(names, Mapping):
        return None
    return [str(names.get(str(number), f"LABEL_{number}")) for number in range(len(head))]


def _check_place(folder: Path) -> None:
    """Raise where something else lives in the folder that would be overwritten, or would hide what is written."""
    if folder.is_file():
        raise FileExistsError(f"{folder} is a file; name a folder")
    if next(folder.rglob("*.ckpt"), None) is not None:
        raise FileExistsError(f"{folder} is a run folder (it holds .ckpt files); write into another one")
    if (folder / CONFIG).exists() and read_json(folder / CONFIG).get("model_type") != "imagegpt":
        raise FileExistsError(f"{folder} holds a {CONFIG} that is no Image GPT's; write into another folder")
    if (folder / "README.md").exists() and not (folder / CONFIG).exists():
        raise FileExistsError(f"{folder} holds a README.md that is no model card; write into another folder")


def _need(folder: Path, name: str, wording: str = "") -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"{folder} holds no {wording or name}")
    return folder / name
