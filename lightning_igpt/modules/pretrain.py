"""Pretraining without labels: predict the next pixel, or masked pixels (paper, sections 2.1 and 3.4)."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_igpt.config import Objective, plain
from lightning_igpt.modules import build, resume
from lightning_igpt.modules.batches import masks_for
from lightning_igpt.modules.build import IGPTModule, NetworkLike, PaletteLike
from lightning_igpt.objectives import (
    MASK_RATIO,
    MaskRatio,
    hidden_nats,
    masked_pixel_loss,
    nats_to_bits,
    next_pixel_loss,
    pixel_nats,
)
from lightning_igpt.optim import MuonAdam, default_warmup, make_adam, make_schedule
from lightning_igpt.private import allow_clipping
from lightning_igpt.sampling import complete, inpaint


class PretrainModule(IGPTModule):
    """Train an Image GPT on images without labels.

    A batch is ``{"image": uint8 (B, 3, S, S)}``, an ``(image, label)`` pair, or images alone; it is quantized on the
    module's device. Logs ``train/nats_per_pixel``, ``val/nats_per_pixel``, ``val/bits_per_pixel`` (and ``test/...``);
    for BERT these are means over the masked pixels. With ``mask_ratio="uniform"`` their expectation is an upper bound
    of a whole image's nats per pixel, also logged as ``val/nats_per_pixel_bound``. If each token is a byte (palettes
    ``rgb`` and ``gray:256``), an autoregressive network also logs ``val/bits_per_dim``.

    Args:
        network: Preset name (igpt_tiny, igpt_s, igpt_m, igpt_l, igpt_xl) or the fields of an ImageGPTConfig. Default:
            the network of ``pretrained``, else igpt_s.
        palette: ``openai`` (the 512 released colors), ``gray:K``, ``rgb`` (the bytes of the channels; the network then
            has vocab_size 256 and tokens_per_pixel 3), a .npy file, a Hugging Face folder or hub id, or the colors as a
            list. Default: the palette of ``pretrained``, else openai.
        objective: ``autoregressive`` or ``bert``. Default: the network's own.
        pretrained: Weights to start from: an embedded network (photos, emoji, emoji_bert), a .ckpt file or run folder,
            a Hugging Face folder or hub id, or an OpenAI checkpoint. To resume a run use ckpt_path instead.
        image_size: Side of the images in pixels; positions are interpolated. Default: the network's own.
        optimizer: ``adam``, the paper's; or ``muon`` for the matrices in the blocks, without sharding.
        lr: Peak learning rate. The paper: 0.003 for S and M, 0.001 for L, 0.0003 for XL.
        betas: Adam's decay rates of the moments; Muon's momentum is 0.95.
        weight_decay: Decoupled weight decay on matrices.
        warmup_steps: Steps of linear warm-up. Default: one epoch, at most a tenth of the run.
        schedule: After the warm-up, ``cosine`` to zero at the end of the run, the paper's; ``constant``; or ``wsd``,
            constant and then down to zero in the last ``decay_fraction``. The last two allow a longer run to continue
            from a checkpoint before the decay.
        decay_fraction: wsd only: share of the run's steps in which the rate falls, as 1 - sqrt of the share done.
        mask_ratio: BERT only: probability that a pixel is hidden; or ``uniform``, which hides k pixels of an image,
            k drawn uniformly from 1 to all, so that the loss bounds the likelihood of whole images.
        keys: Names of a batch's parts other than ``image``, ``label``, ``sample`` and ``tokens``, or their places in a
            sequence: ``{image: photo}``, ``{image: 0}``. Default: common names.
        seed: Seed of BERT's masks and of the samples drawn by predict.

    Raises:
        ValueError: Arguments contradict each other, such as a palette of another size than vocab_size.
    """

    lasting: ClassVar = {"optimizer": "adam"}

    def __init__(
        self,
        network: NetworkLike = None,
        palette: PaletteLike = None,
        *,
        objective: Objective | None = None,
        pretrained: str | None = None,
        image_size: int | None = None,
        optimizer: Literal["adam", "muon"] = "adam",
        lr: float = 0.003,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        warmup_steps: int | None = None,
        schedule: Literal["cosine", "constant", "wsd"] = "cosine",
        decay_fraction: float = 0.2,
        mask_ratio: MaskRatio = MASK_RATIO,
        keys: dict[str, str | int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        betas = plain(betas)
        if optimizer not in ("adam", "muon"):
            raise ValueError(f"optimizer is {optimizer!r}; it must be adam or muon")
        if schedule not in ("cosine", "constant", "wsd"):
            raise ValueError(f"schedule is {schedule!r}; it must be cosine, constant or wsd")
        if not 0 < decay_fraction < 1:
            raise ValueError(f"decay_fraction is {decay_fraction}; it must lie between 0 and 1")
        build.check_settings(above_zero={"lr": lr}, betas=betas, weight_decay=weight_decay, warmup_steps=warmup_steps)
        self.optimizer, self.lr, self.betas, self.weight_decay = optimizer, lr, (betas[0], betas[1]), weight_decay
        self.warmup_steps, self.mask_ratio, self.seed = warmup_steps, mask_ratio, seed
        self.schedule, self.decay_fraction = schedule, decay_fraction
        built = build.build_network(network, palette, pretrained, objective, image_size)
        names = ("optimizer", "lr", "weight_decay", "warmup_steps", "schedule", "decay_fraction", "mask_ratio", "seed")
        self.register(built, *names, keys=keys, betas=list(betas))
        if mask_ratio != "uniform":
            build.check_masks(self.config, mask_ratio)
        elif self.config.objective != "bert":
            raise ValueError("mask_ratio is uniform, but an autoregressive network hides no pixels; set objective=bert")

    def forward(self, batch: Any) -> Tensor:
        """Logits (B, T, K) of a batch; a BERT network sees all pixels."""
        tokens = self.tokens_of(batch)
        masked = torch.zeros_like(tokens, dtype=torch.bool) if self.config.objective == "bert" else None
        return self.network(tokens, masked=masked)  # type: ignore[no-any-return]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        tokens, masked = self._inputs(batch, batch_idx)
        logits = self.network(tokens, masked=masked)  # (B, T, K)
        loss = next_pixel_loss(logits, tokens) if masked is None else masked_pixel_loss(logits, tokens, masked)
        self.log("train/nats_per_pixel", loss * self.config.tokens_per_pixel, prog_bar=True)
        return loss

    def new_metrics(self) -> dict[str, Any]:
        return {"nats": build.mean()}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Nats per pixel of each image, float32 (B,); of a BERT network, without those that hide no pixel."""
        tokens, masked = self._inputs(batch, batch_idx)
        logits = self.network(tokens, masked=masked)  # (B, T, K)
        if masked is None:
            per_image = pixel_nats(logits, tokens).mean(1)
        else:  # an image that hides nothing says nothing
            per_image = hidden_nats(logits, tokens, masked)[masked.any(1)]
        per_image = per_image * self.config.tokens_per_pixel
        self.metrics_of(dataloader_idx)["nats"].update(per_image)
        return per_image

    test_step = validation_step

    def on_validation_start(self) -> None:
        self.warn_if_untrained(self.network.lm_head.weight)
        self.begin_evaluation()

    on_test_start = on_predict_start = on_validation_start

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Keep the upper half of each image and draw the lower: uint8 (B, 3, S, S)."""
        tokens = self.tokens_of(batch)
        number = (dataloader_idx << 40) + batch_idx * 65_536 + self.global_rank
        generator = torch.Generator(self.device).manual_seed(self.seed + number)
        size = self.config.image_size
        given = size // 2 * size * self.config.tokens_per_pixel  # tokens in whole rows
        if self.config.objective == "bert":
            known = torch.arange(size * size, device=tokens.device).expand(len(tokens), -1) < size // 2 * size
            return self.palette.dequantize(inpaint(self.network, tokens, known, generator=generator))
        return self.palette.dequantize(complete(self.network, tokens[:, :given], generator=generator)[:, 0])

    def configure_optimizers(self) -> Any:
        optimizer, warmup, total = allow_clipping(self._optimizer()), self.warmup_steps, 0
        if warmup is None or self.schedule != "constant":  # a constant rate needs no end
            total, per_epoch = resume.total_steps(self)
            warmup = default_warmup(total, per_epoch) if warmup is None else warmup
        scheduler = make_schedule(self.schedule, optimizer, warmup, total, self.decay_fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters, blocks = self.network.parameters(), self.network.blocks()
        options: dict[str, Any] = {"lr": self.lr, "betas": self.betas, "weight_decay": self.weight_decay}
        if self.optimizer == "adam":
            return make_adam(parameters, **options)
        layers: list[Any] = [part for block in blocks for part in block.modules() if isinstance(part, nn.Linear)]
        qkv: list[Any] = [block.attn.c_attn.weight for block in blocks]
        matrices = [layer.weight for layer in layers]
        rest = [parameter for parameter in parameters if all(parameter is not matrix for matrix in matrices)]
        return MuonAdam(matrices, rest, packed=dict.fromkeys(qkv, 3), **options)

    def _inputs(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor | None]:
        """Tokens (B, T), and for BERT the mask (B, T), which depends on the sample's number alone."""
        whole = self.read(batch)
        return whole.tokens, masks_for(self, whole, batch_idx)[0]

    def log_metrics(self, stage: str) -> None:
        for metrics, ending in self.end_evaluation():
            nats = metrics["nats"].compute()
            self.log(f"{stage}/nats_per_pixel{ending}", nats, prog_bar=True, **build.COMPLETE)
            self.log(f"{stage}/bits_per_pixel{ending}", nats_to_bits(nats), **build.COMPLETE)
            if self.mask_ratio == "uniform":
                self.log(f"{stage}/nats_per_pixel_bound{ending}", nats, **build.COMPLETE)
            if self.palette.is_exact and self.config.objective == "autoregressive":
                bits = nats_to_bits(nats / self.config.tokens_per_pixel)
                self.log(f"{stage}/bits_per_dim{ending}", bits, **build.COMPLETE)
