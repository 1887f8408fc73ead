"""What a batch may contain, and the masks of its samples.

A batch is a mapping with ``image`` (and ``label``), an ``(image, label)`` pair, images alone, or a mapping with
``tokens``, whose ``palette`` is checked if present. Images are uint8 (B, 3, S, S), or floats in [0, 1], which are
rounded to bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.modules.resume import trainer_of
from lightning_igpt.objectives import draw_mask
from lightning_igpt.palette import Palette
from lightning_igpt.sampling import check_tokens

HALF_A_BYTE = 0.5 / 255
MAX_PROCESSES = 65_536  # separates the sample numbers of processes


class Batch(NamedTuple):
    """A batch as the network reads it."""

    tokens: Tensor  # int64 (B, T)
    labels: Any  # int64 (B,), or None; need_labels checks
    samples: Tensor | None  # int64 (B,), each sample's number in the order of training


def read_batch(batch: Any, palette: Palette, config: ImageGPTConfig) -> Batch:
    """Tokens, labels and sample numbers of a batch; TypeError or ValueError says what of it cannot be read."""
    if isinstance(batch, Mapping):
        labels, samples = batch.get("label"), batch.get("sample")
        if "tokens" in batch:
            _check_palette_column(batch.get("palette"), palette)
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
    """The labels of a batch, int64 (B,); ValueError where there are none, or one is outside 0 .. num_classes - 1."""
    labels = batch.labels
    if labels is None:
        raise ValueError("this batch has no labels, which probing and fine-tuning need: yield 'label' next to 'image'")
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
    """Images as uint8: bytes unchanged, floats in [0, 1] rounded; others, as normalization gives them, are refused."""
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise TypeError(f"images must be uint8, or floats in [0, 1]; got {images.dtype}")
    images = images.float()  # bfloat16 has no number between 1 and the bound
    low, high = images.aminmax()
    if not (low > -HALF_A_BYTE and high < 1 + HALF_A_BYTE):
        cure = "Leave out the normalization, or undo it by images * std + mean; bytes become uint8 by .to(torch.uint8)"
        raise ValueError(f"float images must lie in [0, 1]; these run from {low:.3g} to {high:.3g}. {cure}")
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def mask_for(module: Any, batch: Batch, batch_idx: int, number: int = 0) -> Tensor | None:
    """BERT's mask, bool (B, T), by sample numbers, ``number`` of several; None for autoregressive networks."""
    if module.config.objective == "autoregressive":
        return None
    samples = sample_numbers(module, batch, batch_idx)
    seed = module.seed + 1_000_003 * number  # far from the seeds that people choose
    return draw_mask(samples, module.config.n_positions, seed=seed, ratio=module.mask_ratio)


def evaluation_masks(module: Any, batch: Batch, batch_idx: int) -> list[Tensor | None]:
    """The masks of an evaluation: ``n_masks``, or one that hides nothing; ``[None]`` for autoregressive networks.

    The paper hides pixels in evaluation too, and lets five masks vote (section 4.6).
    """
    if module.config.objective == "autoregressive":
        return [None]
    if not module.mask_inputs:
        return [torch.zeros_like(batch.tokens, dtype=torch.bool)]
    return [mask_for(module, batch, batch_idx, number) for number in range(module.n_masks)]


def sample_numbers(module: Any, batch: Batch, batch_idx: int) -> Tensor:
    """The number of each sample, int64 (B,): the loader's, or made of batch, process and row."""
    if batch.samples is not None:
        return batch.samples
    trainer = trainer_of(module)
    count = trainer.fit_loop.total_batch_idx + 1 if module.training and trainer is not None else batch_idx
    size = len(batch.tokens)
    first = (count * MAX_PROCESSES + module.global_rank) * size
    return torch.arange(first, first + size, device=batch.tokens.device)


def _to_tokens(images: Any, palette: Palette, config: ImageGPTConfig) -> Tensor:
    if not isinstance(images, Tensor):
        got = type(images).__name__
        raise TypeError(f"images must be one tensor (B, 3, S, S); got {got}: resize them to one size and stack them")
    side = config.image_size
    if images.ndim == 4 and images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)  # gray
    if images.ndim != 4 or images.shape[1] != 3:
        last = images.ndim == 4 and images.shape[3] in (1, 3)
        hint = "; permute(0, 3, 1, 2) puts the channels first" if last else ""
        raise ValueError(f"images must have the shape (B, 3, {side}, {side}); got {tuple(images.shape)}{hint}")
    if tuple(images.shape[2:]) != (side, side):
        height, width = images.shape[2:]
        raise ValueError(
            f"images are {height} x {width} but the network reads {side} x {side}; resize them or set its image_size"
        )
    return palette.quantize(to_bytes(images))


def _check_palette_column(column: Any, palette: Palette) -> None:
    """Rows of ``palette.transform`` and ``lightning_igpt.tokenize`` name their palette by its SHA-256, as text."""
    for name in [column] if isinstance(column, str) else column if isinstance(column, (list, tuple)) else ():
        if isinstance(name, str) and name != palette.sha256:
            raise ValueError(
                f"the tokens of this batch have the palette {name[:12]}, but the network's is {palette.sha256[:12]}: "
                "every token would mean another color. Make the tokens with the network's palette"
            )
    if isinstance(column, Tensor):  # the class number of a ClassLabel, whose name a loader of tensors leaves out
        text = "this batch gives a number for the palette of its tokens: check that its name is"
        warnings.warn(f"{text} {palette.sha256}, or use this package's data modules", stacklevel=2)


def _check_tokens(tokens: Any, config: ImageGPTConfig) -> Tensor:
    if not isinstance(tokens, Tensor):
        got = type(tokens).__name__
        raise TypeError(f'tokens must be one tensor (B, T); got {got}: with_format("torch") makes tensors of lists')
    ids: Tensor = tokens.to(torch.int64)
    if ids.ndim != 2 or ids.shape[1] != config.n_positions:
        raise ValueError(
            f"tokens must have the shape (B, {config.n_positions}) for image_size={config.image_size}; "
            f"got {tuple(ids.shape)}"
        )
    if ids.device.type == "cpu":  # as for labels
        check_tokens(ids, config.vocab_size)
    return ids
