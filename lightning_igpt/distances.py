"""Distances between two sets of images, by the features of a network: Frechet (FID) and kernel (KID, MMD squared).

A number means something only together with its features, resizing and number of images.
"""

import hashlib
import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.metric import jit_distributed_available
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_igpt.weights import HUB_ID, Pretrained, load_pretrained

SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance: torchmetrics' numbers


class PooledLayers(nn.Module):
    """Features of a network of this package: the mean over positions of its middle layer, or of several, one by one.

    A BERT network sees all pixels; ``skip`` is that of ``ImageGPT.features``.
    """

    def __init__(self, loaded: Pretrained, layers: Sequence[int] = (), skip: int = 0) -> None:
        super().__init__()
        self.network, self.palette, self.skip = loaded.network.eval(), loaded.palette, skip
        self.layers = layers or [loaded.config.n_layer // 2]
        self.title = f"layer {' '.join(map(str, self.layers))} of {loaded.origin}"

    def forward(self, images: Tensor) -> Tensor:
        """Float (B, layers * D) of uint8 images (B, 3, S, S), resized by antialiased bilinear interpolation."""
        side = self.network.config.image_size
        if images.shape[-1] != side:
            images = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True).round().byte()
        tokens = self.palette.quantize(images)
        masked = torch.zeros_like(tokens, dtype=torch.bool) if self.network.config.objective == "bert" else None
        return self.network.features(tokens, self.layers, masked=masked, skip=self.skip).flatten(1)


class HuggingFaceFeatures(nn.Module):
    """Features of a vision model of transformers: its pooled output, or the mean of its last hidden states."""

    def __init__(self, name: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        super().__init__()
        self.processor = AutoImageProcessor.from_pretrained(name)
        model, report = AutoModel.from_pretrained(name, output_loading_info=True)
        self.model = getattr(model, "vision_model", model)  # of a pair such as CLIP's
        if lacking := [key for key in report["missing_keys"] if "pooler" not in key]:
            raise ValueError(f"features {name}: its weights lack {lacking[0]}; such features would be random")
        self.pooled = not report["missing_keys"]  # a pooler without weights is random
        self.title = f"{name}, {'pooled output' if self.pooled else 'mean of the last hidden states'}"

    def forward(self, images: Tensor) -> Tensor:
        """Float (B, D) of uint8 images (B, 3, H, W), resized by the model's own processor."""
        pixels = self.processor(images=list(images.permute(0, 2, 3, 1).cpu().numpy()), return_tensors="pt")
        outputs = self.model(pixel_values=pixels["pixel_values"].to(images.device))
        pooled: Tensor | None = getattr(outputs, "pooler_output", None)
        if self.pooled and pooled is not None:
            return pooled.flatten(1)
        states: Tensor = outputs.last_hidden_state  # (B, T, D), or maps (B, D, H, W)
        return states.mean(1) if states.ndim == 3 else states.mean((2, 3))


def load_extractor(features: str | nn.Module) -> nn.Module:
    """A module in evaluation mode that makes float features (B, D) of uint8 images (B, 3, H, W).

    ``features`` is such a module; what ``load_pretrained`` reads, such as ``photos``, for the middle layer of that
    network; the hub id or folder of another model of transformers; or ``inception``, the network of published FIDs,
    which torch-fidelity downloads. ModuleNotFoundError without torch-fidelity; ValueError where weights are missing.
    """
    if isinstance(features, nn.Module):
        return features.eval()
    if features == "inception":
        if importlib.util.find_spec("torch_fidelity") is None:
            need = 'features inception need the package torch-fidelity: pip install ".[inception]"'
            raise ModuleNotFoundError(f"{need}; or name others, such as photos")
        inception: Any = NoTrainInceptionV3("inception-v3-compat", ["2048"])
        inception.use_antialias = False  # as in the original, with which published FIDs were computed
        return inception  # type: ignore[no-any-return]
    path, kind = Path(features).expanduser(), "imagegpt"
    is_hub_layout = (path / "config.json").is_file() or (HUB_ID.fullmatch(features) and not path.exists())
    if is_hub_layout and importlib.util.find_spec("transformers") is not None:
        from transformers import AutoConfig

        kind = AutoConfig.from_pretrained(features.partition("@")[0]).model_type
    return PooledLayers(load_pretrained(features)) if kind == "imagegpt" else HuggingFaceFeatures(features).eval()


def fingerprint(module: nn.Module) -> str:
    """Twelve characters of the SHA-256 of a module's weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


@torch.no_grad()
def image_features(extractor: nn.Module, images: Tensor, *, batch_size: int = 64) -> Tensor:
    """Features, float64 (N, D) on the CPU, of uint8 images (N, 3, H, W); each batch moves to the extractor's device."""
    place = next(extractor.parameters(), torch.empty(0)).device
    features = torch.cat([extractor(part.to(place)).double().cpu() for part in torch.split(images, batch_size)])
    if features.ndim != 2 or not features.isfinite().all():
        raise ValueError(f"the features of images are {list(features.shape)}; they must be (B, D), all of them finite")
    return features


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Frechet distance of the normal distributions with mean and covariance of two sets of features (N, D), (M, D).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). With few images it is too large, all the more the larger D is, so only
    distances of equal N and M compare. In a process group each process passes its own rows and gets the result for all.
    """
    real, generated = _of_all(real, generated)
    given: Any = nn.Identity()
    given.num_features = real.shape[1]  # else the metric would try an image
    return float(_compared(FrechetInceptionDistance(given, sync_on_compute=False), real, generated))


def kernel_distance(real: Tensor, generated: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Squared maximum mean discrepancy of features (N, D), (M, D) under the kernel (x . y / D + 1)^3.

    Few images do not bias it, but images that are in both sets do: the result may then be negative. Returns mean and
    standard deviation over 100 pairs of random subsets of 1,000, drawn by ``seed``; where N or M is at most 1,000, over
    one pair of subsets of that size. In a process group as ``frechet_distance``.
    """
    real, generated = _of_all(real, generated)
    size = min(len(real), len(generated))
    sizes: Any = {"subsets": SUBSETS if size > SUBSET_SIZE else 1, "subset_size": min(size, SUBSET_SIZE)}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that it keeps all features
        torch.default_generator.manual_seed(seed)
        metric = KernelInceptionDistance(nn.Identity(), **sizes, sync_on_compute=False)
        mean, deviation = _compared(metric, real, generated)
    return float(mean), float(deviation)


def _of_all(*sets: Tensor) -> list[Tensor]:
    """Features of all processes, in the order of their ranks."""
    whole = [torch.cat(gather_all_tensors(part)) if jit_distributed_available() else part for part in sets]
    if {part.ndim for part in whole} != {2} or len({part.shape[1] for part in whole}) > 1 or min(map(len, whole)) < 2:
        shapes = " and ".join(str(list(part.shape)) for part in whole)
        raise ValueError(f"features are {shapes}; they must be (N, D) and (M, D) of at least 2 images each")
    return whole


def _compared(metric: Metric, real: Tensor, generated: Tensor) -> Any:
    metric.to(real.device)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return metric.compute()
