"""Grids of completions: half an image as prompt, samples of the rest, the truth."""

import logging
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_igpt.callbacks.run_folder import show
from lightning_igpt.decoding import Precision, is_sharded
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.pictures import image_grid
from lightning_igpt.sampling import complete, inpaint

log = logging.getLogger(__name__)
HIDDEN = (88, 118, 166)  # hidden pixels: a blue, since gray could be part of the picture


def completion_rows(
    network: ImageGPT,
    palette: Palette,
    tokens: Tensor,
    *,
    n_samples: int = 3,
    keep_rows: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    precision: Precision | None = None,
    seed: int = 0,
) -> Tensor:
    """The prompt, completions of it and the truth of whole images int64 (B, T): uint8 (B, 2 + n_samples, 3, S, S).

    ``keep_rows`` rows of pixels are given, from 0 to S - 1, by default half of them. Other options are those of
    ``complete``. A BERT network inpaints the same pixels, and ValueError refuses ``top_k`` and ``top_p`` there.
    """
    side = network.config.image_size
    rows = side // 2 if keep_rows is None else keep_rows
    if not 0 <= rows < side:
        raise ValueError(f"keep_rows is {rows}; an image of {side} rows can keep 0 to {side - 1}")
    generator = torch.Generator(tokens.device).manual_seed(seed)
    options: dict[str, Any] = {"temperature": temperature, "precision": precision, "generator": generator}
    if network.config.objective == "bert":
        if top_k is not None or top_p is not None:
            raise ValueError("top_k and top_p are for autoregressive networks; leave them out for a BERT network")
        repeated = tokens.repeat_interleave(n_samples, 0)
        known = (torch.arange(side * side, device=tokens.device) < rows * side).expand_as(repeated)
        samples = inpaint(network, repeated, known, **options)
    else:
        options |= {"n_samples": n_samples, "top_k": top_k, "top_p": top_p}
        samples = complete(network, tokens[:, : rows * side], **options)
    samples = palette.dequantize(samples.reshape(-1, side * side)).view(len(tokens), n_samples, 3, side, side)
    truth = palette.dequantize(tokens)[:, None]  # (B, 1, 3, S, S)
    prompt = truth.clone()
    prompt[..., rows:, :] = torch.tensor(HIDDEN, dtype=torch.uint8, device=prompt.device)[:, None, None]
    return torch.cat([prompt, samples, truth], 1)


def captions(n_samples: int) -> list[str]:
    """Headings of the columns that ``completion_rows`` makes."""
    return ["given", *(f"sample {i}" for i in range(1, n_samples + 1)), "truth"]


class CompletionGrid(Callback):
    """Complete validation images after each validation; save the grid as PNG and pass it to loggers that take images.

    Args:
        n_images: Images, taken from the first validation batch.
        n_samples: Completions of each.
        temperature: Divides the logits.
        seed: Of the draws; the same at every validation.
        every_n_validations: Skip validations in between.
    """

    def __init__(
        self,
        n_images: int = 8,
        n_samples: int = 3,
        temperature: float = 1.0,
        seed: int = 0,
        every_n_validations: int = 1,
    ) -> None:
        self.n_images, self.n_samples, self.temperature, self.seed = n_images, n_samples, temperature, seed
        self.every_n_validations, self._validations = every_n_validations, 0
        self._tokens: Tensor | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not hasattr(pl_module, "tokens_of"):
            kind = type(pl_module).__name__
            raise TypeError(f"CompletionGrid needs a PretrainModule; {kind} has no tokens_of(batch)")

    def on_validation_batch_end(self, trainer: Trainer, pl_module: Any, _: Any, batch: Any, *place: int) -> None:
        if not any(place):  # the first batch of the first loader
            self._tokens = pl_module.tokens_of(batch)[: self.n_images].cpu()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        tokens, self._tokens = self._tokens, None
        network = pl_module.network
        together = is_sharded(network)  # then all processes sample, and the first one saves
        if together:
            tokens = trainer.strategy.broadcast(tokens)
        if trainer.sanity_checking or tokens is None or not (trainer.is_global_zero or together):
            return
        self._validations += 1
        if (self._validations - 1) % self.every_n_validations:
            return
        options: dict[str, Any] = {"n_samples": self.n_samples, "temperature": self.temperature, "seed": self.seed}
        try:
            rows = completion_rows(network, pl_module.palette, tokens.to(pl_module.device), **options)
        except ValueError as error:  # raised by one process, it would leave the others waiting
            log.warning("no completions are drawn: %s", error)
            return
        if trainer.is_global_zero:
            half = network.config.image_size // 2
            grid = image_grid(rows.cpu(), captions=captions(self.n_samples), line=half)  # (3, h, w)
            show(trainer, f"completions/step-{trainer.global_step:07d}.png", "completions", grid)
