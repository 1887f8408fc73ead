"""The model card that travels with exported weights, as the README.md of a Hugging Face repository."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.palette import Palette
from lightning_igpt.planning import parameter_count


@dataclass(frozen=True)
class ModelCard:
    """What is known of how weights came to be. None means that it is not known, and the card says so.

    Attributes:
        title: Heading of the card.
        data: What the network was trained on, such as a hub id.
        steps: Optimiser steps of the training.
        nats_per_pixel: Measured on validation data; a pixel is one palette token.
        accuracy: Of the class head on validation data, 0 to 1.
        measured_at: Optimiser step at which both were measured.
        license: SPDX identifier, such as mit.
        notes: Anything else, in Markdown.
        origin: The weights that training started from; None also where it started from random ones.
    """

    title: str | None = None
    data: str | None = None
    steps: int | None = None
    nats_per_pixel: float | None = None
    accuracy: float | None = None
    measured_at: int | None = None
    license: str | None = None
    notes: str | None = None
    origin: str | None = None

    def __post_init__(self) -> None:
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            if value is not None and kind is str and not isinstance(value, str):
                raise ValueError(f"the card's {name} is {value!r}; it must be text")
            if value is not None:
                object.__setattr__(self, name, kind(value))  # a tensor or a NumPy number becomes a plain one

    @classmethod
    def read(cls, values: Any) -> ModelCard:
        """The card in a file, whatever else a newer or a damaged one may hold."""
        card = cls()
        for name, value in values.items() if isinstance(values, Mapping) else ():
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                card = card.filled(**{name: value})
        return card

    @classmethod
    def resolve(cls, card: ModelCard | Mapping[str, Any] | None) -> ModelCard:
        """Turn what a user may write for ``card`` into one.

        Raises:
            ValueError: A field does not exist; the message lists what does.
        """
        if isinstance(card, ModelCard):
            return card
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(card or {}) - set(known))
        if unknown:
            raise ValueError(f"unknown card fields {unknown}; a model card has {known}")
        return cls(**(card or {}))

    def for_another_size(self) -> ModelCard:
        """Without what was measured at the old size of the images."""
        return ModelCard(**{**asdict(self), "nats_per_pixel": None, "accuracy": None, "measured_at": None})

    def known(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def filled(self, **changes: Any) -> ModelCard:
        """A copy with those fields replaced that are not None."""
        return ModelCard(**{**asdict(self), **{name: value for name, value in changes.items() if value is not None}})


_KINDS: dict[str, Any] = {"steps": int, "nats_per_pixel": float, "accuracy": float, "measured_at": int}
_KINDS |= dict.fromkeys(("title", "data", "license", "notes", "origin"), str)


def render(card: ModelCard, config: ImageGPTConfig, palette: Palette, class_names: Sequence[str] | None = None) -> str:
    """README.md: front matter for the hub, what the network is, what was measured, how to load it."""
    title = card.title or f"Image GPT, {config.n_layer} layers of width {config.n_embd}"
    parts = [_front_matter(card, class_names), f"# {title}", _facts(card, config, palette, class_names)]
    parts += ["## How to load", _ours(config)]
    parts.append(_bert() if config.objective == "bert" else _theirs(class_names))
    if card.notes:
        parts += ["## Notes", card.notes]
    return "\n\n".join(parts) + "\n"


def _front_matter(card: ModelCard, class_names: Sequence[str] | None) -> str:
    task = "image-classification" if class_names is not None else "unconditional-image-generation"
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    values["tags"] = ["image-gpt", "lightning-igpt"]
    if card.license is not None:
        values["license"] = card.license
    if card.data is not None and re.fullmatch(r"\w[\w.-]*/[\w.-]+", card.data, re.ASCII):
        values["datasets"] = [card.data]
    lines = [f"{name}: {json.dumps(value)}" for name, value in values.items()]  # JSON is YAML
    return "\n".join(["---", *lines, "---"])


def _facts(card: ModelCard, config: ImageGPTConfig, palette: Palette, class_names: Sequence[str] | None) -> str:
    unknown = "not recorded"
    at = "" if card.measured_at in (None, card.steps) else f" at step {card.measured_at:,}"
    nats = unknown if card.nats_per_pixel is None else f"{card.nats_per_pixel:.4f}{at}"
    images = f"{config.image_size} x {config.image_size} pixels = {config.n_positions} tokens"
    rows = {
        "objective": {"autoregressive": "next pixel", "bert": "masked pixels (BERT)"}[config.objective],
        "shape": f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, MLP {config.mlp_width}",
        "parameters": f"{parameter_count(config):,}",
        "images": images,
        "palette": f"{len(palette)} colours, sha256 `{palette.sha256}`",
        "training data": card.data or unknown,
        "optimiser steps": unknown if card.steps is None else f"{card.steps:,}",
        "validation, nats per pixel": nats,
        "licence": card.license or "not stated",
    }
    if card.origin is not None:
        rows["trained from"] = card.origin
    if class_names is not None:
        rows["classes"] = f"{len(class_names)}: {', '.join(class_names)}"
        rows["validation accuracy"] = unknown if card.accuracy is None else f"{card.accuracy:.4f}{at}"
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    return (
        f"| | |\n|---|---|\n{table}\n\nA pixel is one token of the palette, so nats per pixel are not comparable with "
        "the bits per dimension of RGB models."
    )


def _ours(config: ImageGPTConfig) -> str:
    use = (
        "igpt.inpaint(loaded.network, tokens, known)"
        if config.objective == "bert"
        else "igpt.complete(loaded.network, tokens[:, : tokens.shape[1] // 2])"
    )
    return f"""With [lightning-igpt](https://pypi.org/project/lightning-igpt/), by this folder's path or hub id:

```python
import lightning_igpt as igpt

loaded = igpt.load_pretrained("path/or/hub-id")
tokens = loaded.palette.quantize(images)  # uint8 (B, 3, {config.image_size}, {config.image_size})
{use}
```"""


def _theirs(class_names: Sequence[str] | None) -> str:
    kind = "ImageGPTForImageClassification" if class_names is not None else "ImageGPTForCausalImageModeling"
    use = "predicted" if class_names is not None else "of pixel t, given the pixels before it, at index t"
    return f"""With transformers. The network starts with `sos`, the last id, which the processor does not put there;
without it every pixel stands one place off and the logits are others:

```python
import torch
from transformers import {kind}, ImageGPTImageProcessorPil

processor = ImageGPTImageProcessorPil.from_pretrained("path/or/hub-id")
model = {kind}.from_pretrained("path/or/hub-id").eval()
tokens = torch.as_tensor(processor(images, return_tensors="pt").input_ids)
sos = torch.full_like(tokens[:, :1], model.config.vocab_size - 1)
logits = model(torch.cat([sos, tokens[:, :-1]], 1)).logits  # {use}
```"""


def _bert() -> str:
    return (
        "transformers cannot run this network: it was trained to predict hidden pixels from both sides, and "
        "transformers' ImageGPT always hides what comes after. The row of `sos` in `wte` is filled with zeros, for a "
        "BERT network has none. The files load without a warning there, but what comes out means nothing."
    )


def _cell(value: str) -> str:
    return " ".join(value.split()).replace("|", "\\|")
