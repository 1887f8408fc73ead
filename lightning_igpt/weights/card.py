"""The model card that travels with exported weights, as the README.md of a Hugging Face repository.

Its text is ``assets/model_card.md``, whose ``$names`` are filled in here.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from string import Template
from typing import Any

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.palette import Palette
from lightning_igpt.planning import parameter_count

_TEMPLATE = Path(__file__).parents[1] / "assets" / "model_card.md"
_PAPER = "https://cdn.openai.com/papers/Generative_Pretraining_from_Pixels_V2.pdf"
_UNKNOWN = "not recorded"


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
    """README.md: front matter for the hub, what the network is and is for, what was measured, how to load it."""
    bert = config.objective == "bert"
    kind = "a classifier" if class_names is not None else "a network"
    order = "- It draws row by row from the top: what is known after a hole does not influence the hole."
    text = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        front_matter=_front_matter(card, config, class_names),
        title=card.title or f"Image GPT, {config.n_layer} layers of width {config.n_embd}",
        summary=f"Image GPT ([Chen et al., 2020]({_PAPER})), {kind} that reads pictures as rows of palette colours.",
        facts=_table(_facts(card, config, palette, class_names)),
        uses=_uses(config, class_names),
        size=f"{config.image_size} x {config.image_size}",
        colors=f"{len(palette)} colours",
        order="- It fills holes in passes, the surest pixels first; it has no likelihood." if bert else order,
        training=_table(_training(card)),
        measured=_measured(card, config, class_names),
        ours=_ours(config),
        theirs=_bert() if bert else _theirs(class_names),
        notes=f"\n## Notes\n\n{card.notes}" if card.notes else "",
    )
    return text.rstrip() + "\n"


def _front_matter(card: ModelCard, config: ImageGPTConfig, class_names: Sequence[str] | None) -> str:
    task = "image-classification" if class_names is not None else "unconditional-image-generation"
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    if config.objective == "bert":  # transformers reads its files, but cannot run it
        values["library_name"] = "lightning-igpt"
    values["tags"] = ["image-gpt", "lightning-igpt"]
    if card.license is not None:
        values["license"] = card.license.lower()  # the hub knows no capitals
    if card.data is not None and re.fullmatch(r"\w[\w.-]*/[\w.-]+", card.data, re.ASCII):
        values["datasets"] = [card.data]
        results = _results(card, class_names)
        if results:
            values["metrics"] = [result["type"] for result in results]
            data = {"name": card.data, "type": card.data, "split": "validation"}
            entry = {"task": {"type": task}, "dataset": data, "metrics": results}
            values["model-index"] = [{"name": _one_line(card.title or "Image GPT"), "results": [entry]}]
    lines = [f"{name}: {json.dumps(value)}" for name, value in values.items()]  # JSON is YAML
    return "\n".join(["---", *lines, "---"])


def _results(card: ModelCard, class_names: Sequence[str] | None) -> list[dict[str, Any]]:
    """What the hub shows beside the card, in the form of its model-index."""
    results: list[dict[str, Any]] = []
    if class_names is not None and card.accuracy is not None:
        results.append({"type": "accuracy", "name": "accuracy", "value": card.accuracy})
    if card.nats_per_pixel is not None:
        results.append({"type": "nats_per_pixel", "name": "nats per pixel", "value": card.nats_per_pixel})
    return results


def _facts(
    card: ModelCard, config: ImageGPTConfig, palette: Palette, class_names: Sequence[str] | None
) -> dict[str, str]:
    rows = {
        "objective": {"autoregressive": "next pixel", "bert": "masked pixels (BERT)"}[config.objective],
        "shape": f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, MLP {config.mlp_width}",
        "parameters": f"{parameter_count(config):,}",
        "images": f"{config.image_size} x {config.image_size} pixels = {config.n_positions} tokens",
        "palette": f"{len(palette)} colours, sha256 `{palette.sha256}`",
        "licence": card.license or "not stated",
    }
    if class_names is not None:
        rows["classes"] = f"{len(class_names)}: {', '.join(class_names)}"
    return rows


def _training(card: ModelCard) -> dict[str, str]:
    steps = _UNKNOWN if card.steps is None else f"{card.steps:,}"
    rows = {"training data": card.data or _UNKNOWN, "optimiser steps": steps}
    if card.origin is not None:
        rows["trained from"] = card.origin
    return rows


def _measured(card: ModelCard, config: ImageGPTConfig, class_names: Sequence[str] | None) -> str:
    at = "" if card.measured_at in (None, card.steps) else f" at step {card.measured_at:,}"
    nats = _UNKNOWN if card.nats_per_pixel is None else f"{card.nats_per_pixel:.4f}{at}"
    surprise = {"autoregressive": "each pixel given those before it", "bert": "hidden pixels given the others"}
    rows = {"validation, nats per pixel": nats}
    protocol = f"Nats per pixel: the mean surprise of {surprise[config.objective]}, natural logarithm."
    if class_names is not None:
        rows["validation accuracy"] = _UNKNOWN if card.accuracy is None else f"{card.accuracy:.4f}{at}"
        protocol += " Accuracy: the share of images whose likeliest class is theirs."
    return f"{_table(rows)}\n\nOn held-out images of this size, in the palette's colours. {protocol}"


def _uses(config: ImageGPTConfig, class_names: Sequence[str] | None) -> str:
    uses = ["- to sort pictures into the classes named above"] if class_names is not None else []
    if config.objective == "bert":
        uses += ["- to fill holes in pictures"]
    else:
        uses += ["- to complete pictures, to draw new ones, and to tell how surprising a picture is"]
    return "\n".join([*uses, "- to take features from, for linear probes, and to fine-tune on labelled pictures"])


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
    return f"""With transformers, but not 5.0 to 5.20: those scale attention by a root cut to an integer, which is
another network unless its heads are 16, 64 or 144 wide. The network starts with `sos`, the last id, which the processor
does not put there; without it every pixel stands one place off and the logits are others:

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


def _table(rows: Mapping[str, str]) -> str:
    lines = ["| | |", "|---|---|"]
    for name, value in rows.items():
        cell = _one_line(value).replace("|", "\\|")
        lines.append(f"| {name} | {cell} |")
    return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
