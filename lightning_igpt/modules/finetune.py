"""Fine-tuning to a classifier with the joint loss L_gen + L_clf (paper, sections 2.3 and 4.5)."""

from __future__ import annotations

from typing import Any, Literal

import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.modules.batches import need_labels, read_batch
from lightning_igpt.modules.shared import (
    NetworkLike,
    PaletteLike,
    adopt_class_names,
    build_network,
    check_mask_ratio,
    check_optimizer,
    check_settings,
    check_stamp,
    follow_schedule,
    keep_rates,
    mask_for,
    note_validation,
    register,
    stamp,
    total_steps,
)
from lightning_igpt.objectives import MASK_RATIO, masked_pixel_loss, next_pixel_loss
from lightning_igpt.optim import make_adam, warmup_constant, warmup_cosine


class FineTuneModule(LightningModule):
    """Turn a pretrained network into a classifier.

    The head reads the mean over positions of the final norm's output and starts at zero. Logs ``train/cross_entropy``,
    ``train/nats_per_pixel``, ``val/accuracy``, ``val/cross_entropy`` (and ``test/...``).

    Args:
        pretrained: The weights to start from: a .ckpt file or run folder, a Hugging Face folder or hub id, or an OpenAI
            checkpoint. None trains from scratch, for comparison; then give ``network``.
        num_classes: Number of classes.
        network: Preset name or the fields of an ImageGPTConfig. Default: the network of ``pretrained``, else igpt_s.
        palette: As in PretrainModule. Default: the palette of ``pretrained``, else openai.
        image_size: Side of the images in pixels. Default: the network's own. With ``pretrained`` of another size its
            table of positions is interpolated.
        lr: Learning rate; often a tenth of the one used in pretraining.
        betas: Adam's decay rates of the moments.
        weight_decay: Decoupled weight decay on matrices.
        schedule: ``constant`` as in the paper, which stops early at the best validation accuracy; or ``cosine``, which
            falls to zero at the end of the run and does better in short ones.
        warmup_steps: Steps of linear warm-up before that.
        generative_weight: Weight of L_gen beside L_clf; the paper found 1 better than 0.
        mask_ratio: BERT networks only: probability that an input pixel is hidden.
        class_names: Names of the classes. Default: the data's.
        seed: Seed of BERT's masks.

    Raises:
        ValueError: Arguments contradict each other or the loaded weights.
    """

    palette_colors: Tensor

    def __init__(
        self,
        pretrained: str | None = None,
        num_classes: int = 10,
        *,
        network: NetworkLike = None,
        palette: PaletteLike = None,
        image_size: int | None = None,
        lr: float = 0.0003,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        schedule: Literal["constant", "cosine"] = "constant",
        warmup_steps: int = 0,
        generative_weight: float = 1.0,
        mask_ratio: float = MASK_RATIO,
        class_names: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; a classifier needs at least 2")
        if schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule is {schedule!r}; it must be 'constant' or 'cosine'")
        check_optimizer(lr, betas, weight_decay, warmup_steps)
        check_settings(above_zero={}, not_below_zero={"generative_weight": generative_weight})
        check_mask_ratio(mask_ratio)
        self.network, self.palette = build_network(network, palette, pretrained, image_size=image_size)
        self.head = nn.Linear(self.config.n_embd, num_classes, bias=False)
        nn.init.zeros_(self.head.weight)
        self.lr, self.betas, self.weight_decay, self.warmup_steps = lr, (betas[0], betas[1]), weight_decay, warmup_steps
        self.schedule, self.num_classes, self.generative_weight = schedule, num_classes, generative_weight
        self.mask_ratio, self.class_names, self.seed = mask_ratio, class_names, seed
        if generative_weight == 0:
            self.network.lm_head.requires_grad_(False)  # no gradient reaches it, which distributed training refuses
        register(
            self,
            self.network,
            self.palette,
            num_classes=num_classes,
            lr=lr,
            betas=list(betas),
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_steps=warmup_steps,
            generative_weight=generative_weight,
            mask_ratio=mask_ratio,
            class_names=class_names,
            seed=seed,
        )
        stages = ("val", "test")
        self.accuracy = nn.ModuleDict({stage: MulticlassAccuracy(num_classes, average="micro") for stage in stages})
        self.cross_entropy = nn.ModuleDict({stage: MeanMetric() for stage in stages})

    @property
    def config(self) -> ImageGPTConfig:
        """The network's shape; data modules read ``image_size`` here."""
        return self.network.config

    def tokens_of(self, batch: Any) -> Tensor:
        """The tokens of a batch, int64 (B, T); callbacks read batches through this."""
        return read_batch(batch, self.palette, self.config).tokens

    def setup(self, stage: str) -> None:
        adopt_class_names(self, self.num_classes)

    def forward(self, batch: Any) -> Tensor:
        """Class logits (B, C) of a batch of images."""
        read = read_batch(batch, self.palette, self.config)
        return self._logits(read.tokens, mask_for(self, read, 0))[1]

    def on_train_start(self) -> None:
        follow_schedule(self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        read = read_batch(batch, self.palette, self.config)
        labels, masked = need_labels(read, self.num_classes), mask_for(self, read, batch_idx)
        hidden, logits = self._logits(read.tokens, masked)
        classification = F.cross_entropy(logits.float(), labels)
        self.log("train/cross_entropy", classification, prog_bar=True)
        if self.generative_weight == 0:
            return classification
        pixels = self.network.lm_head(hidden)  # (B, T, K)
        generative = (
            next_pixel_loss(pixels, read.tokens) if masked is None else masked_pixel_loss(pixels, read.tokens, masked)
        )
        self.log("train/nats_per_pixel", generative)
        return classification + self.generative_weight * generative

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "val")

    def on_validation_epoch_end(self) -> None:
        note_validation(self)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities, float32 (B, C)."""
        return self(batch).float().softmax(-1)  # type: ignore[no-any-return]

    def configure_optimizers(self) -> Any:
        parameters = [*self.network.parameters(), *self.head.parameters()]
        optimizer = make_adam(parameters, lr=self.lr, betas=self.betas, weight_decay=self.weight_decay)
        if self.schedule == "cosine":
            total, _ = total_steps(self.trainer)
            scheduler = warmup_cosine(optimizer, warmup_steps=self.warmup_steps, total_steps=total)
        else:
            scheduler = warmup_constant(optimizer, warmup_steps=self.warmup_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stamp(self, self.config, self.palette, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_stamp(self, self.config, self.palette, checkpoint)
        keep_rates(self, checkpoint)

    def _logits(self, tokens: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor]:
        """(final hidden states (B, T, D), class logits (B, C))."""
        hidden = self.network.hidden(tokens, masked=masked)
        return hidden, self.head(hidden.mean(1))

    def _evaluate(self, batch: Any, batch_idx: int, stage: str) -> None:
        read = read_batch(batch, self.palette, self.config)
        labels = need_labels(read, self.num_classes)
        logits = self._logits(read.tokens, mask_for(self, read, batch_idx))[1].float()
        self.accuracy[stage](logits, labels)
        self.cross_entropy[stage](F.cross_entropy(logits, labels, reduction="none"))
        self.log(f"{stage}/accuracy", self.accuracy[stage], prog_bar=True, on_epoch=True)  # type: ignore[arg-type]
        self.log(f"{stage}/cross_entropy", self.cross_entropy[stage], on_epoch=True)  # type: ignore[arg-type]
