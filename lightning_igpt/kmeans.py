"""Fit a palette to images: k-means on the histogram of their 24-bit colors, by scikit-learn.

The histogram makes the result independent of order and batching. Source: Chen et al., "Generative Pretraining from
Pixels" (ICML 2020), section 3.2: k-means with k = 512 on RGB values; initialization and sample are this project's.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from lightning_igpt.images import to_rgb
from lightning_igpt.lookup import N_COLORS
from lightning_igpt.palette import MAX_COLORS, Palette, check_images, kind_of

_CHUNK = 1 << 20  # pixels counted at a time, which bounds the memory
_MAX_POINTS = 1 << 18  # above that, colors are merged before clustering

Bytes = NDArray[np.uint8]
Counts = NDArray[np.int64]
Floats = NDArray[np.float64]


def fit_palette(
    images: Tensor | NDArray[Any] | Iterable[Any],
    n_colors: int = 512,
    *,
    seed: int = 0,
    image_column: str | None = None,
    max_iter: int = 100,
) -> Palette:
    """Fit a palette with small squared error on the given images.

    Weighted k-means (k-means++ start, Lloyd's iterations) of the distinct colors. More than 2^18 distinct colors are
    merged first, which bounds the time: colors that agree in the upper 6 bits of each channel become their weighted
    mean (7 bits, or no merging, where that leaves fewer than 8 points per palette color). Clustering uses one thread,
    so that the number of cores does not change the result.

    Args:
        images: uint8 (N,3,H,W); or an iterable of PIL images of any mode, uint8 arrays (H,W,3) and uint8 tensors
            (3,H,W) of any size; or of rows (mappings) with such an image, such as a split of a Hugging Face
            dataset.
        n_colors: Colors of the palette, K, 2 to 32,768.
        seed: Seed of the k-means++ start.
        image_column: Key of the image in a row; required unless exactly one value is a PIL image.
        max_iter: Upper bound of Lloyd's iterations.

    Returns:
        K colors, sorted by luminance, then red, green, blue.

    Raises:
        TypeError: An item of ``images`` is not a uint8 image.
        ValueError: The images have fewer distinct colors than ``n_colors``, a shape is wrong, or the image column is
            ambiguous.
    """
    if not 2 <= n_colors <= MAX_COLORS:
        raise ValueError(f"n_colors is {n_colors}; a palette has 2 to {MAX_COLORS} colors")
    counts = np.zeros(N_COLORS, dtype=np.int64)
    for pixels in _pixels(images, image_column):
        red, green, blue = pixels.astype(np.int32).T
        np.add.at(counts, red << 16 | green << 8 | blue, 1)
    codes = np.flatnonzero(counts)
    if codes.size < n_colors:
        cure = "ask for fewer colors or give more images"
        raise ValueError(f"the images have {codes.size} distinct colors, fewer than n_colors {n_colors}; {cure}")
    points, weights = _points(codes, counts[codes], n_colors)
    # Parallel sums would round in the order in which threads finish.
    with threadpool_limits(1):
        kmeans = KMeans(n_colors, init="k-means++", n_init=1, max_iter=max_iter, random_state=seed)
        centers: Floats = kmeans.fit(points, sample_weight=weights).cluster_centers_.clip(-1, 1)
    luminance = centers @ (0.299, 0.587, 0.114)  # ITU-R BT.601
    return Palette(centers[np.lexsort((*centers.T[::-1], luminance))])


def _points(codes: Counts, counts: Counts, n_colors: int) -> tuple[Floats, Floats]:
    """Points in [-1,1] (P,3) and their weights (P,), at most 2^18 of them if K allows."""
    values = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=1)  # (P, 3)
    colors, weights = values / 127.5 - 1, counts.astype(np.float64)
    if len(codes) <= _MAX_POINTS:
        return colors, weights
    for bits in (6, 7):
        cells = (values >> (8 - bits)) @ (1 << 2 * bits, 1 << bits, 1)
        _, owner = np.unique(cells, return_inverse=True)
        total: Floats = np.bincount(owner, weights).astype(np.float64)
        if total.size >= 8 * n_colors:
            means = [np.bincount(owner, weights * channel) / total for channel in colors.T]
            return np.stack(means, axis=1), total
    return colors, weights


def _pixels(images: Tensor | NDArray[Any] | Iterable[Any], image_column: str | None) -> Iterator[Bytes]:
    """The pixels (n,3) of all images, in chunks."""
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images)
    if isinstance(images, Tensor):
        check_images(images)
        images = torch.split(images, max(1, _CHUNK // max(1, images.shape[2] * images.shape[3])))
    elif isinstance(images, str | Mapping):
        raise TypeError(f"images is a {type(images).__name__}; give images, or one split of a dataset")
    for item in images:
        yield _colors(_image_in(item, image_column) if isinstance(item, Mapping) else item)


def _image_in(row: Mapping[str, Any], image_column: str | None) -> Any:
    names = [image_column] if image_column else [name for name in row if isinstance(row[name], Image.Image)]
    if len(names) != 1 or names[0] not in row:
        raise ValueError(f"image_column is {image_column!r}, the rows have {list(row)}; set it to the column of images")
    return row[names[0]]


def _colors(image: object) -> Bytes:
    if isinstance(image, Image.Image):
        pixels: Bytes = np.asarray(to_rgb(image))
    elif isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim >= 3 and image.shape[-3] == 3:
        pixels = image.movedim(-3, -1).cpu().numpy()
    elif isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3:
        pixels = image
    else:
        forms = "an image is a PIL image, a uint8 array (H, W, 3) or a uint8 tensor (3, H, W)"
        raise TypeError(f"cannot take colors from {kind_of(image)}; {forms}")
    return pixels.reshape(-1, 3)
