"""Linear probes: a classifier on the pooled features of every layer (paper, sections 2.4, 3.4, 4.4 and 4.6).

How the classifiers come about stands in ``lbfgs`` and ``sgd``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_igpt.features import C_GRID
from lightning_igpt.modules.batches import Batch, need_labels, read_batch
from lightning_igpt.modules.probing.fitting import Logistic
from lightning_igpt.modules.probing.heads import ConcatHead, vote
from lightning_igpt.modules.probing.lbfgs import Lbfgs
from lightning_igpt.modules.probing.scores import Scores
from lightning_igpt.modules.probing.settings import (
    check_concat,
    check_fit,
    check_same_probe,
    check_votes,
    choose_layers,
)
from lightning_igpt.modules.probing.sgd import RunningScale, Sgd
from lightning_igpt.modules.resumable import ResumableModule
from lightning_igpt.modules.shared import (
    NetworkLike,
    PaletteLike,
    adopt_class_names,
    build_network,
    check_class_names,
    check_mask_ratio,
    evaluation_masks,
    keep_rates,
    register,
    sample_numbers,
)
from lightning_igpt.objectives import MASK_RATIO

log = logging.getLogger(__name__)

RESULTS = "probe_results"  # key in a checkpoint


class ProbeModule(ResumableModule):
    """Measure how linearly separable the classes are at each layer of a frozen network.

    With solver=lbfgs, one pass over the training images collects the features of all layers, one classifier per layer
    is fitted to them, and ``fit`` ends. With solver=sgd the classifiers are trained on batches for as long as the
    trainer says. Validation logs ``probe/layer_<l>/accuracy``, picks the best layer and logs its ``val/accuracy``; test
    logs ``test/layer_<l>/accuracy`` and, as ``test/accuracy``, that of the layer picked on validation. On several
    devices each training image counts once; only a sampler of your own must not repeat images.

    Args:
        pretrained: The network to probe: a .ckpt file or run folder, a Hugging Face folder or hub id, or an OpenAI
            checkpoint. None probes an untrained network, as a baseline; then give ``network``.
        layers: ``all``, or a list of layer numbers: 0 is the input of the first block, n_layer the final norm.
        network: Preset name or the fields of an ImageGPTConfig. Default: the network of ``pretrained``, else igpt_s.
        palette: As in PretrainModule. Default: the palette of ``pretrained``, else openai.
        image_size: Side of the images in pixels. Default: the network's own. With ``pretrained`` of another size its
            table of positions is interpolated.
        num_classes: Number of classes. Default: the data's.
        class_names: Names of the classes. Default: the data's.
        solver: ``lbfgs`` fits to all features at once, as the paper does for CIFAR and STL-10. ``sgd`` keeps no
            features, as the paper does for ImageNet: momentum 0.9 and a cosine to zero over the run; it needs a loader
            that shuffles.
        concat: lbfgs only: an odd number of layers, centred on the best, that are fitted together as soon as validation
            has picked that one (the paper: 5); logged as ``val/concat_accuracy`` and ``test/concat_accuracy``. Default:
            no such classifier.
        c: lbfgs only: inverse strength of the L2 penalty, as scikit-learn's C; the paper does not state it. From a list
            each layer takes what is best on a held-out tenth of the training images, then fits to all of them.
            Default: the list 0.001, 0.01, 0.1, 1, 10.
        standardize: Scale each feature to mean 0 and variance 1 first; the paper does not state it. Under SGD this is
            batch normalisation without gain and bias, our choice as in the probes of MAE (He et al., 2022).
        max_iter: lbfgs only: upper bound on steps per classifier.
        lr: sgd only: learning rate at the start. The paper tried 30, 10, 3, ... and does not state its scaling.
        weight_decay: sgd only: L2 decay of the weights. The paper states none.
        mask_ratio: BERT networks only: probability that an input pixel is hidden.
        mask_inputs: BERT networks only: hide input pixels, in evaluation too, as the paper does. False probes whole
            images.
        n_masks: BERT networks only: masks under which an image is evaluated. With several, accuracy counts the class
            that most masks vote for (section 4.6: 5), ties at random; predictions are the mean of the probabilities.
            In training an image has one mask.
        max_feature_bytes: lbfgs only: features beyond so many bytes per process (default 4 GiB) wait in temporary files
            instead of memory; TMPDIR says where.
        seed: Seed of BERT's masks, of ties between their votes, and of the tenth that c is chosen on.

    Raises:
        ValueError: A layer does not exist, or arguments contradict each other or the loaded weights.
    """

    palette_colors: Tensor
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
        self.automatic_optimization = solver == "sgd"  # L-BFGS sees all features at once, not batches
        grid = list(C_GRID) if c is None else list(c) if isinstance(c, (list, tuple)) else [c]
        numbers = {"max_iter": max_iter, "lr": lr, "weight_decay": weight_decay, "max_feature_bytes": max_feature_bytes}
        check_fit(solver, grid, **numbers)
        check_class_names(class_names, num_classes)
        check_mask_ratio(mask_ratio)
        built = build_network(network, palette, pretrained, image_size=image_size)
        self.network, self.palette, self.origin, self.origin_path = built
        self.network.requires_grad_(False).eval()
        check_votes(self.config.objective, mask_inputs, n_masks)
        self.layers = choose_layers(layers, self.config.n_layer)
        check_concat(concat, len(self.layers), solver)
        self.pretrained, self.class_names, self.lr, self.weight_decay = pretrained, class_names, lr, weight_decay
        self.solver, self.c, self.standardize, self.concat = solver, c, standardize, concat
        self.mask_ratio, self.mask_inputs, self.n_masks, self.seed = mask_ratio, mask_inputs, n_masks, seed
        logistic = Logistic(grid, standardize=standardize, max_iter=max_iter, seed=seed)
        self._solver = Sgd(lr, weight_decay) if solver == "sgd" else Lbfgs(logistic, max_feature_bytes)
        probed = {"layers": layers, "solver": solver, "concat": concat, "c": c, "standardize": standardize}
        masks = {"mask_ratio": mask_ratio, "mask_inputs": mask_inputs, "n_masks": n_masks, "seed": seed}
        classes = {"num_classes": num_classes, "class_names": class_names}
        register(self, self.network, self.palette, **probed, **numbers, **masks, **classes)
        self._set_classes(num_classes or 0)

    @property
    def best_layer(self) -> int:
        """Number of the layer that did best on validation.

        Raises:
            ValueError: There are several, and no validation picked one.
        """
        return self.layers[self._picked()]

    @property
    def results(self) -> list[dict[str, Any]]:
        """A row per layer: layer, c, val_accuracy, test_accuracy, None where unknown; last that of concat, "8-12"."""
        return self.scores.rows

    @property
    def accuracy_by_layer(self) -> dict[int, float]:
        """Accuracy per layer of the last validation or test."""
        return self.scores.by_layer(self._last) if self._last else {}

    @property
    def c_by_layer(self) -> dict[int, float]:
        """The c that each layer's classifier was fitted with; empty under SGD."""
        return self.scores.by_layer("c")

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if not self.num_classes:
            found = getattr(getattr(self.trainer, "datamodule", None), "num_classes", None)
            if found is None:
                raise ValueError("num_classes is unknown: the data does not tell it, so set num_classes=")
            self._set_classes(int(found))
        adopt_class_names(self, self.num_classes)

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

    def on_fit_start(self) -> None:
        if self.pretrained is None:
            log.warning("no pretrained=: probing a network that was never trained")

    def on_train_start(self) -> None:
        self.scores.clear()
        self._solver.start(self)
        super().on_train_start()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        read = read_batch(batch, self.palette, self.config)
        labels, features = need_labels(read, self.num_classes), self._features(read, batch_idx)[0]
        return self._solver.step(self, features, labels, read.samples, batch_idx)

    def on_train_end(self) -> None:
        self._solver.end(self)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        # Before the fit, a sanity check still finds bad batches and labels; other validation has nothing to say.
        if self.trainer.sanity_checking or self.weight.any():
            self._evaluate(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.trainer.sanity_checking or not self.weight.any():
            return
        accuracy = self._finish("val", "probe")
        self.best.fill_(int(accuracy.argmax()))
        self.log("val/accuracy", accuracy.max(), prog_bar=True, sync_dist=True)
        self.log("val/best_layer", float(self.best_layer), sync_dist=True)
        if isinstance(self._solver, Lbfgs) and self._solver.waits:
            self._solver.fit_together(self)
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
        return self._solver.configure(self)

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        super().check_checkpoint(checkpoint)
        check_same_probe(self.hparams, checkpoint["hyper_parameters"], self.config.n_layer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[RESULTS] = [dict(row) for row in self.results]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if "state_dict" in checkpoint:  # ModelParallelStrategy has loaded and removed it
            self._set_classes(checkpoint["state_dict"]["bias"].shape[1])
        self.scores.rows = [dict(row) for row in checkpoint.get(RESULTS, self.results)]
        keep_rates(self, checkpoint)
        for state in checkpoint.get("optimizer_states", []):
            state["param_groups"][0]["weight_decay"] = self.weight_decay

    def _moving(self) -> dict[str, Tensor]:
        return {} if self.scale is None else {f"scale.{name}": value for name, value in self.scale.named_buffers()}

    def _picked(self) -> int:
        if len(self.layers) > 1 and self.best < 0:
            raise ValueError("no layer was picked: fit with validation data, or name a single one in layers=")
        return max(0, int(self.best))

    def _set_classes(self, num_classes: int) -> None:
        """Make the classifiers, for a number of classes that the data may tell only in ``setup``."""
        n_layers, width, descends = len(self.layers), self.config.n_embd, isinstance(self._solver, Sgd)
        self.num_classes = num_classes
        self.hparams["num_classes"] = num_classes or None
        # A parameter, because Lightning's distributed strategies want one; under L-BFGS no gradient ever reaches it.
        self.weight = nn.Parameter(torch.zeros(n_layers, num_classes, width, device=self.device))
        bias = torch.zeros(n_layers, num_classes, device=self.device)
        if descends:
            self.bias = nn.Parameter(bias)
        else:
            self.register_buffer("bias", bias)
        self.register_buffer("best", torch.full((), -1, dtype=torch.long, device=self.device))
        self.scale = RunningScale(n_layers, width).to(self.device) if descends and self.standardize else None
        concat = ConcatHead(self.layers, self.concat, num_classes, width) if self.concat else None
        self.concat_head = None if concat is None else concat.to(self.device)
        self.scores = Scores(self.layers, num_classes).to(self.device)
        self._last = ""

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
        predictions = vote(logits, samples, seed=self.seed)
        if not self.trainer.sanity_checking:
            self.scores.update(predictions, labels)
            if head is not None and head.fitted:
                together = head(lambda place: features[:, :, place]).unsqueeze(2)  # (M, B, 1, C)
                self.scores.update(vote(together, samples, seed=self.seed), labels, first=len(self.layers))
            elif isinstance(self._solver, Lbfgs) and self._solver.waits:
                self._solver.keep(features, labels, samples)
        return logits.softmax(-1).mean(0), predictions, labels

    def _finish(self, stage: str, prefix: str) -> Tensor:
        """Log and return each layer's accuracy, (layers,)."""
        self._last = f"{stage}_accuracy"
        accuracy = self.scores.finish(self._last, range(len(self.layers)))
        for layer, value in zip(self.layers, accuracy, strict=True):
            self.log(f"{prefix}/layer_{layer}/accuracy", value, sync_dist=True)
        return accuracy

    def _finish_concat(self, stage: str) -> None:
        if self.concat_head is not None and self.concat_head.fitted:
            place = len(self.layers)
            accuracy = self.scores.finish(f"{stage}_accuracy", range(place, place + 1))
            self.log(f"{stage}/concat_accuracy", accuracy[0], sync_dist=True)
