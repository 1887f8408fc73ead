"""Fine-tuning to a classifier with the joint loss L_gen + L_clf (paper, sections 2.3 and 4.5)."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_igpt.config import plain
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules import build, heads, resume
from lightning_igpt.modules.batches import Batch, masks_for, read_labeled, sample_numbers
from lightning_igpt.modules.build import IGPTModule, NetworkLike, PaletteLike
from lightning_igpt.objectives import MASK_RATIO, masked_pixel_loss, next_pixel_loss
from lightning_igpt.optim import make_adam, make_schedule
from lightning_igpt.private import allow_clipping


class FineTuneModule(IGPTModule):
    """Turn a pretrained network into a classifier.

    The head reads the mean over positions of the final norm's output and starts at zero. Logs ``train/cross_entropy``,
    ``train/nats_per_pixel``, ``val/accuracy``, ``val/cross_entropy`` (and ``test/...``). The paper stops at the best
    validation accuracy: give the trainer Lightning's EarlyStopping and a ModelCheckpoint, both monitoring
    ``val/accuracy``.

    Args:
        pretrained: As in PretrainModule. None trains from scratch, for comparison; then give ``network``.
        num_classes: Number of classes.
        network: As in PretrainModule.
        palette: As in PretrainModule.
        image_size: As in PretrainModule.
        lr: Learning rate; often a tenth of the one used in pretraining.
        betas: Adam's decay rates of the moments.
        weight_decay: Decoupled weight decay on matrices.
        schedule: ``constant`` as in the paper, or ``cosine`` to zero at the end of the run, better in short runs.
        warmup_steps: Steps of linear warm-up before the schedule.
        layer_decay: Factor, above 0 and up to 1, by which each layer trains slower than the next (ELECTRA, Clark et
            al., 2020): heads and final norm at ``lr``, block l of L at ``lr * layer_decay**(L - l)``, embeddings at
            ``lr * layer_decay**(L + 1)``, as in BEiT (Bao et al., 2022). None or 1: one rate, as in the paper.
        generative_weight: Weight of L_gen next to L_clf; the paper found 1 better than 0, which is classification only.
        mask_ratio: BERT networks only: probability that an input pixel is hidden.
        mask_inputs: BERT networks only: hide input pixels, in evaluation too, as the paper does. False needs
            generative_weight=0, as there is no L_gen.
        n_masks: BERT networks only: masks under which an image is evaluated. Accuracy counts the class that most vote
            for (section 4.6: 5), ties at random; cross-entropy and predictions use the mean of the probabilities.
        class_names: Names of the classes. Default: the checkpoint's, else the data's.
        keys: As in PretrainModule.
        seed: Seed of BERT's masks and of ties between their votes.
    """

    lasting: ClassVar = {"layer_decay": 1.0}  # the optimizer's groups have other scales

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
        layer_decay: float | None = None,
        generative_weight: float = 1.0,
        mask_ratio: float = MASK_RATIO,
        mask_inputs: bool = True,
        n_masks: int = 1,
        class_names: list[str] | None = None,
        keys: dict[str, str | int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        betas, class_names = plain(betas), plain(class_names)
        if num_classes < 2:
            raise ValueError(f"num_classes is {num_classes}; a classifier needs at least 2")
        if schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule is {schedule!r}; it must be 'constant' or 'cosine'")
        layer_decay = 1.0 if layer_decay is None else layer_decay
        if not 0 < layer_decay <= 1:
            raise ValueError(f"layer_decay is {layer_decay}; it must be above 0 and at most 1, which is no decay")
        heads.check_class_names(class_names, num_classes)
        rest = {"weight_decay": weight_decay, "warmup_steps": warmup_steps, "generative_weight": generative_weight}
        build.check_settings(above_zero={"lr": lr}, betas=betas, **rest)
        self.lr, self.betas, self.weight_decay, self.warmup_steps = lr, (betas[0], betas[1]), weight_decay, warmup_steps
        self.schedule, self.layer_decay, self.generative_weight = schedule, layer_decay, generative_weight
        self.mask_ratio, self.mask_inputs, self.n_masks, self.seed = mask_ratio, mask_inputs, n_masks, seed
        self.num_classes, self.class_names, self.names_given = num_classes, class_names, class_names is not None
        names = ("num_classes", "class_names", "lr", "weight_decay", "warmup_steps", "schedule", "layer_decay")
        masks = ("generative_weight", "mask_ratio", "mask_inputs", "n_masks", "seed")
        built = build.build_network(network, palette, pretrained, image_size=image_size)
        self.register(built, *names, *masks, keys=keys, betas=list(betas))
        build.check_masks(self.config, mask_ratio, mask_inputs, n_masks)
        if self.config.objective == "bert" and not mask_inputs and generative_weight != 0:
            text = "mask_inputs=False hides no pixel to predict, but generative_weight is"
            raise ValueError(f"{text} {generative_weight}; set generative_weight=0 or mask_inputs=True")
        self.head = nn.Linear(self.config.n_embd, num_classes, bias=False, device="cpu")
        nn.init.zeros_(self.head.weight)
        if generative_weight == 0:
            self.network.lm_head.requires_grad_(False)  # no gradient reaches it, which distributed training refuses

    @property
    def backbone(self) -> ImageGPT:
        """The network, under the name that Lightning's BackboneFinetuning looks for."""
        return self.network

    def setup(self, stage: str) -> None:
        heads.adopt_class_names(self)

    def forward(self, batch: Any) -> Tensor:
        """Class logits, float32 (B, C), of a batch; with several masks those of the mean probabilities."""
        return _mean_over_masks(self._per_mask(self.read(batch), 0))

    def on_train_start(self) -> None:
        heads.match_classes(self)
        super().on_train_start()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        whole, labels = read_labeled(self, batch, soft=True)
        masked = masks_for(self, whole, batch_idx)[0]
        hidden, logits = self._logits(whole.tokens, masked)
        classification = F.cross_entropy(logits.float(), labels)
        self.log("train/cross_entropy", classification, prog_bar=True)
        if self.generative_weight == 0:
            return classification
        tokens, pixels = whole.tokens, self.network.lm_head(hidden)  # (B, T), (B, T, K)
        generative = next_pixel_loss(pixels, tokens) if masked is None else masked_pixel_loss(pixels, tokens, masked)
        self.log("train/nats_per_pixel", generative * self.config.tokens_per_pixel)
        return classification + self.generative_weight * generative

    def new_metrics(self) -> dict[str, Any]:
        return {"accuracy": heads.Correct(1), "cross_entropy": build.mean()}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """For callbacks: ``probabilities`` float32 (B, C), ``prediction`` and ``label``, both int64 (B,)."""
        whole, labels = read_labeled(self, batch)
        per_mask = self._per_mask(whole, batch_idx)  # (M, B, C)
        samples, logits = sample_numbers(self, whole, batch_idx), _mean_over_masks(per_mask)  # (B,), (B, C)
        prediction = heads.vote(per_mask.unsqueeze(2), samples, seed=self.seed)  # (B, 1)
        metrics = self.metrics_of(dataloader_idx)
        metrics["accuracy"].update(prediction, labels)
        metrics["cross_entropy"].update(F.cross_entropy(logits, labels, reduction="none"))
        return {"probabilities": logits.softmax(-1), "prediction": prediction[:, 0], "label": labels}

    test_step = validation_step

    def on_validation_start(self) -> None:
        self.warn_if_untrained(self.head.weight)
        heads.match_classes(self)
        self.begin_evaluation()

    on_test_start = on_predict_start = on_validation_start

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Class probabilities, float32 (B, C); with several masks their mean."""
        return _mean_over_masks(self._per_mask(self.read(batch), batch_idx)).softmax(-1)

    def configure_optimizers(self) -> Any:
        optimizer = allow_clipping(self._adam())
        total = resume.total_steps(self)[0] if self.schedule == "cosine" else 0  # a constant rate needs no end
        scheduler = make_schedule(self.schedule, optimizer, self.warmup_steps, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        super().check_checkpoint(checkpoint)
        count, names = len(checkpoint["state_dict"]["head.weight"]), checkpoint["hyper_parameters"].get("class_names")
        if count != self.num_classes:
            what = f"num_classes is {self.num_classes}, but the checkpoint has {count} classes, {names}"
            raise ValueError(f"{what}; set num_classes={count}, or start a new run from its weights with pretrained=")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        heads.load_classes(self, checkpoint)

    def _adam(self) -> torch.optim.AdamW:
        """The optimizer, with a group for each layer where they train at different rates."""
        options: dict[str, Any] = {"lr": self.lr, "betas": self.betas, "weight_decay": self.weight_decay}
        network, head = self.network, self.head
        if self.layer_decay == 1:
            return make_adam([*network.parameters(), *head.parameters()], **options)
        top = [*network.ln_f.parameters(), *network.lm_head.parameters(), *head.parameters()]
        blocks = [list(block.parameters()) for block in reversed(network.h)]
        above = {id(parameter) for layer in (top, *blocks) for parameter in layer}
        embeddings = [parameter for parameter in network.parameters() if id(parameter) not in above]
        return make_adam(top, below=[*blocks, embeddings], layer_decay=self.layer_decay, **options)

    def _logits(self, tokens: Tensor, masked: Tensor | None) -> tuple[Tensor, Tensor]:
        """(final hidden states (B, T, D), class logits (B, C))."""
        hidden = self.network.hidden(tokens, masked=masked)
        return hidden, self.head(hidden.mean(1))

    def _per_mask(self, whole: Batch, batch_idx: int) -> Tensor:
        """Class logits under each mask of an evaluation, float32 (M, B, C)."""
        masks = masks_for(self, whole, batch_idx, self.n_masks)
        return torch.stack([self._logits(whole.tokens, masked)[1].float() for masked in masks])

    def log_metrics(self, stage: str) -> None:
        for metrics, ending in self.end_evaluation():
            for name, metric in metrics.items():
                value, shown = metric.compute().squeeze(), name == "accuracy"
                self.log(f"{stage}/{name}{ending}", value, prog_bar=shown, **build.COMPLETE)


def _mean_over_masks(logits: Tensor) -> Tensor:
    """Logits (B, C) whose softmax is the mean of the softmaxes of ``logits`` (M, B, C); those of one mask unchanged."""
    if len(logits) == 1:
        return logits[0]
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
