"""How well the surprise of images tells other images apart, for ``lightning-igpt score --against``."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image, features
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_roc

from lightning_igpt.files import counted, write_csv
from lightning_igpt.palette import Palette

Scored: TypeAlias = tuple[Tensor, Tensor, Sequence[str]]  # tokens int64 (N, T), nats per pixel float64 (N,), names
TPR = 0.95
CODECS: dict[str, dict[str, Any]] = {  # lossless, as small as Pillow writes them
    "png": {"format": "PNG", "optimize": True},
    "webp": {"format": "WEBP", "lossless": True, "quality": 100, "method": 6},
}


def files(path: Path) -> tuple[Path, Path]:
    """The tables of a comparison next to the CSV file of ``score``: of images, and of scores."""
    return path.with_name(f"{path.stem}_against.csv"), path.with_name(f"{path.stem}_auroc.csv")


def compare(palette: Palette, normal: Scored, anomalous: Scored, path: Path) -> None:
    """Print and write AUROC and FPR of each score; every second normal image gives the mean and is not compared."""
    (tokens, nats, names), (other_tokens, other_nats, other_names) = normal, anomalous
    if len(names) < 2:
        raise ValueError("--against needs at least 2 images, one for the mean and one to compare; images has 1")
    mean, rest = nats[::2].mean(), slice(1, None, 2)
    scores = anomaly_scores(nats[rest], palette.dequantize(tokens[rest]), mean)
    others = anomaly_scores(other_nats, palette.dequantize(other_tokens), mean)
    table = [(name, *detection(scores[name], others[name])) for name in scores]
    by_image, by_score = files(path)
    rows: list[list[str]] = [["image", "set", *scores]]
    for kind, labels, columns in (("normal", names[rest], scores), ("anomaly", other_names, others)):
        values = torch.stack(list(columns.values()), 1).tolist()
        rows += [[label, kind, *(f"{value:.6f}" for value in row)] for label, row in zip(labels, values, strict=True)]
    write_csv(by_image, rows)
    n_mean, n, n_other = len(names[::2]), len(names[rest]), len(other_names)
    heads = ["score", "auroc", "fpr_at_95_tpr", "n_mean", "n_normal", "n_anomaly"]
    lines = ([name, f"{auroc:.6f}", f"{fpr:.6f}", n_mean, n, n_other] for name, auroc, fpr in table)
    write_csv(by_score, [heads, *lines])
    print(f"anomalies: {counted(n_other, 'image')} against {n}; mean of {n_mean} others: {mean:.4f} nats per pixel")
    print(f"{'score':<28}{'AUROC':>8}{'FPR at 95 % TPR':>18}")
    for name, auroc, fpr in table:
        print(f"{name:<28}{auroc:>8.4f}{fpr:>18.4f}")
    print(f"wrote {by_image}\nwrote {by_score}")


def anomaly_scores(nats: Tensor, images: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """Scores that are higher for anomalies, float64 (N,) in nats per pixel, from nats per pixel and uint8 images."""
    scores = {"nats": nats, "distance_from_mean": (nats - mean).abs()}
    for codec in CODECS:
        if codec == "png" or features.check(codec):  # Pillow can be built without WebP
            scores[f"nats_minus_{codec}"] = nats - codec_nats(images, codec)
    return scores


def codec_nats(images: Tensor, codec: str) -> Tensor:
    """The length of lossless files, float64 (N,) in nats per pixel, of uint8 images (N, 3, S, S).

    Minus this, nats are the S(x) = -log p(x) - L(x) of Serra et al., "Input complexity and out-of-distribution
    detection with likelihood-based generative models" (ICLR 2020), which has both terms in bits.
    """
    lengths = []
    for image in images.permute(0, 2, 3, 1).cpu().numpy():
        Image.fromarray(image).save(file := io.BytesIO(), **CODECS[codec])
        lengths.append(file.tell())
    pixels = images.shape[2] * images.shape[3]
    return torch.tensor(lengths, dtype=torch.float64) * 8 * math.log(2) / pixels


def detection(normal: Tensor, anomalous: Tensor) -> tuple[float, float]:
    """AUROC, and the least false positive rate with at least 95 % of the anomalies detected, by scores (N,) and (M,).

    An image is detected if its score reaches a threshold; anomalies are the positives.
    """
    scores = torch.cat([normal, anomalous])
    positive = (torch.arange(len(scores)) >= len(normal)).long()
    # Ranks, equal for equal scores: torchmetrics applies a sigmoid to what exceeds 1, which makes large scores equal.
    ranks = torch.searchsorted(scores.sort().values, scores) / len(scores)
    fpr, tpr, _ = binary_roc(ranks, positive)
    return binary_auroc(ranks, positive).item(), fpr[tpr >= TPR].min().item()
