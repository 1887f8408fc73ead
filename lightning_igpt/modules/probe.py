"""Linear probes: a classifier on the pooled features of every layer (paper, sections 2.4, 3.4, 4.4 and 4.6)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_igpt.bases import LightningModule, is_model_parallel
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.features import C_GRID
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules import build, heads, resume
from lightning_igpt.modules.batches import Batch, evaluation_masks, need_labels, read_batch, sample_numbers
from lightning_igpt.modules.build import NetworkLike, PaletteLike
from lightning_igpt.modules.solvers import Lbfgs, Logistic, WholeFit
from lightning_igpt.objectives import MASK_RATIO
from lightning_igpt.optim import warmup_cosine
from lightning_igpt.palette import Palette

log = logging.getLogger(__name__)

RESULTS = "probe_results"  # key in a checkpoint
MOMENTUM = 0.9  # of SGD: paper, section 3.4


class ProbeModule(LightningModule):
    """Measure how linearly separable the classes are at each layer of a frozen network.

    With solver=lbfgs, one pass over the training images collects the features of all layers, one classifier per layer
    is fitted to them, and ``fit`` ends. With solver=sgd the classifiers are trained on batches. Validation logs
    ``probe/layer_<l>/accuracy``, picks the best layer and logs its ``val/accuracy``; test logs
    ``test/layer_<l>/accuracy`` and, as ``test/accuracy``, that of the layer picked on validation.

    Args:
        pretrained: As in PretrainModule. None probes an untrained network, as a baseline; then give ``network``.
        layers: ``all``, or a list of layer numbers: 0 is the input of the first block, n_layer the final norm.
        network: As in PretrainModule.
        palette: As in PretrainModule.
        image_size: As in PretrainModule.
        num_classes: Number of classes. Default: the data's.
        class_names: Names of the classes. Default: the data's.
        solver: ``lbfgs`` fits to all features at once, as the paper does for CIFAR and STL-10. ``sgd`` keeps none, as
            the paper does for ImageNet: momentum 0.9, a cosine to zero; it needs a loader that shuffles.
        concat: lbfgs only: an odd number of layers, centered on the best, that are fitted together once validation has
            picked that (the paper: 5); logged as ``val/concat_accuracy`` and ``test/concat_accuracy``. Default: none.
        c: lbfgs only: inverse strength of the L2 penalty, as scikit-learn's C. From a list (default: 0.001, 0.01, 0.1,
            1, 10) each layer takes what is best on a held-out tenth of the training images, then fits to all.
        standardize: Scale each feature to mean 0 and variance 1 first; under SGD by batch normalization without gain
            and bias, as in the probes of MAE (He et al., 2022).
        max_iter: lbfgs only: upper bound on steps per classifier.
        lr: sgd only: learning rate at the start. The paper tried 30, 10, 3, ... and does not state its scaling.
        weight_decay: sgd only: L2 decay of the weights. The paper states none.
        mask_ratio: BERT networks only: probability that an input pixel is hidden.
        mask_inputs: BERT networks only: hide input pixels, in evaluation too, as the paper does.
        n_masks: BERT networks only: masks under which an image is evaluated, as in FineTuneModule.
        max_feature_bytes: lbfgs only: features beyond so many bytes per process move to temporary files, in TMPDIR.
        seed: Seed of BERT's masks, of ties between their votes, and of the tenth that c is chosen on.
    """

    network: ImageGPT
    palette: Palette
    palette_colors: Tensor
    origin: str | None
    validated_at: int | None = None  # the optimizer step of the last validation
    random_states: Any = None  # nothing is drawn in training
    weight: nn.Parameter  # (layers, C, D)
    bias: Tensor  # (layers, C); a parameter under SGD
    best: Tensor  # index into layers of the best on validation; -1 before any validation
    results: list[dict[str, Any]]  # a row per layer: layer, c, val_accuracy, test_accuracy; last that of concat

    def __init__(
        self,
        pretrained: str | None = None,
        layers: Literal["all"] | list[int] = "all",
        *,
        network: NetworkLike = None,
        palette: PaletteLike = None,
        image_size: int | None = None,
        num_classes: int | None = None,
        class_names: list[str] | None = None,
        solver: Literal["lbfgs", "sgd"] = "lbfgs",
        concat: int | None = None,
        c: float | list[float] | None = None,
        standardize: bool = True,
        max_iter: int = 1000,
        lr: float = 0.1,
        weight_decay: float = 0.0,
        mask_ratio: float = MASK_RATIO,
        mask_inputs: bool = True,
        n_masks: int = 1,
        max_feature_bytes: int = 4 * 2**30,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = solver == "sgd"  # L-BFGS needs all features at once, not batches
        grid = list(C_GRID) if c is None else list(c) if isinstance(c, (list, tuple)) else [c]
        numbers = {"max_iter": max_iter, "lr": lr, "weight_decay": weight_decay, "max_feature_bytes": max_feature_bytes}
        heads.check_fit(solver, grid, **numbers)
        build.check_class_names(class_names, num_classes)
        self.pretrained, self.class_names, self.lr, self.weight_decay = pretrained, class_names, lr, weight_decay
        self.solver, self.c, self.standardize, self.concat = solver, c, standardize, concat
        self.mask_ratio, self.mask_inputs, self.n_masks, self.seed = mask_ratio, mask_inputs, n_masks, seed
        names = ("solver", "concat", "c", "standardize", "mask_ratio", "mask_inputs", "n_masks", "seed", "class_names")
        built = build.build_network(network, palette, pretrained, image_size=image_size)
        build.register(self, built, *names, layers=layers, num_classes=num_classes, **numbers)
        self.network.requires_grad_(False).eval()
        build.check_masks(self.config, mask_ratio, mask_inputs, n_masks)
        self.layers = heads.choose_layers(layers, self.config.n_layer)
        heads.check_concat(concat, len(self.layers), solver)
        self.correct = heads.Correct(len(self.layers) + 1)  # the last counts for concat
        self._lbfgs = Lbfgs(Logistic(grid, standardize, max_iter, seed), max_feature_bytes)
        self._set_classes(num_classes or 0)

    @property
    def config(self) -> ImageGPTConfig:
        """The network's shape; data modules read ``image_size`` here."""
        return self.network.config

    def tokens_of(self, batch: Any) -> Tensor:
        """The tokens of a batch, int64 (B, T); callbacks read batches through this."""
        return read_batch(batch, self.palette, self.config).tokens

    @property
    def best_layer(self) -> int:
        """Number of the layer that did best on validation; ValueError where no validation picked one of several."""
        return self.layers[self._picked()]

    @property
    def accuracy_by_layer(self) -> dict[int, float]:
        """Accuracy per layer of the last validation or test."""
        return self._by_layer(self._last) if self._last else {}

    @property
    def c_by_layer(self) -> dict[int, float]:
        """The c that each layer's classifier was fitted with; empty under SGD."""
        return self._by_layer("c")

    def setup(self, stage: str) -> None:
        if is_model_parallel(self.trainer.strategy):
            raise ValueError("a probe's network is frozen and is not sharded; use strategy='ddp', or one device")
        if not self.num_classes:
            count, _ = build.classes_of_data(self.trainer)
            if count is None:
                raise ValueError("num_classes is unknown: the data does not name its classes, so set num_classes=")
            self._set_classes(count)
        build.adopt_class_names(self)

    def train(self, mode: bool = True) -> ProbeModule:
        """Keep the frozen network in evaluation mode, whatever Lightning asks for."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, batch: Any) -> Tensor:
        """Class logits of every layer's classifier, (B, layers, C); of several masks the first counts."""
        return self.logits(self._features(read_batch(batch, self.palette, self.config), 0)[0])

    def logits(self, features: Tensor, *, batches: int | None = None) -> Tensor:
        """Class logits (..., layers, C) of features (..., layers, D); ``batches`` is for RunningScale in training."""
        with torch.autocast(self.device.type, enabled=False):  # as exact as the fit
            features = self.scale(features, batches) if self.scale is not None else features
            weight, bias = self.weight.float(), self.bias.float()
            if batches is None:
                weight, bias = weight.detach(), bias.detach()
            return torch.einsum("...ld,lcd->...lc", features, weight) + bias

    def on_train_start(self) -> None:
        if self.pretrained is None:
            log.warning("no pretrained=: probing a network that was never trained")
        self._clear_results()
        if self.solver == "lbfgs":
            self._lbfgs.forget(self)
        resume.start_training(self)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        read = read_batch(batch, self.palette, self.config)
        labels, features = need_labels(read, self.num_classes), self._features(read, batch_idx)[0]
        if self.solver == "lbfgs":
            self._lbfgs.collect(self, features, labels, read.samples, batch_idx)
            return None
        logits = self.logits(features, batches=self.trainer.fit_loop.total_batch_idx + 1)  # (B, layers, C)
        mean = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(len(self.layers)))
        self.log("train/cross_entropy", mean, prog_bar=True)
        return mean * len(self.layers)  # so that each layer learns as if it were alone

    def on_train_end(self) -> None:
        if len(self._lbfgs.training):
            log.warning("concat=%d was not fitted: without validation data no layer was picked", self.concat)
        self._lbfgs.close()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        # Before the fit, a sanity check still looks for bad batches and labels; other validation has nothing to count.
        if self.trainer.sanity_checking or self.weight.any():
            self._evaluate(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        build.note_validation(self)
        if self.trainer.sanity_checking or not self.weight.any():
            return
        accuracy = self._finish("val", "probe")
        self.best.fill_(int(accuracy.argmax()))
        self.log("val/accuracy", accuracy.max(), prog_bar=True, sync_dist=True)
        self.log("val/best_layer", float(self.best_layer), sync_dist=True)
        if len(self._lbfgs.training):
            self._lbfgs.fit_together(self)
        self._finish_concat("val")

    def on_test_start(self) -> None:
        if not self.weight.any():
            raise ValueError("this probe was not fitted yet: call trainer.fit first, or pass ckpt_path")

    on_predict_start = on_test_start

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """For callbacks: ``probabilities`` (B, C), ``prediction`` and ``label`` (B,) of the picked layer, if any."""
        probabilities, predictions, labels = self._evaluate(batch, batch_idx)
        if len(self.layers) > 1 and self.best < 0:
            return {}
        picked = self._picked()
        return {"probabilities": probabilities[:, picked], "prediction": predictions[:, picked], "label": labels}

    def on_test_epoch_end(self) -> None:
        accuracy = self._finish("test", "test")
        self._finish_concat("test")
        if len(self.layers) > 1 and self.best < 0:
            log.warning("test/accuracy is left out: without validation data no layer was picked")
            return
        self.log("test/accuracy", accuracy[self._picked()], sync_dist=True)
        self.log("test/best_layer", float(self.best_layer), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities of the best layer's classifier, float32 (B, C); with several masks their mean."""
        features = self._features(read_batch(batch, self.palette, self.config), batch_idx, every_mask=True)
        return self.logits(features)[:, :, self._picked()].softmax(-1).mean(0)

    def configure_optimizers(self) -> Any:
        if self.solver == "lbfgs":
            return WholeFit([self.weight])
        total, _ = resume.total_steps(self.trainer)
        groups: list[dict[str, Any]] = [
            {"params": [self.weight], "weight_decay": self.weight_decay, "lr_scale": 1.0, "decayed": True},
            {"params": [self.bias], "lr_scale": 1.0, "decayed": False},
        ]
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=MOMENTUM)
        scheduler = warmup_cosine(optimizer, warmup_steps=0, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise ValueError where the checkpoint's classifiers are not this probe's; names both values."""
        build.check_stamp(self, checkpoint)
        heads.check_same_probe(self.hparams, checkpoint["hyper_parameters"], self.config.n_layer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        build.save(self, checkpoint)
        checkpoint[RESULTS] = [dict(row) for row in self.results]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        build.load(self, checkpoint)
        self._set_classes(checkpoint["state_dict"]["bias"].shape[1])
        self.results = [dict(row) for row in checkpoint.get(RESULTS, self.results)]

    def _picked(self) -> int:
        if len(self.layers) > 1 and self.best < 0:
            raise ValueError("no layer was picked: fit with validation data, or name a single layer in layers=")
        return max(0, int(self.best))

    def _set_classes(self, num_classes: int) -> None:
        """Make the classifiers, for a number of classes that may come from the data only in ``setup``."""
        n_layers, width, device = len(self.layers), self.config.n_embd, self.device
        self.num_classes = num_classes
        self.hparams["num_classes"] = num_classes or None
        # A parameter, because Lightning's distributed strategies need one; under L-BFGS no gradient ever reaches it.
        self.weight = nn.Parameter(torch.zeros(n_layers, num_classes, width, device=device))
        bias = torch.zeros(n_layers, num_classes, device=device)
        if self.solver == "sgd":
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias)
        self.register_buffer("best", torch.full((), -1, dtype=torch.long, device=device))
        scaled, concat = self.solver == "sgd" and self.standardize, self.concat
        self.scale = heads.RunningScale(n_layers, width).to(device) if scaled else None
        self.concat_head = heads.ConcatHead(self.layers, concat, num_classes, width).to(device) if concat else None
        self._clear_results()

    def _clear_results(self) -> None:
        self.results = [heads.empty_row(layer) for layer in self.layers]
        self._last = ""  # the column of the last evaluation

    def _by_layer(self, column: str) -> dict[int, float]:
        values = {layer: row[column] for layer, row in zip(self.layers, self.results, strict=False)}
        return {layer: value for layer, value in values.items() if value is not None}

    def _features(self, read: Batch, batch_idx: int, *, every_mask: bool = False) -> Tensor:
        """Pooled taps under the first or every mask of an evaluation, float32 (M, B, layers, D)."""
        masks = evaluation_masks(self, read, batch_idx)[: None if every_mask else 1]
        with torch.no_grad():
            taps = [self.network.features(read.tokens, self.layers, masked=mask) for mask in masks]
        return torch.stack(taps).float()

    def _evaluate(self, batch: Any, batch_idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Count; return probabilities (B, layers, C), predictions (B, layers) and labels (B,)."""
        read = read_batch(batch, self.palette, self.config)
        labels, features = need_labels(read, self.num_classes), self._features(read, batch_idx, every_mask=True)
        samples, head, logits = sample_numbers(self, read, batch_idx), self.concat_head, self.logits(features)
        predictions = heads.vote(logits, samples, seed=self.seed)
        if not self.trainer.sanity_checking:
            self.correct.update(predictions, labels)
            if head is not None and head.fitted:
                together = head(lambda place: features[:, :, place]).unsqueeze(2)  # (M, B, 1, C)
                self.correct.update(heads.vote(together, samples, seed=self.seed), labels, first=len(self.layers))
            elif len(self._lbfgs.training):  # until the layers are fitted together: of each label M rows
                self._lbfgs.validation.add(features.transpose(0, 1).flatten(0, 1), labels, samples)
        return logits.softmax(-1).mean(0), predictions, labels

    def _finish(self, stage: str, prefix: str) -> Tensor:
        """Tabulate, log and return each layer's accuracy, (layers,)."""
        self._last = f"{stage}_accuracy"
        accuracy: Tensor = self.correct.compute()[: len(self.layers)]
        for layer, row, value in zip(self.layers, self.results, accuracy, strict=False):
            row[self._last] = value.item()
            self.log(f"{prefix}/layer_{layer}/accuracy", value, sync_dist=True)
        return accuracy

    def _finish_concat(self, stage: str) -> None:
        if self.concat_head is not None and self.concat_head.fitted:
            accuracy = self.correct.compute()[-1]
            self.results[-1][self._last] = accuracy.item()
            self.log(f"{stage}/concat_accuracy", accuracy, sync_dist=True)
        self.correct.reset()
