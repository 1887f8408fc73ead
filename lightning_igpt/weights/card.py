"""The model card that travels with exported weights, as the README.md of a Hugging Face repository.

Its text is in ``assets/model_card*``, whose ``$names`` are filled in here.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import Any, get_args

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.images import Filter
from lightning_igpt.palette import Palette
from lightning_igpt.planning import parameter_count

_ASSETS = Path(__file__).parents[1] / "assets"
_UNKNOWN = "not recorded"


@dataclass(frozen=True)
class ModelCard:
    """What is known of how weights came to be. None means that it is not known, and the card says so.

    Attributes:
        title: Heading of the card.
        data: What the network was trained on, such as a hub id.
        steps: Optimizer steps of the training.
        nats_per_pixel: Measured on validation data; a pixel is one palette token, or three of the palette ``rgb``.
        accuracy: Of the class head on validation data, 0 to 1.
        measured_at: Optimizer step at which both were measured.
        license: SPDX identifier, such as mit.
        notes: Anything else, in Markdown.
        origin: The weights that training started from; None also where it started from random ones.
        resize: Filter of Pillow's that made the images small: bilinear, bicubic, box or lanczos.
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
    resize: Filter | None = None

    def __post_init__(self) -> None:
        for name, value in self.known().items():
            if _KINDS[name] is str and not isinstance(value, str):
                raise ValueError(f"the card's {name} is {value!r}; it must be text")
            if name == "resize" and value not in get_args(Filter):
                raise ValueError(f"the card's resize is {value!r}; it must be one of: {', '.join(get_args(Filter))}")
            object.__setattr__(self, name, _KINDS[name](value))  # a tensor or a NumPy number becomes a plain one

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
        """Turn what a user may write for ``card`` into one; ValueError for fields that do not exist."""
        if isinstance(card, ModelCard):
            return card
        unknown = sorted(set(card or {}) - set(_KINDS))
        if unknown:
            raise ValueError(f"unknown card fields {unknown}; a model card has {list(_KINDS)}")
        return cls(**(card or {}))

    def known(self) -> dict[str, Any]:
        """The fields that are not None."""
        return {name: value for name, value in vars(self).items() if value is not None}

    def filled(self, **changes: Any) -> ModelCard:
        """A copy with those fields replaced that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})


_KINDS: dict[str, Any] = {"steps": int, "nats_per_pixel": float, "accuracy": float, "measured_at": int}
_KINDS |= dict.fromkeys(("title", "data", "license", "notes", "origin", "resize"), str)


def render(card: ModelCard, config: ImageGPTConfig, palette: Palette, class_names: Sequence[str] | None = None) -> str:
    """README.md: front matter for the hub, what the network is and is for, what was measured, how to load it."""
    all_words = json.loads((_ASSETS / "model_card.json").read_text(encoding="utf-8"))
    words = all_words[config.objective]
    classes, bert, n = class_names is not None, config.objective == "bert", config.tokens_per_pixel
    kind = "classifier" if classes else "transformers"
    rgb = {"classifier": "rgb_classifier", "transformers": "rgb"}
    facts = {
        "objective": words["objective"],
        "shape": f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, MLP {config.mlp_width}",
        "parameters": f"{parameter_count(config):,}",
        "images": f"{config.image_size} x {config.image_size} pixels = {config.n_positions} tokens",
        "palette": f"{words_for(palette)}, sha256 `{palette.sha256}`",
        "license": card.license or "not stated",
    }
    training = {"training data": card.data or _UNKNOWN}
    if card.resize is not None:
        training["resize filter"] = f"{card.resize} (Pillow)"
    training["optimizer steps"] = _UNKNOWN if card.steps is None else f"{card.steps:,}"
    at = "" if card.measured_at in (None, card.steps) else f" at step {card.measured_at:,}"
    numbers = {"validation, nats per pixel": card.nats_per_pixel}
    if palette.is_exact and not bert and card.nats_per_pixel is not None:
        numbers["validation, bits per dimension"] = card.nats_per_pixel / palette.tokens_per_pixel / math.log(2)
    if class_names is not None:
        facts["classes"] = f"{len(class_names)}: {', '.join(class_names)}"
        numbers["validation accuracy"] = card.accuracy
        words["uses"] = f"- to sort pictures into the classes named above\n{words['uses']}"
        if not bert:
            words["call"] = "logits = loaded.network.hidden(tokens).mean(1) @ loaded.head.T  # (B, classes)"
    if card.origin is not None:
        training["trained from"] = card.origin
    text = _fill(
        "model_card.md",
        **words,
        front_matter=_front_matter(card, config, classes),
        title=card.title or f"Image GPT, {config.n_layer} layers of width {config.n_embd}",
        kind="classifier" if classes else "network",
        facts=_table(facts),
        size=config.image_size,
        n_colors=f"{len(palette)} colors" if n == 1 else "256 values of each channel",
        comparison=all_words["comparison"][n == 3],
        training=_table(training),
        measured=_table({name: _UNKNOWN if x is None else f"{x:.4f}{at}" for name, x in numbers.items()}),
        transformers=_fill(f"model_card_{'bert' if bert else rgb[kind] if n == 3 else kind}.md").rstrip(),
        notes=f"\n## Notes\n\n{card.notes}" if card.notes else "",
    )
    return text.rstrip() + "\n"


def words_for(palette: Palette) -> str:
    """The size of a palette, in words."""
    return f"{len(palette)} colors" if palette.tokens_per_pixel == 1 else "rgb, the 256 values of each channel"


def _front_matter(card: ModelCard, config: ImageGPTConfig, classes: bool) -> str:
    task = "image-classification" if classes else "unconditional-image-generation"
    right = config.objective != "bert" and not classes  # of the others transformers makes something else by itself
    values: dict[str, Any] = {"library_name": "transformers" if right else "lightning-igpt"}
    if not classes:
        values["pipeline_tag"] = task
    values["tags"] = ["image-gpt", "lightning-igpt"]
    if card.license is not None:
        values["license"] = card.license.lower()  # the hub knows no capitals
    if card.data is not None and re.fullmatch(r"\w[\w.-]*/[\w.-]+", card.data, re.ASCII):
        values["datasets"] = [card.data]
        measured = {"accuracy": card.accuracy if classes else None, "nats_per_pixel": card.nats_per_pixel}
        known = {name: value for name, value in measured.items() if value is not None}
        if known:  # in the form of the hub's model-index
            results = [{"type": name, "name": name.replace("_", " "), "value": value} for name, value in known.items()]
            values["metrics"] = [*known]
            data = {"name": card.data, "type": card.data, "split": "validation"}
            entry = {"task": {"type": task}, "dataset": data, "metrics": results}
            values["model-index"] = [{"name": _one_line(card.title or "Image GPT"), "results": [entry]}]
    lines = [f"{name}: {json.dumps(value)}" for name, value in values.items()]  # JSON is YAML
    return "\n".join(["---", *lines, "---"])


def _fill(name: str, **values: Any) -> str:
    return Template((_ASSETS / name).read_text(encoding="utf-8")).substitute(values)


def _table(rows: Mapping[str, str]) -> str:
    cells = {name: _one_line(value).replace("|", "\\|") for name, value in rows.items()}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {cell} |" for name, cell in cells.items())])


def _one_line(text: str) -> str:
    return " ".join(text.split())
