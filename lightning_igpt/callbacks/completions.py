"""Grids of completions: half an image as prompt, samples of the rest, the ground truth."""

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_igpt.callbacks.run_folder import show
from lightning_igpt.decoding import is_sharded
from lightning_igpt.pictures import image_grid
from lightning_igpt.sampling import captions, completion_rows

log = logging.getLogger(__name__)


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
