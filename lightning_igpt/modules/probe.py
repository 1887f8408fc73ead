"""Linear probes: logistic regression on pooled features of every layer (paper, sections 2.4 and 3.4)."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.features import fit_logistic
from lightning_igpt.modules.batches import need_labels, read_batch
from lightning_igpt.modules.shared import (
    NetworkLike,
    PaletteLike,
    adopt_class_names,
    build_network,
    check_mask_ratio,
    check_settings,
    check_stamp,
    mask_for,
    register,
    stamp,
)
from lightning_igpt.objectives import MASK_RATIO

log = logging.getLogger(__name__)


class ProbeModule(LightningModule):
    """Measure how linearly separable the classes are at each layer of a frozen network.

    One pass over the training images collects the features of all layers; L-BFGS then fits one classifier per layer,
    and ``fit`` ends. Validation logs ``probe/layer_<l>/accuracy``, picks the best layer and logs its ``val/accuracy``;
    test logs ``test/layer_<l>/accuracy`` and, as ``test/accuracy``, that of the layer picked on validation.

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
        c: Inverse strength of the L2 penalty, as scikit-learn's C. The paper does not state it.
        standardize: Scale each feature to mean 0 and variance 1 first. The paper does not state it.
        max_iter: Upper bound on L-BFGS steps per layer.
        mask_ratio: BERT networks only: probability that an input pixel is hidden.
        seed: Seed of BERT's masks.

    Raises:
        ValueError: A layer does not exist, or arguments contradict the loaded weights.
    """

    palette_colors: Tensor
    weight: nn.Parameter  # (layers, C, D)
    bias: Tensor  # (layers, C)
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
        c: float = 1.0,
        standardize: bool = True,
        max_iter: int = 1000,
        mask_ratio: float = MASK_RATIO,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False  # L-BFGS sees all features at once, not batches
        check_settings(above_zero={"c": c, "max_iter": max_iter}, not_below_zero={})
        check_mask_ratio(mask_ratio)
        if layers != "all" and not isinstance(layers, (list, tuple, range)):
            raise ValueError(f"layers is {layers!r}; it must be 'all' or a list of layer numbers")
        self.network, self.palette = build_network(network, palette, pretrained, image_size=image_size)
        self.network.requires_grad_(False).eval()
        self.layers = list(range(self.config.n_layer + 1)) if layers == "all" else list(layers)
        wrong = [layer for layer in self.layers if not 0 <= layer <= self.config.n_layer]
        if wrong or not self.layers:
            raise ValueError(f"layers is {layers}; name one or more from 0 to {self.config.n_layer}, or 'all'")
        self.pretrained, self.class_names = pretrained, class_names
        self.c, self.standardize, self.max_iter = c, standardize, max_iter
        self.mask_ratio, self.seed = mask_ratio, seed
        register(
            self,
            self.network,
            self.palette,
            layers=layers,
            num_classes=num_classes,
            class_names=class_names,
            c=c,
            standardize=standardize,
            max_iter=max_iter,
            mask_ratio=mask_ratio,
            seed=seed,
        )
        self._collected: list[tuple[Tensor, Tensor]] = []
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
        """Number of the layer that did best on validation.

        Raises:
            ValueError: There are several, and no validation picked one.
        """
        return self.layers[self._picked()]

    @property
    def accuracy_by_layer(self) -> dict[int, float]:
        """Accuracy per layer of the last validation or test."""
        return dict(zip(self.layers, self._last, strict=False))

    def setup(self, stage: str) -> None:
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
        """Class logits of every layer's classifier, (B, layers, C)."""
        return self._logits(self._features(batch, 0, labelled=False)[0])

    def on_fit_start(self) -> None:
        if self.pretrained is None:
            log.warning("no pretrained=: probing a network that was never trained")
        self._collected.clear()

    def on_test_start(self) -> None:
        if not self.weight.any():
            raise ValueError("this probe was not fitted yet: call trainer.fit first, or pass ckpt_path")

    on_predict_start = on_test_start

    def training_step(self, batch: Any, batch_idx: int) -> None:
        features, labels = self._features(batch, batch_idx)
        self._collected.append((features.cpu(), labels.cpu()))
        if self.trainer.is_last_batch:
            self._fit_heads()
            self.optimizers().step()  # type: ignore[union-attr]
            self.trainer.should_stop = True  # one pass is all there is to learn from frozen features

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._evaluate(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        accuracy = self._finish("probe")
        if accuracy is not None:
            self.best.fill_(int(accuracy.argmax()))
            self.log("val/accuracy", accuracy.max(), prog_bar=True, sync_dist=True)
            self.log("val/best_layer", float(self.best_layer), sync_dist=True)

    def on_test_epoch_end(self) -> None:
        accuracy = self._finish("test")
        assert accuracy is not None
        if len(self.layers) > 1 and self.best < 0:
            log.warning("test/accuracy is left out: without validation data no layer was picked")
            return
        self.log("test/accuracy", accuracy[self._picked()], sync_dist=True)
        self.log("test/best_layer", float(self.best_layer), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Class probabilities of the best layer's classifier, float32 (B, C)."""
        features, _ = self._features(batch, batch_idx, labelled=False)
        return self._logits(features)[:, self._picked()].softmax(-1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A clock. L-BFGS runs outside Lightning's sight, and Lightning saves nothing until it has counted a step."""
        return torch.optim.SGD([self.weight], lr=0.0)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stamp(self, self.config, self.palette, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_stamp(self, self.config, self.palette, checkpoint)
        self._set_classes(checkpoint["state_dict"]["bias"].shape[1])

    def _picked(self) -> int:
        if len(self.layers) > 1 and self.best < 0:
            raise ValueError("no layer was picked: fit with validation data, or name a single one in layers=")
        return max(0, int(self.best))

    def _set_classes(self, num_classes: int) -> None:
        shape = (len(self.layers), num_classes)
        self.num_classes = num_classes
        self.hparams["num_classes"] = num_classes or None
        # A parameter, because Lightning's distributed strategies want one; no gradient ever reaches it.
        self.weight = nn.Parameter(torch.zeros(*shape, self.config.n_embd, device=self.device))
        self.register_buffer("bias", torch.zeros(shape, device=self.device))
        self.register_buffer("best", torch.full((), -1, dtype=torch.long, device=self.device))
        counters = [MulticlassAccuracy(num_classes, average="micro") for _ in self.layers] if num_classes else []
        self.accuracy = nn.ModuleList(counters).to(self.device)
        self._last: list[float] = []

    def _features(self, batch: Any, batch_idx: int, *, labelled: bool = True) -> tuple[Tensor, Tensor]:
        """(features (B, layers, D), labels (B,))."""
        read = read_batch(batch, self.palette, self.config)
        labels = need_labels(read, self.num_classes) if labelled else torch.empty(0)
        with torch.no_grad():
            features = self.network.features(read.tokens, self.layers, masked=mask_for(self, read, batch_idx))
        return features.float(), labels

    def _logits(self, features: Tensor) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):  # as exact as the fit
            return torch.einsum("bld,lcd->blc", features, self.weight.detach()) + self.bias

    def _fit_heads(self) -> None:
        """Fit one classifier per layer; the processes of a distributed run share their features first."""
        features, labels = (torch.cat(parts) for parts in zip(*self._collected, strict=True))
        self._collected.clear()
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, (features, labels))
            features, labels = (torch.cat(parts) for parts in zip(*gathered, strict=True))
        if bool((labels == labels[0]).all()):
            raise ValueError(
                f"all {len(labels)} training images have the label {int(labels[0])}; a probe needs two classes"
            )
        for index, layer in enumerate(self.layers):
            x, y = features[:, index].to(self.device), labels.to(self.device)
            options = {"c": self.c, "standardize": self.standardize, "max_iter": self.max_iter}
            with torch.autocast(self.device.type, enabled=False):  # a line search is lost in bfloat16
                weight, bias = fit_logistic(x, y, self.num_classes, **options)  # type: ignore[arg-type]
            self.weight.data[index], self.bias[index] = weight, bias
            log.debug("layer %d: classifier fitted on %d images", layer, len(labels))

    def _evaluate(self, batch: Any, batch_idx: int) -> None:
        if not self.weight.any():
            return  # a sanity check before the fit, or validation before all features are there
        features, labels = self._features(batch, batch_idx)
        for counter, logits in zip(self.accuracy, self._logits(features).unbind(1), strict=True):
            counter.update(logits, labels)  # type: ignore[operator]

    def _finish(self, prefix: str) -> Tensor | None:
        if not self.weight.any():
            return None
        accuracy = torch.stack([counter.compute() for counter in self.accuracy])  # type: ignore[operator]
        for counter, layer, value in zip(self.accuracy, self.layers, accuracy, strict=True):
            counter.reset()  # type: ignore[operator]
            self.log(f"{prefix}/layer_{layer}/accuracy", value, sync_dist=True)
        self._last = accuracy.tolist()
        return accuracy
