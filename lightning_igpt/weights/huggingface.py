"""To and from the folder layout of transformers' ImageGPT: config.json, weights, preprocessor_config.json.

transformers always has biases, which are zero in the published networks. Its classifier has a class head in place of
the color head; the color head is then in a file of its own, which transformers does not read.
"""

import json
import math
import tempfile
from collections import ChainMap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.files import write_text
from lightning_igpt.model import NORM_EPS, ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.weights import native
from lightning_igpt.weights.card import ModelCard
from lightning_igpt.weights.safety import read_json, read_safetensors, read_torch, save_safetensors, tensors_in

PROCESSING = {
    "image_processor_type": "ImageGPTImageProcessor",
    **dict.fromkeys(("do_color_quantize", "do_normalize", "do_resize"), True),
    "resample": 2,
}
MARKER = "lightning_igpt"  # the key of config.json that holds what transformers has no word for
PUBLISHED = {  # what every published network has, and this package computes
    "activation_function": "quick_gelu",
    "layer_norm_epsilon": NORM_EPS,
    "scale_attn_weights": True,
    **dict.fromkeys(("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"), False),
}
CONFIG, PROCESSOR, COLOR_HEAD = "config.json", "preprocessor_config.json", "lm_head.safetensors"
SAFE, SAFE_INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DOWNLOADS = (CONFIG, PROCESSOR, COLOR_HEAD, SAFE, SAFE_INDEX, "model-*.safetensors", PICKLED, "pytorch_model*.bin*")
FORMAT = {"format": "pt"}  # in the header; transformers asks for it
HEAD, LM_HEAD = "score.weight", "lm_head.weight"
SHA256 = "palette_sha256"  # the key of the palette's hash in both JSON files


def read_config(config: Mapping[str, Any], *, bias: bool = False) -> ImageGPTConfig:
    """Our config from transformers' config.json; ValueError where that is another model, or a variant of this one."""
    if config.get("model_type") != "imagegpt":
        raise ValueError(f"config.json is of model_type {config.get('model_type')!r}, not 'imagegpt'")
    for name, published in PUBLISHED.items():
        if config.get(name, published) != published:
            raise ValueError(f"config.json has {name} {config[name]!r}; every published Image GPT has {published!r}")
    sizes = {"n_layer": 24, "n_head": 8, "n_embd": 512, "vocab_size": 513, "n_positions": 1024}
    sizes |= {name: config[name] for name in sizes if name in config}
    try:
        vocab_size, each = sizes.pop("vocab_size") - 1, _marker(config).get("tokens_per_pixel", 1)  # sos is no color
        image_size = math.isqrt(sizes["n_positions"] // each)
        if each * image_size**2 != sizes.pop("n_positions"):
            raise ValueError(f"n_positions {config['n_positions']} is no square image")
        return ImageGPTConfig(
            **sizes,
            vocab_size=vocab_size,
            image_size=image_size,
            n_inner=config.get("n_inner"),
            objective=_marker(config).get("objective", "autoregressive"),
            bias=bias,
            dropout=_marker(config).get("dropout", 0.0),  # transformers' own default of 0.1 is not the paper's
            tokens_per_pixel=each,
        )
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise ValueError(f"config.json describes no network: {error}") from error


def from_state_dict(state: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> ImageGPT:
    """A network from transformers' weights and config; biases that are all zero are left out."""
    names = {name for name in state if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # causal masks
    native.check_keys({row.huggingface for row in native.rows(read_config(config, bias=True))}, names, where)
    biased = any(bool(state[name].any()) for name in names if name.endswith(".bias"))
    ours = read_config(config, bias=biased)
    return native.assemble(ours, {row.ours: _source(row) for row in native.rows(ours)}, state.__getitem__, where)


def to_state_dict(network: ImageGPT) -> dict[str, Tensor]:
    """The state dict that transformers' ImageGPTForCausalImageModeling loads, on the CPU."""
    state = {name: value.cpu() for name, value in network.state_dict().items()}
    start = state.get("sos", torch.zeros_like(state["wte.weight"][0]))
    theirs = {"transformer.wte.weight": torch.cat([state["wte.weight"], start[None]])}  # (K + 1, D)
    for row in native.rows(ImageGPTConfig(**{**network.config.to_dict(), "bias": True})):
        if row.huggingface not in theirs:
            value = state.get(row.ours)
            if value is None:  # a bias that our network does not have
                value = torch.zeros_like(state[row.ours.replace(".bias", ".weight")][:, 0])
            theirs[row.huggingface] = (value.T if row.huggingface_transposed else value).contiguous().clone()
    return theirs


def _to_config(
    config: ImageGPTConfig, palette: Palette, class_names: list[str] | None, card: Mapping[str, Any] | None
) -> dict[str, Any]:
    marker = {"objective": config.objective, "dropout": config.dropout, "tokens_per_pixel": config.tokens_per_pixel}
    values: dict[str, Any] = {
        "architectures": ["ImageGPTForCausalImageModeling"],
        "model_type": "imagegpt",
        "vocab_size": config.vocab_size + 1,
        **{name: getattr(config, name) for name in ("n_positions", "n_embd", "n_layer", "n_head", "n_inner")},
        **PUBLISHED,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "tie_word_embeddings": False,
        MARKER: marker | {SHA256: palette.sha256, "card": card or {}},
    }
    if class_names is not None:
        values["architectures"] = ["ImageGPTForImageClassification"]
        values["id2label"] = {str(number): name for number, name in enumerate(class_names)}
        values["label2id"] = {name: number for number, name in enumerate(class_names)}
    return values


def load_folder(folder: Path, palette: Palette | None = None) -> native.Pretrained:
    """What a folder in the layout of transformers holds; ``palette`` is for folders without one."""
    config = read_json(folder / CONFIG)
    if (folder / PROCESSOR).is_file() and "clusters" in read_json(folder / PROCESSOR):
        palette = Palette.load(str(folder / PROCESSOR))
    palette = native.palette_for(read_config(config), palette, str(folder))
    expected = _marker(config).get(SHA256, palette.sha256)
    if palette.sha256 != expected:
        found = f"{str(expected)[:12]}, but this one is {palette.sha256[:12]}"
        cure = f"restore {PROCESSOR}, or name the palette (palette=)"
        raise ValueError(f"{folder}: {CONFIG} says that the network uses the palette {found}: {cure}")
    state, where = _read_weights(folder)
    head = state.pop(HEAD, None)
    if head is not None and (folder / COLOR_HEAD).is_file():
        state |= read_safetensors(folder / COLOR_HEAD)[0]
    network = from_state_dict(state, config, where)
    card, names = ModelCard.read(_marker(config).get("card")), config.get("id2label")
    head = None if head is None else native.check_head(head, network.config.n_embd, where)
    if head is None or not isinstance(names, Mapping):
        names = None
    else:
        names = [str(names.get(str(number), f"LABEL_{number}")) for number in range(len(head))]
    return native.Pretrained(network, palette, f"Hugging Face folder {folder}", head, names, card, folder)


def save_folder(
    folder: Path,
    network: ImageGPT,
    palette: Palette,
    head: Tensor | None = None,
    class_names: list[str] | None = None,
    card: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that transformers' ImageGPT classes load as it is; a head has names."""
    if len(palette) != network.config.vocab_size:
        sizes = f"{len(palette)} colors (sha256 {palette.sha256[:12]}), the network {network.config.vocab_size}"
        raise ValueError(f"the palette has {sizes}; save a network with the palette that it was trained with")
    colors: dict[str, Any] = {"clusters": palette.to_list(), SHA256: palette.sha256}
    native.check_tokens_per_pixel(palette, network.config)
    # transformers.pipeline would classify without sos, and be wrong; and its processor knows no tokens of channels.
    if head is not None or palette.tokens_per_pixel > 1:
        colors["do_color_quantize"] = False
    size = dict.fromkeys(("height", "width"), network.config.image_size)
    texts = {
        CONFIG: json.dumps(_to_config(network.config, palette, class_names, card), indent=2),
        PROCESSOR: json.dumps({**PROCESSING, **colors, "size": size}, indent=2),
    }
    state = to_state_dict(network)
    ours = (folder / CONFIG).exists() and read_json(folder / CONFIG).get("model_type") == "imagegpt"
    foreign = not ours and any((folder / name).exists() for name in (CONFIG, "README.md"))
    if foreign or any(folder.rglob("*.ckpt")):
        raise FileExistsError(f"{folder} is a run folder or another model's; write into another folder")
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (COLOR_HEAD, SAFE_INDEX, PICKLED, PICKLED_INDEX):  # of another network that was saved here before
        (folder / stale).unlink(missing_ok=True)
    if head is not None:
        save_safetensors(folder / COLOR_HEAD, {LM_HEAD: state.pop(LM_HEAD)}, FORMAT)
        state[HEAD] = head
    save_safetensors(folder / SAFE, state, FORMAT)
    for name, text in texts.items():
        write_text(folder / name, text + "\n")


class Comparison(NamedTuple):
    """Largest absolute difference and largest absolute logit of what was compared."""

    difference: float
    largest: float
    logits: int


@torch.no_grad()
def check_logits(network: ImageGPT) -> Tensor:
    """Logits of the first pixels of a fixed picture, float32 (16, K): equal for equal networks."""
    positions = torch.arange(network.config.n_positions)[None]  # (1, T)
    masked = positions % 3 == 0 if network.config.objective == "bert" else None
    logits: Tensor = network.eval()(positions * 7 % network.config.vocab_size, masked=masked)
    return logits[0, :16].float()


@torch.no_grad()
def compare_with_transformers(network: ImageGPT, palette: Palette, head: Tensor | None = None) -> Comparison:
    """Compare with transformers' ImageGPT in float32: color logits, or the class logits of a network with a head."""
    config = network.config
    if config.objective == "bert":
        raise ValueError("transformers cannot run a BERT network, so there is nothing to compare with")
    try:
        from transformers import ImageGPTForCausalImageModeling, ImageGPTForImageClassification
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('the comparison needs transformers: pip install ".[hf]"') from error
    with tempfile.TemporaryDirectory() as folder:
        save_folder(Path(folder), network, palette, head, None if head is None else native.labels(head, None))
        kind = ImageGPTForCausalImageModeling if head is None else ImageGPTForImageClassification
        theirs = kind.from_pretrained(folder).eval()
    tokens = torch.randint(config.vocab_size, (1, config.n_positions), generator=torch.Generator().manual_seed(0))
    expected = theirs(torch.cat([torch.full((1, 1), config.vocab_size), tokens[:, :-1]], 1)).logits
    ours = network.eval()(tokens) if head is None else network.eval().hidden(tokens).mean(1) @ head.T
    return Comparison((ours - expected).abs().max().item(), expected.abs().max().item(), expected.numel())


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], str]:
    """(the tensors of a folder's weights, the file that names them), of which large networks have several."""
    for single, index in ((SAFE, SAFE_INDEX), (PICKLED, PICKLED_INDEX)):
        if (folder / single).is_file():
            return _read(folder / single), str(folder / single)
        if (folder / index).is_file():
            places = read_json(folder / index).get("weight_map")
            if not isinstance(places, dict) or any(Path(str(place)).name != place for place in places.values()):
                raise ValueError(f"{folder / index} has no weight_map that names files in its folder")
            parts = [_read(folder / place) for place in sorted(set(places.values()))]
            return dict(ChainMap(*parts)), str(folder / index)
    raise FileNotFoundError(f"{folder} holds no {SAFE} or {PICKLED}")


def _read(path: Path) -> dict[str, Tensor]:
    return read_safetensors(path)[0] if path.suffix == ".safetensors" else tensors_in(read_torch(path), path)


def _source(row: native.Name) -> native.Source:
    rules: dict[str, Callable[[Tensor], Tensor]] = {"wte.weight": lambda wte: wte[:-1], "sos": lambda wte: wte[-1]}
    rule = rules.get(row.ours, (lambda value: value.T) if row.huggingface_transposed else (lambda value: value))
    return native.Source((row.huggingface,), rule)


def _marker(config: Mapping[str, Any]) -> Mapping[str, Any]:
    marker = config.get(MARKER, {})
    return marker if isinstance(marker, Mapping) else {}
