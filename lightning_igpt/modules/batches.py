"""What a batch may look like, and what to say when it does not.

A batch is a mapping with ``image`` (and ``label``), an ``(image, label)`` pair, images alone, or a mapping with
``tokens``, whose ``palette`` is checked where it is there. Images are uint8 (B, 3, S, S), or floats in [0, 1], which
are rounded to bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.palette import Palette
from lightning_igpt.sampling import check_tokens

HALF_A_BYTE = 0.5 / 255
LARGEST = 64  # side of the paper's largest images; 224 would be 50,176 tokens
MOST_NORMALISED = 10  # no usual mean and deviation take [0, 1] so far


class Batch(NamedTuple):
    """A batch as the network sees it."""

    tokens: Tensor  # int64 (B, T)
    labels: Any  # int64 (B,), or None; need_labels checks
    samples: Tensor | None  # int64 (B,), each sample's number in the order of training


def read_batch(batch: Any, palette: Palette, config: ImageGPTConfig) -> Batch:
    """Turn what a loader yields into tokens, labels and sample numbers.

    Raises:
        TypeError: The batch has none of the accepted forms.
        ValueError: Images or tokens do not fit the network.
    """
    if isinstance(batch, Mapping):
        labels, samples = batch.get("label"), batch.get("sample")
        if "tokens" in batch:
            _check_mark(batch.get("palette"), palette)
            return Batch(_check_tokens(batch["tokens"], config), labels, samples)
        if "image" not in batch:
            raise TypeError(f"the batch has the keys {sorted(map(str, batch))}; a module looks for 'image' or 'tokens'")
        return Batch(_to_tokens(batch["image"], palette, config), labels, samples)
    if isinstance(batch, Tensor):
        return Batch(_to_tokens(batch, palette, config), None, None)
    if isinstance(batch, Sequence) and batch and all(isinstance(part, Tensor) for part in batch[:2]):
        return Batch(_to_tokens(batch[0], palette, config), batch[1] if len(batch) > 1 else None, None)
    raise TypeError(
        f"a batch must be a mapping with 'image', an (image, label) pair, or images; got {type(batch).__name__}"
    )


def need_labels(batch: Batch, num_classes: int) -> Tensor:
    """The labels of a batch, int64 (B,).

    Raises:
        ValueError: There are none, or one is outside 0 .. num_classes - 1.
    """
    labels = batch.labels
    if labels is None:
        raise ValueError(
            "this batch has no labels, but probing and fine-tuning need them: yield 'label' beside 'image'"
        )
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be an integer tensor; got {type(labels).__name__}: encode names as numbers")
    if labels.shape != batch.tokens.shape[:1] or labels.is_floating_point():
        raise ValueError(f"labels must be integers of shape ({len(batch.tokens)},); got {labels.dtype} {labels.shape}")
    # On an accelerator the comparison would stall the queue at every step; there cross_entropy itself asserts.
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        low, high = int(labels.min()), int(labels.max())
        hint = " (-1 marks the hidden labels of a benchmark's test split)" if low < 0 else ""
        raise ValueError(
            f"labels run from {low} to {high}, but num_classes is {num_classes}: 0 to {num_classes - 1}{hint}"
        )
    return labels.long()


def to_bytes(images: Tensor) -> Tensor:
    """Images as uint8: floats in [0, 1] are rounded to bytes.

    Raises:
        TypeError: Another type than uint8 or float.
        ValueError: Floats outside [0, 1] by half a byte or more, as after a normalisation; they would quantise to wrong
            colours. Undone, it leaves errors of rounding, which are less.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8, or floats in [0, 1]; got {images.dtype}")
    low, high = images.aminmax()
    if not (low > -HALF_A_BYTE and high < 1 + HALF_A_BYTE):
        cure = "Leave out the normalisation, or undo it by images * std + mean: the palette does its own"
        if low >= 0 and high > MOST_NORMALISED:
            cure = "If they are bytes, say so by images.to(torch.uint8); else divide them by 255"
        raise ValueError(f"float images must lie in [0, 1]; these run from {low:.3g} to {high:.3g}. {cure}")
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def _to_tokens(images: Any, palette: Palette, config: ImageGPTConfig) -> Tensor:
    if not isinstance(images, Tensor):
        raise TypeError(
            f"images must be one tensor (B, 3, S, S); got {type(images).__name__}. "
            "Resize them to one size and stack them, or use this package's data modules"
        )
    side = config.image_size
    if images.ndim == 4 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)  # grey
    if images.ndim != 4 or images.shape[1] != 3:
        hint = ""
        if images.ndim == 4 and images.shape[3] in (1, 3):
            hint = "; permute(0, 3, 1, 2) puts the channels first"
        elif images.ndim == 4 and images.shape[1] == 4:
            hint = "; images[:, :3] drops transparency"
        raise ValueError(f"images must have the shape (B, 3, {side}, {side}); got {tuple(images.shape)}{hint}")
    if tuple(images.shape[2:]) != (side, side):
        height, width = images.shape[2:]
        raise ValueError(
            f"images are {height} x {width} but the network reads {side} x {side} (image_size={side}); resize them"
            + (f", or build the network with image_size={height}" if height == width <= LARGEST else "")
        )
    return palette.quantize(to_bytes(images))


def _check_mark(mark: Any, palette: Palette) -> None:
    """Rows of ``palette.transform`` and ``lightning_igpt.tokenize`` name their palette by its SHA-256, as text."""
    names = {mark} if isinstance(mark, str) else set(mark) if isinstance(mark, (list, tuple)) else set()
    for name in names:
        if isinstance(name, str) and name != palette.sha256:
            raise ValueError(
                f"the tokens of this batch have the palette {name[:12]}, but the network's is {palette.sha256[:12]}: "
                "every token would mean another colour. Make the tokens with the network's palette"
            )
    if isinstance(mark, Tensor):  # the class number of a ClassLabel, whose name does not come along
        warnings.warn(
            "this batch does not say which palette its tokens have: a loader without text gives only the class number "
            f"of the column 'palette'. See that its name is {palette.sha256}, or use this package's data modules, "
            "which check it",
            stacklevel=2,
        )


def _check_tokens(tokens: Any, config: ImageGPTConfig) -> Tensor:
    if not isinstance(tokens, Tensor):
        raise TypeError(
            f"tokens must be one tensor (B, T); got {type(tokens).__name__}: lists of a data set become tensors by "
            'with_format("torch")'
        )
    ids: Tensor = tokens.to(torch.int64)
    if ids.ndim != 2 or ids.shape[1] != config.n_positions:
        raise ValueError(
            f"tokens must have the shape (B, {config.n_positions}) for image_size={config.image_size}; "
            f"got {tuple(ids.shape)}"
        )
    if ids.device.type == "cpu":  # as for labels
        check_tokens(ids, config.vocab_size)
    return ids
