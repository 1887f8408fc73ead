"""Distances between two sets of images, by the features of a network: Frechet (FID) and kernel (KID, MMD squared).

A number means something only together with its features, its resizing and its number of images. What ``load_extractor``
returns says of itself what it is, and ``fingerprint`` tells its weights from others.
"""

import hashlib
import importlib.util
import warnings
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

SUBSETS, SUBSET_SIZE = 100, 1000  # of the kernel distance: Binkowski et al., 2018, and torchmetrics


class MiddleLayer(nn.Module):
    """Features of a network of this package: the mean over positions of its middle layer, all pixels visible."""

    def __init__(self, loaded: Pretrained) -> None:
        super().__init__()
        self.network, self.palette, self.layer = loaded.network, loaded.palette, loaded.config.n_layer // 2
        self.title = f"layer {self.layer} of {loaded.origin}"

    def forward(self, images: Tensor) -> Tensor:
        """Float (B, D) of uint8 images (B, 3, S, S), resized by antialiased bilinear interpolation."""
        side = self.network.config.image_size
        if images.shape[-1] != side:
            images = F.interpolate(images.float(), (side, side), mode="bilinear", antialias=True).round().byte()
        tokens = self.palette.quantize(images)
        masked = torch.zeros_like(tokens, dtype=torch.bool) if self.network.config.objective == "bert" else None
        return self.network.features(tokens, [self.layer], masked=masked)[:, 0]


class HuggingFaceFeatures(nn.Module):
    """Features of a vision model of transformers: its pooled output, or the mean of its last hidden states."""

    def __init__(self, name: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        super().__init__()
        self.processor = AutoImageProcessor.from_pretrained(name)
        model, report = AutoModel.from_pretrained(name, output_loading_info=True)
        self.model = getattr(model, "vision_model", model)  # of a pair such as CLIP's
        missing = sorted(report["missing_keys"])
        if lacking := [key for key in missing if "pooler" not in key]:
            raise ValueError(f"features {name}: its weights lack {lacking[0]}; such features would be random")
        self.pooled = not missing  # a pooler without weights is random
        self.title = f"{name}, {'pooled output' if self.pooled else 'mean of the last hidden states'}"

    def forward(self, images: Tensor) -> Tensor:
        """Float (B, D) of uint8 images (B, 3, H, W), resized by the model's own processor."""
        pixels = self.processor(images=list(images.permute(0, 2, 3, 1).cpu().numpy()), return_tensors="pt")
        outputs = self.model(pixel_values=pixels["pixel_values"].to(images.device))
        if self.pooled and getattr(outputs, "pooler_output", None) is not None:
            pooled: Tensor = outputs.pooler_output
            return pooled.flatten(1)
        states: Tensor = outputs.last_hidden_state  # (B, T, D), or maps (B, D, H, W)
        return states.mean(1) if states.ndim == 3 else states.mean((2, 3))


def load_extractor(features: str | nn.Module) -> nn.Module:
    """A module in evaluation mode that makes float features (B, D) of uint8 images (B, 3, H, W).

    Args:
        features: Such a module; what ``load_pretrained`` reads, such as ``photos``, for the middle layer of that
            network; the hub id or folder of another model of transformers; or ``inception``, the network of published
            FIDs, which torch-fidelity downloads.

    Raises:
        ModuleNotFoundError: ``inception`` without torch-fidelity.
        ValueError: The file of a model of transformers lacks weights, or nothing that can be read has such a name.
    """
    if isinstance(features, nn.Module):
        return features.eval()
    if features == "inception":
        if importlib.util.find_spec("torch_fidelity") is None:
            need = "features inception need the package torch-fidelity: pip install 'lightning-igpt[inception]'"
            raise ModuleNotFoundError(f"{need}; or name others, such as photos")
        inception: Any = NoTrainInceptionV3("inception-v3-compat", ["2048"])
        inception.use_antialias = False  # as in the original, with which published FIDs were computed
        inception.title = "inception"
        return inception
    return HuggingFaceFeatures(features).eval() if _is_foreign(features) else MiddleLayer(load_pretrained(features))


def _is_foreign(name: str) -> bool:
    """Whether a folder or hub id holds another model of transformers than Image GPT."""
    path = Path(name).expanduser()
    is_hub_id = HUB_ID.fullmatch(name) is not None and not path.exists()
    if not (is_hub_id or (path / "config.json").is_file()) or importlib.util.find_spec("transformers") is None:
        return False
    from transformers import AutoConfig

    return bool(AutoConfig.from_pretrained(name.partition("@")[0]).model_type != "imagegpt")


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
    weight = next(extractor.parameters(), torch.empty(0))
    parts = [extractor(part.to(weight.device)).double().cpu() for part in images.split(batch_size)]
    if parts[0].ndim != 2 or not (features := torch.cat(parts)).isfinite().all():
        what = f"{list(parts[0].shape)} of a batch of {len(images[:batch_size])}"
        raise ValueError(f"the features of the images are {what}; they must be finite numbers of shape (B, D)")
    return features


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """Frechet distance of the normal distributions with mean and covariance of two sets of features (N, D), (M, D).

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)). With few images it is too large, all the more the larger D is, so only
    distances of equal N and M compare. In a process group each process passes its own rows and gets the result for all.
    """
    return float(_of_features(FrechetInceptionDistance(_Given(real.shape[1])), real, generated))


def kernel_distance(real: Tensor, generated: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """Squared maximum mean discrepancy of features (N, D), (M, D) under the kernel (x . y / D + 1)^3.

    Few images do not bias it, but images that are in both sets do: the result may then be negative. Returns mean and
    standard deviation over 100 pairs of random subsets of 1,000, drawn by ``seed``; where N or M is at most 1,000, over
    one pair of subsets of that size. In a process group as ``frechet_distance``.
    """
    size = min(_rows_of_all(real), _rows_of_all(generated))
    chosen = {"subsets": SUBSETS, "subset_size": SUBSET_SIZE} if size > SUBSET_SIZE else {"subsets": 1}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that it keeps all features
        torch.default_generator.manual_seed(seed)
        metric = KernelInceptionDistance(_Given(real.shape[1]), **{"subset_size": size} | chosen)
        mean, deviation = _of_features(metric, real, generated)
    return float(mean), float(deviation)


class _Given(nn.Identity):
    """For metrics that would compute features: they are given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def _of_features(metric: Metric, real: Tensor, generated: Tensor) -> Any:
    for features, is_real in ((real, True), (generated, False)):
        if features.ndim != 2 or features.shape[1] != real.shape[1] or _rows_of_all(features) < 2:
            shapes = f"{list(real.shape)} and {list(generated.shape)}"
            raise ValueError(f"features are {shapes}; they must be (N, D) and (M, D) of at least 2 images each")
        metric.to(features.device).update(features.double(), real=is_real)
    return metric.compute()


def _rows_of_all(features: Tensor) -> int:
    count = torch.tensor(len(features), device=features.device)
    return int(sum(map(int, gather_all_tensors(count)))) if jit_distributed_available() else len(features)
