"""The shape of an Image GPT and the sizes of the paper.

Source: Chen et al., "Generative Pretraining from Pixels" (ICML 2020), section 3.3 (layers, widths) and the commands in
the README of github.com/openai/image-gpt (heads).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any, Literal

Objective = Literal["autoregressive", "bert"]
# Far beyond any network of today, so that a damaged or hostile file cannot make a process build forever.
_MAXIMA = {"n_layer": 1000, "n_head": 1000, "n_embd": 65_536, "vocab_size": 32_768, "image_size": 1024}
_MAXIMA |= {"tokens_per_pixel": 3, "n_inner": 1_048_576}


@dataclass(frozen=True)
class ImageGPTConfig:
    """Everything that decides the shape and the mathematics of a network.

    Args:
        n_layer: Number of blocks.
        n_head: Attention heads per block; divides ``n_embd``.
        n_embd: Width of the residual stream.
        vocab_size: Number of palette colors, the classes of a pixel.
        image_size: Side of the square image in pixels; a sequence has ``tokens_per_pixel * image_size**2`` tokens.
        n_inner: Width of the MLP; ``None`` means ``4 * n_embd`` as in the paper.
        objective: ``autoregressive`` predicts the next pixel and has a start vector ``sos``; ``bert`` predicts masked
            pixels from both sides and has no ``sos``.
        bias: Give the projections biases. The published networks have none; imported weights may.
        dropout: Probability of dropping an activation in training. The paper uses none.
        tokens_per_pixel: 1 for a palette of colors; 3 for the palette ``rgb``, whose tokens are the bytes of a pixel's
            red, green and blue.

    Raises:
        ValueError: A number is out of range, ``n_head`` does not divide ``n_embd``, or the objective is unknown.
    """

    n_layer: int = 24
    n_head: int = 8
    n_embd: int = 512
    vocab_size: int = 512
    image_size: int = 32
    n_inner: int | None = None
    objective: Objective = "autoregressive"
    bias: bool = False
    dropout: float = 0.0
    tokens_per_pixel: int = 1

    def __post_init__(self) -> None:
        for name, maximum in _MAXIMA.items():
            value, unset = getattr(self, name), ", or None for 4 * n_embd" if name == "n_inner" else ""
            if unset and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= maximum:
                raise ValueError(f"{name} is {_shown(value)}; it must be a whole number from 1 to {maximum:,}{unset}")
        if self.tokens_per_pixel == 2 or (self.tokens_per_pixel == 3 and self.vocab_size != 256):
            what = f"tokens_per_pixel is {self.tokens_per_pixel} and vocab_size {self.vocab_size}"
            raise ValueError(f"{what}; it must be 1 for a palette of colors, or 3 with 256 values for the palette rgb")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")
        if not isinstance(self.objective, str) or self.objective not in ("autoregressive", "bert"):
            raise ValueError(f"objective is {_shown(self.objective)}; it must be 'autoregressive' or 'bert'")
        if not isinstance(self.bias, bool):
            raise ValueError(f"bias is {_shown(self.bias)}; it must be true or false")
        number = isinstance(self.dropout, int | float) and not isinstance(self.dropout, bool)
        if not number or not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {_shown(self.dropout)}; it must be at least 0 and below 1")

    @property
    def n_positions(self) -> int:
        """Tokens per image, T."""
        return self.tokens_per_pixel * self.image_size**2

    @property
    def mlp_width(self) -> int:
        """Width of the hidden layer of the MLP."""
        return self.n_inner or 4 * self.n_embd

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for YAML and for checkpoints that open with ``weights_only=True``."""
        return asdict(self)

    @classmethod
    def resolve(cls, network: ImageGPTConfig | str | Mapping[str, Any]) -> ImageGPTConfig:
        """Turn what a user may write for ``network`` into a config.

        Args:
            network: A config, the name of a preset, or a mapping of config fields; ValueError names those that exist.
        """
        network = plain(network)
        if isinstance(network, str):
            if network not in PRESETS:
                raise ValueError(f"there is no preset {network[:200]!r}; the presets are {', '.join(PRESETS)}")
            return PRESETS[network]
        if isinstance(network, ImageGPTConfig):
            return network
        if not isinstance(network, Mapping):
            raise ValueError(f"network is {_shown(network)}; give a preset's name or the fields of an ImageGPTConfig")
        known = [field.name for field in fields(cls)]
        unknown = sorted(_shown(name) for name in set(network) - set(known))
        if unknown:
            raise ValueError(f"unknown network fields [{', '.join(unknown)}]; an ImageGPTConfig has {known}")
        return cls(**network)


def plain(value: Any) -> Any:
    """Lists and dicts in place of OmegaConf's, which Hydra passes, and of NumPy's; all else as it is."""
    if type(value).__module__ == "numpy":
        return value.tolist()
    if not type(value).__module__.startswith("omegaconf."):
        return value
    from omegaconf import OmegaConf

    return OmegaConf.to_container(value, resolve=True)


def _shown(value: Any) -> str:
    """For messages: a damaged file may hold a number of a million digits, which Python refuses to print."""
    try:
        return reprlib.repr(value)[:200]
    except ValueError:
        return f"a {type(value).__name__} too long to show"


PRESETS: Mapping[str, ImageGPTConfig] = MappingProxyType(
    {
        "igpt_tiny": ImageGPTConfig(n_layer=6, n_head=4, n_embd=96),  # 861,504 parameters; not in the paper
        "igpt_s": ImageGPTConfig(n_layer=24, n_head=8, n_embd=512),  # 76,571,648 at 32 x 32; paper, section 3.3
        "igpt_m": ImageGPTConfig(n_layer=36, n_head=8, n_embd=1024),  # 455,157,760
        "igpt_l": ImageGPTConfig(n_layer=48, n_head=16, n_embd=1536),  # 1,362,250,752
        # 6,801,438,720. The head count of XL was never published; 24 gives heads 128 wide, as in M
        "igpt_xl": ImageGPTConfig(n_layer=60, n_head=24, n_embd=3072),
    }
)

EMBEDDED: Mapping[str, str] = MappingProxyType(  # pretrained networks in assets/, by the names that pretrained= takes
    {"photos": "photographs at 16 x 16", "emoji": "emoji at 16 x 16", "emoji_bert": "masked emoji at 16 x 16"}
)
