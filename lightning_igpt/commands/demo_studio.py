"""The work behind the page of ``lightning-igpt demo``: reading a picture, drawing, and the surprise of its pixels."""

import logging
import math
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from lightning_igpt import sampling
from lightning_igpt.commands.images import decoded
from lightning_igpt.commands.score import surprise
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.data.embedded import EMBEDDED
from lightning_igpt.images import decode, resize_center_crop
from lightning_igpt.objectives import nats_to_bits
from lightning_igpt.pictures import surprise_colors, surprise_limit, surprise_map, to_tensor
from lightning_igpt.report import png_url
from lightning_igpt.weights import ASSETS, Pretrained

MAX_SAMPLES, MAX_STEPS = 8, 64
N_EXAMPLES, SIDE = 10, 256  # pictures offered; the longest side of an image as the page shows it

Emit: TypeAlias = Callable[[dict[str, Any]], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ask:
    """What to draw; the same ask gives the same pictures."""

    tokens: list[int]  # the picture, S * S pixels in raster order: palette ids, of rgb R << 16 | G << 8 | B
    keep_rows: int | None = None  # that are given, from the top; the rest is drawn
    hole: list[int] | None = None  # instead, the pixels to draw, 0 to S * S - 1
    n_samples: int = 4  # 1 to MAX_SAMPLES
    temperature: float = 1.0
    top_k: int | None = None  # with keep_rows and an autoregressive network only
    top_p: float | None = None  # the same
    steps: int = 8  # of a BERT network, 1 to MAX_STEPS
    seed: int = 0  # 0 to 2^63 - 1


class ReaderGoneError(Exception):
    """Nobody reads what is being drawn."""


class Studio:
    """A network, moved to a device, and the pictures offered with it. To be called from one thread at a time."""

    def __init__(self, loaded: Pretrained, device: torch.device) -> None:
        self.loaded, self.device = loaded, device
        self.config, self.network = loaded.config, loaded.network.to(device)
        self.autoregressive = loaded.config.objective == "autoregressive"
        self.pictures = [{"name": name, **self.seen(image)} for name, image in examples(loaded.card.data)]

    def start(self) -> dict[str, Any]:
        """What the page has to know: the network, its colors and the pictures offered."""
        facts = {"origin": self.loaded.origin, "device": str(self.device), "autoregressive": self.autoregressive}
        size = {"layers": self.config.n_layer, "width": self.config.n_embd, "side": self.config.image_size}
        known = None if self.config.tokens_per_pixel == 3 else self.loaded.palette.rgb.tolist()
        colors = {"colors": known, "scale": surprise_colors()[::15].tolist()}
        return {**facts, **size, **colors, "pictures": self.pictures}

    def read(self, content: bytes) -> dict[str, Any]:
        """What is ``seen`` of an image file; BadImageError where it cannot be decoded."""
        with warnings.catch_warnings():  # Pillow's, of metadata, are nothing that the server's owner can act on
            warnings.filterwarnings("ignore", module="PIL")
            return self.seen(decode({"bytes": content}))

    def seen(self, image: Image.Image) -> dict[str, Any]:
        """The tokens of the largest square in the middle, and the whole image as a data URL."""
        square = to_tensor(resize_center_crop(image, self.config.image_size, self.loaded.resize_filter))
        (whole := image.copy()).thumbnail((SIDE, SIDE))
        tokens = _pixels(self.loaded.palette.quantize(square[None]), self.config)[0]
        return {"tokens": tokens.tolist(), "whole": png_url(whole)}

    def score(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The surprise of each pixel: nats, colors of the map, and where its scale ends; a BERT network has none."""
        if not self.autoregressive:
            text = "a BERT network has a bound for a whole picture and no surprise of each pixel"
            raise ValueError(f"{text}; lightning-igpt score prints it")
        nats = surprise(self.loaded, self._picture(tokens), ["the picture"])[0][0]  # (S * S,)
        side, n_colors = self.config.image_size, self.config.vocab_size**self.config.tokens_per_pixel
        limit, mean = surprise_limit(nats, n_colors), float(nats.mean(dtype=torch.float64))
        heat = surprise_map(nats.view(side, side), limit=limit).flatten(1).T  # (S * S, 3)
        numbers = {"mean": mean, "bits": nats_to_bits(mean), "uniform": math.log(n_colors), "high": limit}
        return {"nats": nats.tolist(), "heat": heat.tolist(), **numbers}

    def draw(self, ask: Ask, emit: Emit, gone: threading.Event) -> None:
        """Emit {"begun": true}, the pixels of each row or step until ``gone`` is set, and seconds or an error."""
        try:
            emit({"begun": True})
            started = time.monotonic()
            self._draw(ask, emit, gone)
            emit({"seconds": round(time.monotonic() - started, 2)})
        except ReaderGoneError:
            log.info("drawing ended: the browser has disconnected")
        except ValueError as error:
            emit({"error": str(error)})
        except Exception as error:  # in a thread of its own nobody else would report it
            log.exception("drawing failed")
            emit({"error": f"{type(error).__name__}: {error}"})

    def _draw(self, ask: Ask, emit: Emit, gone: threading.Event) -> None:
        for name, least, most in (("n_samples", 1, MAX_SAMPLES), ("steps", 1, MAX_STEPS), ("seed", 0, 2**63 - 1)):
            if not least <= getattr(ask, name) <= most:
                raise ValueError(f"{name} is {getattr(ask, name)}; it must be from {least} to {most}")
        tokens, hole = self._picture(ask.tokens), self._hole(ask)
        by_line = ask.keep_rows is not None and self.autoregressive
        if not by_line and (ask.top_k, ask.top_p) != (None, None):
            raise ValueError("top_k and top_p are for an autoregressive network below a line; drop them")
        known = (~hole).expand(ask.n_samples, -1)
        precision, generator = "half" if self.device.type == "cuda" else "full", torch.Generator(self.device)
        options: dict[str, Any] = {"precision": precision, "generator": generator.manual_seed(ask.seed)}
        options["on_progress"] = _progress(known.to(self.device), self.config, emit, gone)
        options["temperature"] = ask.temperature
        if by_line:
            options |= {"n_samples": ask.n_samples, "top_k": ask.top_k, "top_p": ask.top_p}
            given = ~hole.repeat_interleave(self.config.tokens_per_pixel)
            sampling.complete(self.network, tokens[:, given], **options)
        else:
            sampling.inpaint(self.network, tokens.expand(ask.n_samples, -1), known, steps=ask.steps, **options)

    def _picture(self, tokens: Sequence[int]) -> Tensor:  # int64 (1, T)
        side, total = self.config.image_size, self.config.image_size**2
        if len(tokens) != total:
            raise ValueError(f"{len(tokens)} pixels; this network reads {side} x {side} = {total}")
        pixels = torch.tensor([tokens], dtype=torch.long)
        if self.config.tokens_per_pixel == 1:
            return pixels
        return torch.stack([pixels >> 16, pixels >> 8 & 255, pixels & 255], 2).flatten(1)

    def _hole(self, ask: Ask) -> Tensor:  # bool (S * S,), true where to draw
        side, total = self.config.image_size, self.config.image_size**2
        if (ask.keep_rows is None) == (not ask.hole):
            raise ValueError("give keep_rows, or a hole with at least one position, and not both")
        if ask.keep_rows is not None and not 0 <= ask.keep_rows < side:
            raise ValueError(f"keep_rows is {ask.keep_rows}; it must be from 0 to {side - 1}")
        positions = ask.hole or range((ask.keep_rows or 0) * side, total)
        if not 0 <= min(positions) <= max(positions) < total:
            raise ValueError(f"hole has positions from {min(positions)} to {max(positions)}; the last is {total - 1}")
        return torch.zeros(total, dtype=torch.bool).index_fill_(0, torch.tensor(list(positions)), True)


def _pixels(tokens: Tensor, config: ImageGPTConfig) -> Tensor:
    """Tokens (B, T) as the page has them, a number for each pixel (B, S * S)."""
    weights = torch.tensor([1 << 16, 1 << 8, 1] if config.tokens_per_pixel == 3 else [1], device=tokens.device)
    return (tokens.view(len(tokens), -1, config.tokens_per_pixel) * weights).sum(2)


def _progress(
    known: Tensor, config: ImageGPTConfig, emit: Emit, gone: threading.Event
) -> Callable[[Tensor, Tensor], None]:
    """An ``on_progress`` that emits the pixels decided since its last call, and raises when the reader is gone."""
    before, holes = known, max(1, int((~known).sum()))

    def progress(tokens: Tensor, known: Tensor) -> None:
        nonlocal before
        tokens, known = _pixels(tokens, config), known[:, :: config.tokens_per_pixel]
        fresh, before = (known & ~before).cpu(), known
        if gone.is_set():
            raise ReaderGoneError
        positions = [new.nonzero().flatten().tolist() for new in fresh]
        drawn = [row[new].tolist() for row, new in zip(tokens.cpu(), fresh, strict=True)]
        emit({"positions": positions, "tokens": drawn, "done": 1 - int((~known).sum()) / holes})

    return progress


def examples(data: str | None) -> list[tuple[str, Image.Image]]:
    """Names and images: the first test images, not picked, of the embedded data of a training; or photographs."""
    if data in EMBEDDED:
        images = decoded(data, split="test", limit=N_EXAMPLES)
        return [(f"{data}, test image {number}", image) for number, (_, image) in enumerate(images, 1)]
    return [(Path(name).stem, image) for name, image in decoded(str(ASSETS / "photos" / "examples"))]
