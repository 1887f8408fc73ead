"""Linear probes: a classifier on the pooled features of every layer (paper, sections 2.4, 3.4, 4.4 and 4.6)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_igpt.bases import is_model_parallel
from lightning_igpt.config import plain
from lightning_igpt.features import C_GRID
from lightning_igpt.modules import batches, build, heads, resume
from lightning_igpt.modules.batches import Batch, masks_for, read_labeled, sample_numbers
from lightning_igpt.modules.build import IGPTModule, NetworkLike, PaletteLike
from lightning_igpt.modules.solvers import Lbfgs, Neighbors, WholeFit
from lightning_igpt.objectives import MASK_RATIO
from lightning_igpt.optim import warmup_cosine

log = logging.getLogger(__name__)

MOMENTUM = 0.9  # of SGD: paper, section 3.4


class ProbeModule(IGPTModule):
    """Measure how linearly separable the classes are at each layer of a frozen network.

    With solver=lbfgs, one pass over the training images collects the features of all layers, and a classifier per layer
    is fitted to them. With knn, the images of that pass vote. With sgd, the classifiers are trained on batches.
    Validation logs ``probe/layer_<l>/accuracy``, picks the best layer (by the first of several loaders) and logs its
    ``val/accuracy``; test logs ``test/layer_<l>/accuracy`` and ``test/accuracy``, that of the picked layer.

    Args:
        pretrained: As in PretrainModule. None probes an untrained network, as a baseline; then give ``network``.
        layers: ``all``, or a list of layer numbers: 0 is the input of the first block, n_layer the final norm.
        network: As in PretrainModule.
        palette: As in PretrainModule.
        image_size: As in PretrainModule.
        num_classes: Number of classes. Default: the data's.
        class_names: Names of the classes. Default: the data's.
        solver: ``lbfgs`` fits to all features at once, as the paper does for CIFAR and STL-10. ``sgd`` keeps none, as
            the paper does for ImageNet: momentum 0.9, a cosine to zero; it needs a loader that shuffles. ``knn`` fits
            nothing: the k training images with the highest cosine to an image have exp(cosine / temperature) votes each
            (Caron et al., 2021); its checkpoints contain the features of all training images in float32.
        concat: lbfgs only: odd number of layers, centered on the best of validation, that are also fitted together (the
            paper: 5); logged as ``val/concat_accuracy`` and ``test/concat_accuracy``. Default: none.
        c: lbfgs only: inverse strength of the L2 penalty, as scikit-learn's C. From a list (default: 0.001, 0.01, 0.1,
            1, 10) each layer takes the best on a held-out tenth of the training images, then fits to all.
        standardize: Scale each feature to mean 0 and variance 1 first; under SGD by batch normalization without gain
            and bias, as in the probes of MAE (He et al., 2022).
        max_iter: lbfgs only: upper bound on steps per classifier.
        k: knn only: number of neighbors that vote.
        temperature: knn only: lower values give the nearest neighbors more weight.
        lr: sgd only: learning rate at the start. The paper tried 30, 10, 3, ... and does not state its scaling.
        weight_decay: sgd only: L2 decay of the weights. The paper states none.
        mask_ratio: BERT networks only: probability that an input pixel is hidden.
        mask_inputs: BERT networks only: hide input pixels, in evaluation too, as the paper does.
        n_masks: BERT networks only: masks under which an image is evaluated, as in FineTuneModule.
        max_feature_bytes: lbfgs only: features beyond this number of bytes per process move to temporary files in
            TMPDIR.
        keys: As in PretrainModule.
        seed: Seed of BERT's masks, of ties between their votes, and of the tenth that c is chosen on.
    """

    weight: nn.Parameter  # (layers, C, D)
    bias: Tensor  # (layers, C); a parameter under SGD
    best: Tensor  # index into layers of the best on validation; -1 before any validation

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
        solver: Literal["lbfgs", "sgd", "knn"] = "lbfgs",
        concat: int | None = None,
        c: float | list[float] | None = None,
        standardize: bool = True,
        max_iter: int = 1000,
        k: int = 20,
        temperature: float = 0.07,
        lr: float = 0.1,
        weight_decay: float = 0.0,
        mask_ratio: float = MASK_RATIO,
        mask_inputs: bool = True,
        n_masks: int = 1,
        max_feature_bytes: int = 4 * 2**30,
        keys: dict[str, str | int] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        layers, c, class_names = plain(layers), plain(c), plain(class_names)
        self.automatic_optimization = solver == "sgd"  # the others need all features at once, not batches
        grid = list(C_GRID) if c is None else list(c) if isinstance(c, (list, tuple)) else [c]
        numbers = {"max_iter": max_iter, "lr": lr, "weight_decay": weight_decay, "max_feature_bytes": max_feature_bytes}
        numbers |= {"k": k, "temperature": temperature}
        heads.check_fit(solver, grid, **numbers)
        heads.check_class_names(class_names, num_classes)
        self.names_given = class_names is not None
        self.pretrained, self.class_names, self.lr, self.weight_decay = pretrained, class_names, lr, weight_decay
        self.solver, self.c, self.standardize, self.concat = solver, c, standardize, concat
        self.k, self.temperature = k, temperature
        self.mask_ratio, self.mask_inputs, self.n_masks, self.seed = mask_ratio, mask_inputs, n_masks, seed
        names = ("solver", "concat", "c", "standardize", "mask_ratio", "mask_inputs", "n_masks", "seed", "class_names")
        built = build.build_network(network, palette, pretrained, image_size=image_size)
        self.register(built, *names, keys=keys, layers=layers, num_classes=num_classes, **numbers)
        self.network.requires_grad_(False).eval()
        build.check_masks(self.config, mask_ratio, mask_inputs, n_masks)
        self.layers = heads.choose_layers(layers, self.config.n_layer)
        heads.check_concat(concat, len(self.layers), solver)
        self._lbfgs = Lbfgs(grid, standardize, max_iter, seed, max_feature_bytes)
        self.set_classes(num_classes or 0)
        self.register_load_state_dict_pre_hook(heads.make_room)  # type: ignore[no-untyped-call]

    @property
    def best_layer(self) -> int:
        """Number of the layer that did best on validation; ValueError where no validation picked one of several."""
        return self.layers[self._picked()]

    def __dir__(self) -> list[str]:
        # A logger's graph is drawn by torch.jit.trace, which reads every attribute; this one may raise.
        return [name for name in super().__dir__() if name != "best_layer"]  # type: ignore[no-untyped-call]

    @property
    def accuracy_by_layer(self) -> dict[int, float]:
        """Accuracy per layer of the last validation or test."""
        return self.scores.column(int(self.scores.last), self.layers) if self.scores.last else {}

    @property
    def results(self) -> list[dict[str, Any]]:
        """One row per layer with layer, c, val_accuracy, test_accuracy; the last is that of concat, once fitted."""
        head = self.concat_head
        return self.scores.rows([*self.layers, *([head.name] if head is not None and head.fitted else [])])

    @property
    def c_by_layer(self) -> dict[int, float]:
        """The c that each layer's classifier was fitted with; empty under SGD."""
        return self.scores.column(0, self.layers)

    @property
    def fitted(self) -> bool:
        """Whether there are classifiers, or training images to compare with."""
        return bool(self.weight.any()) if self.neighbors is None else len(self.neighbors.labels) > 0

    def setup(self, stage: str) -> None:
        if is_model_parallel(self.trainer.strategy):
            raise ValueError("a probe's network is frozen and is not sharded; use strategy='ddp', or one device")
        if not self.num_classes:
            if (count := heads.classes_of_data(self.trainer)[0]) is None:
                raise ValueError("cannot infer num_classes from the data; set num_classes=")
            self.set_classes(count)
        if stage == "fit" and self.solver != "sgd":
            self.trained_classes = None  # a fit begins from zero, unless a checkpoint is loaded now
        heads.adopt_class_names(self)

    def train(self, mode: bool = True) -> ProbeModule:
        """Keep the frozen network in evaluation mode, whatever Lightning asks for."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, batch: Any) -> Tensor:
        """Class logits of every layer's classifier, (B, layers, C); of several masks the first counts."""
        return self.logits(self._features(self.read(batch), 0)[0])

    def logits(self, features: Tensor, *, batches: int | None = None) -> Tensor:
        """Class logits (..., layers, C) of features (..., layers, D); ``batches`` is for RunningScale in training."""
        with torch.autocast(self.device.type, enabled=False):  # as exact as the fit
            if self.neighbors is not None:
                votes: Tensor = self.neighbors(features.float())
                return votes
            features = self.scale(features, batches) if self.scale is not None else features
            weight, bias = self.weight.float(), self.bias.float()
            if batches is None:
                weight, bias = weight.detach(), bias.detach()
            return torch.einsum("...ld,lcd->...lc", features, weight) + bias

    def on_train_start(self) -> None:
        if self.pretrained is None:
            log.warning("no pretrained=: probing a network that was never trained")
        if self.solver != "sgd":
            self._lbfgs.forget(self)
        if self.solver != "sgd" or getattr(resume.trainer_of(self), "ckpt_path", None) is None:
            self.scores = heads.Scores(len(self.layers) + 1).to(self.device)
        heads.match_classes(self)
        super().on_train_start()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        whole, labels = read_labeled(self, batch)
        features = self._features(whole, batch_idx)[0]
        if self.solver != "sgd":
            self._lbfgs.collect(self, features, labels, whole.samples, batch_idx)
            return None
        logits = self.logits(features, batches=batches.count_batches(self))  # (B, layers, C)
        mean = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(len(self.layers)))
        self.log("train/cross_entropy", mean, prog_bar=True)
        return mean * len(self.layers)  # so that each layer learns as if it were alone

    def on_train_end(self) -> None:
        if len(self._lbfgs.training):
            log.warning("concat=%d was not fitted: without validation data no layer was picked", self.concat)
        self._lbfgs.close()

    def new_metrics(self) -> dict[str, Any]:
        return {"correct": heads.Correct(len(self.layers) + 1)}  # the last counts for concat

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        # Before the fit, a sanity check still looks for bad batches and labels; other validation has nothing to count.
        if getattr(resume.trainer_of(self), "sanity_checking", False) or self.fitted:
            self._evaluate(batch, batch_idx, dataloader_idx)

    def on_validation_start(self) -> None:
        self._lbfgs.forget_validation()
        heads.match_classes(self)
        self.begin_evaluation()

    def on_test_start(self) -> None:
        if not self.fitted:
            raise ValueError("this probe was not fitted yet: call trainer.fit first, or pass ckpt_path")
        self.on_validation_start()

    on_predict_start = on_test_start

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """For callbacks: ``probabilities`` (B, C), ``prediction`` and ``label`` (B,) of the picked layer, if any."""
        probabilities, predictions, labels = self._evaluate(batch, batch_idx, dataloader_idx)
        if len(self.layers) > 1 and self.best < 0:
            return {}
        picked = self._picked()
        return {"probabilities": probabilities[:, picked], "prediction": predictions[:, picked], "label": labels}

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Class probabilities of the best layer's classifier, float32 (B, C); with several masks their mean."""
        features = self._features(self.read(batch), batch_idx, every_mask=True)
        return self.logits(features)[:, :, self._picked()].softmax(-1).mean(0)

    def configure_optimizers(self) -> Any:
        if self.solver != "sgd":
            return WholeFit([self.weight])
        total, _ = resume.total_steps(self)
        groups: list[dict[str, Any]] = [
            {"params": [self.weight], "weight_decay": self.weight_decay, "lr_scale": 1.0, "decayed": True},
            {"params": [self.bias], "lr_scale": 1.0, "decayed": False},
        ]
        optimizer = torch.optim.SGD(groups, lr=self.lr, momentum=MOMENTUM)
        scheduler = warmup_cosine(optimizer, warmup_steps=0, total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        super().check_checkpoint(checkpoint)
        heads.check_same_probe(self.hparams, checkpoint["hyper_parameters"], self.config.n_layer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        heads.load_classes(self, checkpoint)
        self.set_classes(checkpoint["state_dict"]["bias"].shape[1])

    def _picked(self) -> int:
        if len(self.layers) > 1 and self.best < 0:
            raise ValueError("no layer was picked: fit with validation data, or name a single layer in layers=")
        return max(0, int(self.best))

    def set_classes(self, num_classes: int) -> None:
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
        self.scores = heads.Scores(n_layers + 1).to(device)
        neighbors = Neighbors(n_layers, num_classes, width, self.k, self.temperature).to(device)
        self.neighbors = neighbors if self.solver == "knn" else None

    def _features(self, whole: Batch, batch_idx: int, *, every_mask: bool = False) -> Tensor:
        """Pooled taps under the first or every mask of an evaluation, float32 (M, B, layers, D)."""
        masks = masks_for(self, whole, batch_idx, self.n_masks if every_mask else 1)
        with torch.no_grad():
            taps = [self.network.features(whole.tokens, self.layers, masked=mask) for mask in masks]
        return torch.stack(taps).float()

    def _evaluate(self, batch: Any, batch_idx: int, loader: int) -> tuple[Tensor, Tensor, Tensor]:
        """Count; return probabilities (B, layers, C), predictions (B, layers) and labels (B,)."""
        whole, labels = read_labeled(self, batch)
        features = self._features(whole, batch_idx, every_mask=True)
        samples, head, logits = sample_numbers(self, whole, batch_idx), self.concat_head, self.logits(features)
        predictions, correct = heads.vote(logits, samples, seed=self.seed), self.metrics_of(loader)["correct"]
        correct.update(predictions, labels)
        if head is not None and head.fitted:
            together = head(lambda place: features[:, :, place]).unsqueeze(2)  # (M, B, 1, C)
            correct.update(heads.vote(together, samples, seed=self.seed), labels, first=len(self.layers))
        elif len(self._lbfgs.training):
            self._lbfgs.keep(features, labels, samples, loader)
        return logits.softmax(-1).mean(0), predictions, labels

    def log_metrics(self, stage: str) -> None:
        """Pick the best layer on validation, and log the accuracies of every loader; the first's are ``results``."""
        evaluated, n_layers, prefix = self.end_evaluation(), len(self.layers), {"val": "probe"}.get(stage, stage)
        if getattr(resume.trainer_of(self), "sanity_checking", False) or not self.fitted:
            return
        counts = [metrics["correct"] for metrics, _ in evaluated]
        if stage == "val":
            self.best.fill_(int(counts[0].compute()[:n_layers].argmax()))
            if len(self._lbfgs.training):
                self._lbfgs.fit_together(self, counts)
        is_picked, together = n_layers == 1 or self.best >= 0, len(self.results) > n_layers
        self.scores.put(f"{stage}_accuracy", counts[0].compute()[: n_layers + together])
        for correct, (_, ending) in zip(counts, evaluated, strict=True):
            *accuracies, last = accuracy = correct.compute()
            for layer, value in zip(self.layers, accuracies, strict=True):
                self.log(f"{prefix}/layer_{layer}/accuracy{ending}", value, **build.COMPLETE)
            if is_picked:
                self.log(f"{stage}/accuracy{ending}", accuracy[self._picked()], prog_bar=True, **build.COMPLETE)
            if together:
                self.log(f"{stage}/concat_accuracy{ending}", last, **build.COMPLETE)
        if is_picked:
            self.log(f"{stage}/best_layer", float(self.best_layer), **build.COMPLETE)
        else:
            log.warning("test/accuracy is left out: without validation data no layer was picked")
