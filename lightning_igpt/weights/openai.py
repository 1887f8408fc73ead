"""OpenAI's TensorFlow checkpoints of Image GPT (github.com/openai/image-gpt), autoregressive and BERT.

In those files q, k, v have the shape (heads, head width, in) and c_proj has (heads, head width, out): squares of equal
size with opposite roles. The first kind is used as it lies, the second is transposed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT
from lightning_igpt.weights.names import ATTENTION_OUT, PLAIN, TRANSPOSED, check_keys, expand

Variables = Mapping[str, NDArray[np.float32]]


def is_checkpoint(prefix: str) -> bool:
    """Whether ``prefix`` names a TensorFlow checkpoint, as in ``model.ckpt-1000000``."""
    return Path(f"{prefix}.index").exists()


def load_checkpoint(prefix: str) -> ImageGPT:
    """A network from the files ``prefix.index`` and ``prefix.data-*``; optimizer slots are skipped.

    Raises:
        ModuleNotFoundError: TensorFlow is not installed.
        ValueError: The variables are not those of an Image GPT.
    """
    try:
        import tensorflow as tf
    except ModuleNotFoundError as error:
        message = 'reading a TensorFlow checkpoint needs TensorFlow: pip install "lightning-igpt[openai]"'
        raise ModuleNotFoundError(message) from error
    reader = tf.train.load_checkpoint(prefix)
    names = [name for name in reader.get_variable_to_shape_map() if name.startswith("model/")]
    names = [name for name in names if "adam" not in name.lower() and not name.endswith("_step")]
    return from_variables({name.removeprefix("model/"): reader.get_tensor(name) for name in names})


def from_variables(variables: Variables) -> ImageGPT:
    """A network from the checkpoint's variables, named without the prefix ``model/``."""
    config = read_config(variables)
    check_keys(_their_names(config), variables, "OpenAI checkpoint")
    width = config.n_embd
    state = {"wte.weight": variables["wte"]}
    if "sos" in variables:
        state["sos"] = variables["sos"]
    for layer in range(config.n_layer):
        qkv = [variables[f"h{layer}/attn/{part}_proj"].reshape(width, width) for part in "qkv"]
        state[f"h.{layer}.attn.c_attn.weight"] = np.concatenate(qkv)  # (3 D, D)
        c_proj = variables[ATTENTION_OUT.openai.replace("{}", str(layer))]
        state[ATTENTION_OUT.ours.replace("{}", str(layer))] = c_proj.reshape(width, width).T
    for name, transposed in [(name, False) for name in PLAIN] + [(name, True) for name in TRANSPOSED]:
        for ours, theirs in zip(expand(name.ours, config.n_layer), expand(name.openai, config.n_layer), strict=True):
            state[ours] = variables[theirs].T if transposed else variables[theirs]
    network = ImageGPT(config)
    network.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in state.items()})
    return network


def read_config(variables: Variables) -> ImageGPTConfig:
    """The network's shape, read off the variables' shapes; heads come from q_proj."""
    if "h0/attn/q_proj" not in variables or "wpe" not in variables:
        raise ValueError(f"no Image GPT checkpoint: it holds {sorted(variables)[:8]} ...")
    vocab_size, n_embd = variables["wtet"].shape
    return ImageGPTConfig(
        n_layer=len({name.split("/")[0] for name in variables if name.startswith("h") and "/attn/" in name}),
        n_head=variables["h0/attn/q_proj"].shape[0],
        n_embd=n_embd,
        vocab_size=vocab_size,
        image_size=round(variables["wpe"].shape[0] ** 0.5),
        objective="autoregressive" if "sos" in variables else "bert",
    )


def _their_names(config: ImageGPTConfig) -> list[str]:
    names = ["wte"] + (["sos"] if config.objective == "autoregressive" else [])
    for name in [*PLAIN, *TRANSPOSED, ATTENTION_OUT]:
        names += expand(name.openai, config.n_layer)
    for part in "qkv":
        names += expand(f"h{{}}/attn/{part}_proj", config.n_layer)
    return names
