"""What the page of ``lightning-igpt demo`` asks of the network: read a picture, draw, tell the surprise."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_igpt import sampling
from lightning_igpt.commands.images import read_images
from lightning_igpt.images import decode, resize_center_crop
from lightning_igpt.objectives import nats_to_bits
from lightning_igpt.pictures import heat_map
from lightning_igpt.weights import Pretrained

MAX_SAMPLES = 8
MAX_STEPS = 64
N_DIGITS = 10
SCALE = torch.from_numpy(matplotlib.colormaps["magma"](np.arange(256), bytes=True)[:, :3])  # (256, 3), as score draws

Emit: TypeAlias = Callable[[dict[str, Any]], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ask:
    """What to draw.

    Attributes:
        tokens: The picture, T palette ids in raster order.
        keep_rows: Rows that are given, from the top; the rest is drawn.
        hole: Instead, the positions to draw, 0 to T - 1.
        n_samples: 1 to MAX_SAMPLES.
        temperature: As in ``sampling.complete``.
        top_k: As in ``sampling.complete``; with keep_rows and an autoregressive network only.
        top_p: The same.
        steps: Of a BERT network, 1 to MAX_STEPS.
        seed: 0 to 2^63 - 1; the same ask gives the same pictures.
    """

    tokens: list[int]
    keep_rows: int | None = None
    hole: list[int] | None = None
    n_samples: int = 4
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    steps: int = 8
    seed: int = 0


class WentAwayError(Exception):
    """Nobody waits for what is being drawn."""


class Studio:
    """A network, its palette and the pictures offered with it. To be called from one thread at a time.

    Args:
        loaded: The network, which is moved to the device.
        device: Where to compute.
    """

    def __init__(self, loaded: Pretrained, device: torch.device) -> None:
        self.loaded, self.device = loaded, device
        self.network = loaded.network.to(device)
        self.autoregressive = loaded.config.objective == "autoregressive"
        rgb = loaded.palette.rgb
        gray = bool((rgb == rgb[:, :1]).all())
        self.pictures = digits(loaded.config.image_size) if gray else photos(loaded.config.image_size)
        self._tokens = loaded.palette.quantize(torch.stack(list(self.pictures.values())))  # builds the colour table too

    def start(self) -> dict[str, Any]:
        """What the page has to know: the network, its colours and the pictures offered."""
        config = self.loaded.config
        return {
            "origin": self.loaded.origin,
            "layers": config.n_layer,
            "width": config.n_embd,
            "side": config.image_size,
            "autoregressive": self.autoregressive,
            "colors": self.loaded.palette.rgb.tolist(),
            "scale": SCALE[::15].tolist(),
            "pictures": [
                {"name": name, "tokens": row} for name, row in zip(self.pictures, self._tokens.tolist(), strict=True)
            ],
            "device": str(self.device),
        }

    def read(self, content: bytes) -> list[int]:
        """The tokens of an image file's largest square in the middle.

        Raises:
            BadImageError: As ``images.decode``; the message is for people.
        """
        image = resize_center_crop(decode({"bytes": content}), self.loaded.config.image_size)
        tokens: list[int] = self.loaded.palette.quantize(_pixels(image)[None])[0].tolist()
        return tokens

    def score(self, tokens: Sequence[int]) -> dict[str, Any]:
        """The surprise of each pixel: nats, colours of the heat map, and where its scale ends.

        One scale passes ln K and ends where one in a hundred of the pixels lies above, as that of ``score``.

        Raises:
            ValueError: A BERT network, wrong tokens, or logits that are not finite.
        """
        nats = sampling.score(self.network, self._picture(tokens)).cpu()[0]  # (T,)
        if not nats.isfinite().all():
            raise ValueError("the surprise is not a finite number; the network's weights are damaged")
        side, uniform = self.loaded.config.image_size, math.log(self.loaded.config.vocab_size)
        high = max(1.25 * uniform, float(np.quantile(nats.numpy(), 0.99)))
        mean = float(nats.mean(dtype=torch.float64))
        heat = heat_map(nats.view(side, side), SCALE, high=high).flatten(1).T  # (T, 3)
        numbers = {"mean": mean, "bits": nats_to_bits(mean), "uniform": uniform, "high": high}
        return {"nats": nats.tolist(), "heat": heat.tolist(), **numbers}

    def draw(self, ask: Ask, emit: Emit, gone: threading.Event) -> None:
        """Draw, and emit what is new after each row, or step of a BERT network; last the time it took, or an error.

        Args:
            ask: What to draw.
            emit: Called with {"begun": true}; then with {"positions": n lists, "tokens": n lists, "done": share of the
                hole} each time; last with {"seconds": s} or {"error": text}.
            gone: Once it is set, drawing ends with the row at hand.
        """
        try:
            if not gone.is_set():
                emit({"begun": True})
                started = time.monotonic()
                self._draw(ask, emit, gone)
                emit({"seconds": round(time.monotonic() - started, 2)})
        except WentAwayError as away:
            log.info("drawing ended with %s: nobody waits for it", away)
        except ValueError as error:
            emit({"error": str(error)})
        except Exception as error:  # in a thread of its own nobody else would tell the user
            log.exception("drawing failed")
            emit({"error": f"{type(error).__name__}: {error}"})

    def _draw(self, ask: Ask, emit: Emit, gone: threading.Event) -> None:
        if not 1 <= ask.n_samples <= MAX_SAMPLES or not 1 <= ask.steps <= MAX_STEPS:
            raise ValueError(
                f"n_samples is {ask.n_samples} and steps {ask.steps}; they must be from 1 to {MAX_SAMPLES} and from 1 "
                f"to {MAX_STEPS}"
            )
        if not 0 <= ask.seed < 2**63:
            raise ValueError(f"seed is {ask.seed}; it must be from 0 to 2^63 - 1")
        tokens, hole = self._picture(ask.tokens), self._hole(ask)
        by_line = ask.keep_rows is not None and self.autoregressive
        if not by_line and (ask.top_k, ask.top_p) != (None, None):
            raise ValueError("top_k and top_p are for an autoregressive network below a line; drop them")
        known = (~hole).expand(ask.n_samples, -1)
        options: dict[str, Any] = {
            "temperature": ask.temperature,
            "precision": "half" if self.device.type == "cuda" else "full",
            "generator": torch.Generator(self.device).manual_seed(ask.seed),
            "on_progress": _News(known.to(self.device), emit, gone),
        }
        if by_line:
            options |= {"n_samples": ask.n_samples, "top_k": ask.top_k, "top_p": ask.top_p}
            sampling.complete(self.network, tokens[:, ~hole], **options)
        else:
            repeated = tokens.expand(ask.n_samples, -1)
            sampling.inpaint(self.network, repeated, known, steps=ask.steps, **options)

    def _picture(self, tokens: Sequence[int]) -> Tensor:
        """Int64 (1, T)."""
        side, total = self.loaded.config.image_size, self.loaded.config.n_positions
        if len(tokens) != total:
            raise ValueError(f"{len(tokens)} pixels; this network reads {side} x {side} = {total}")
        return torch.tensor([tokens], dtype=torch.long)

    def _hole(self, ask: Ask) -> Tensor:
        """Bool (T,), true where to draw."""
        side, total = self.loaded.config.image_size, self.loaded.config.n_positions
        if (ask.keep_rows is None) == (ask.hole is None):
            raise ValueError("give keep_rows or hole, and not both")
        if ask.keep_rows is not None:
            if not 0 <= ask.keep_rows < side:
                raise ValueError(f"keep_rows is {ask.keep_rows}; it must be from 0 to {side - 1}")
            return torch.arange(total) >= ask.keep_rows * side
        positions = ask.hole or []
        if not positions:
            raise ValueError("nothing is marked, so nothing would be drawn")
        if not 0 <= min(positions) <= max(positions) < total:
            raise ValueError(f"hole has positions from {min(positions)} to {max(positions)}; the last is {total - 1}")
        hole = torch.zeros(total, dtype=torch.bool)
        hole[positions] = True
        return hole


class _News:
    """``on_progress``: tells what has been decided since the last call, and ends the drawing of who went away."""

    def __init__(self, known: Tensor, emit: Emit, gone: threading.Event) -> None:
        self.before, self.emit, self.gone = known, emit, gone
        self.holes, self.calls = max(1, int((~known).sum())), 0

    def __call__(self, tokens: Tensor, known: Tensor) -> None:
        self.calls += 1
        fresh, self.before = known & ~self.before, known
        rows = list(zip(tokens.cpu(), fresh.cpu(), strict=True))
        if self.gone.is_set():
            raise WentAwayError(f"row or step {self.calls}")
        self.emit(
            {
                "positions": [new.nonzero().flatten().tolist() for _, new in rows],
                "tokens": [row[new].tolist() for row, new in rows],
                "done": 1 - int((~known).sum()) / self.holes,
            }
        )


def digits(size: int) -> dict[str, Tensor]:
    """The first embedded test digits, not picked: uint8 (3, size, size) by name."""
    pixels = read_images("digits", size, limit=N_DIGITS).pixels
    return {f"test digit {number}": image for number, image in enumerate(pixels, 1)}


def photos(size: int) -> dict[str, Tensor]:
    """The photographs that come with scikit-learn: uint8 (3, size, size) by name."""
    from sklearn.datasets import load_sample_images

    found = load_sample_images()
    images = [resize_center_crop(Image.fromarray(image), size) for image in found.images]
    return {Path(name).stem: _pixels(image) for name, image in zip(found.filenames, images, strict=True)}


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W)
