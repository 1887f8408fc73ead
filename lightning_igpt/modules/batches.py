"""What a batch may contain, and the masks of its samples.

A batch is a mapping with ``image`` (and ``label``) or other names in ``NAMES``, an ``(image, label)`` pair, images
alone, or a mapping with ``tokens``. Images are uint8 (B, 3, S, S), other integers from 0 to 255, or floats in [0, 1].
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_igpt.config import ImageGPTConfig, plain
from lightning_igpt.modules.resume import trainer_of
from lightning_igpt.objectives import draw_mask
from lightning_igpt.palette import Palette
from lightning_igpt.sampling import check_tokens

HALF_A_BYTE = 0.5 / 255
MAX_PROCESSES = 65_536  # separates the sample numbers of processes
NAMES = {  # of Hugging Face, torchvision, MMCV and webdataset
    "image": ("image", "images", "img", "pixel_values", "input", "inputs", "png", "jpg", "jpeg", "webp"),
    "label": ("label", "labels", "target", "targets", "cls"),
}

Keys = Mapping[str, str | int] | None


class Batch(NamedTuple):
    """A batch as the network reads it."""

    tokens: Tensor  # int64 (B, T)
    labels: Any  # int64 (B,), or None; need_labels checks
    samples: Tensor | None  # int64 (B,), each sample's number in the order of training
    names: Sequence[Any] = ()  # the batch's keys, for messages


def read_batch(batch: Any, palette: Palette, config: ImageGPTConfig, keys: Keys = None) -> Batch:
    """A batch by ``keys``, its names or places; TypeError or ValueError says what of it cannot be read."""
    parts = _parts(batch, keys or {})
    labels, samples, names = parts.get("label"), parts.get("sample"), parts.get("names", ())
    if "tokens" in parts:
        _check_palette_column(parts.get("palette"), palette)
        return Batch(_check_tokens(parts["tokens"], config), labels, samples, names)
    return Batch(_to_tokens(parts["image"], palette, config), labels, samples, names)


def read_labeled(module: Any, batch: Any, *, soft: bool = False) -> tuple[Batch, Tensor]:
    """A batch for a classifier, and its labels by :func:`need_labels`."""
    whole = module.read(batch)
    return whole, need_labels(whole, module.num_classes, module.label_places, soft=soft)


def check_keys(keys: Any) -> dict[str, str | int] | None:
    """Keys as a plain dict; ValueError where they are none."""
    keys, roles = plain(keys), {"image", "label", "sample", "tokens"}
    if keys is None:
        return None
    if not (isinstance(keys, Mapping) and keys.keys() <= roles and {type(key) for key in keys.values()} <= {str, int}):
        raise ValueError(f"keys is {keys!r}; it must map some of {sorted(roles)} to the names that a batch has")
    return dict(keys)


def _parts(batch: Any, keys: Mapping[str, str | int]) -> dict[str, Any]:
    """What plays which role in a batch; TypeError where a tensor would be left out or the roles are not clear."""
    if isinstance(batch, Tensor):
        return {"image": batch}
    items = list(batch) if isinstance(batch, Sequence) and not isinstance(batch, str) else []
    named = batch._asdict() if hasattr(batch, "_asdict") else dict(enumerate(items)) if keys and items else batch
    if hasattr(named, "keys"):
        names = list(named.keys())
        parts = {role: named[key] for role, key in keys.items() if key in names}
        own = {"sample", "palette"} if "image" in keys else {"sample", "palette", "tokens"}
        parts |= {role: named[role] for role in own - keys.keys() if role in names}
        for role in NAMES.keys() - keys.keys():
            present = [name for name in NAMES[role] if name in names]
            present = [name for name in present if isinstance(named[name], Tensor)] or present
            if len(present) == 1 or role in present[: role == "label"]:  # there may be labels of several kinds
                parts[role] = named[present[0]]
        if parts.keys() & {"image", "tokens"}:
            return parts | {"names": names}
        if keys or not items:
            known = ", ".join([*NAMES["image"], "tokens"])
            asked = f"keys={dict(keys)} asks for others" if keys else f"a module reads exactly one of {known}"
            cure = "name yours by keys={'image': ..., 'label': ...}"
            raise TypeError(f"the batch has the keys {sorted(map(str, names))}, but {asked}; {cure}")
    tensors = len(items) in (1, 2) and all(isinstance(item, Tensor) for item in items)
    if tensors and all(item.ndim < 3 for item in items[1:]):  # more would be another image
        return dict(zip(("image", "label"), items, strict=False))
    what = ", ".join(f"{type(item).__name__} {tuple(getattr(item, 'shape', ()))}" for item in items)
    got = f" of {what}: train on one view and one loader, or name places by keys={{'image': 0}}" if items else ""
    text = "a batch must be a mapping with 'image', an (image, label) pair, or images"
    raise TypeError(f"{text}; got {type(batch).__name__}{got}")


def need_labels(batch: Batch, num_classes: int, places: Tensor | None = None, *, soft: bool = False) -> Tensor:
    """The labels of a batch, int64 (B,); with ``soft`` also probabilities, float32 (B, C); ValueError for others.

    ``places`` gives the class of each of the data's labels, int64 (data's classes,).
    """
    labels = batch.labels
    if not num_classes:
        raise ValueError("cannot infer num_classes from the data; set num_classes=")
    if labels is None:
        looked = f"its keys are {sorted(map(str, batch.names))}; " if batch.names else ""
        cure = f"name them {' or '.join(NAMES['label'])}, or set keys={{'label': ...}}"
        raise ValueError(f"this batch has no labels, which probing and fine-tuning need: {looked}{cure}")
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels must be an integer tensor; got {type(labels).__name__}: encode names as numbers")
    count = num_classes if places is None else len(places)
    if soft and labels.is_floating_point() and labels.shape == (len(batch.tokens), count):
        if labels.device.type == "cpu" and not (labels.min() >= 0 and (labels.sum(1) - 1).abs().max() < 0.01):
            raise ValueError(f"labels {tuple(labels.shape)} must be probabilities, of which each row adds up to 1")
        spread = labels.new_zeros(len(labels), num_classes, dtype=torch.float32)
        return labels.float() if places is None else spread.index_copy(1, places.to(labels.device), labels.float())
    if labels.shape != batch.tokens.shape[:1] or labels.is_floating_point():
        hint = "; probabilities, as of MixUp, are for the training of FineTuneModule" if labels.ndim == 2 else ""
        shape = f"({len(batch.tokens)},); got {labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"labels must be integers of shape {shape}{hint}")
    # On an accelerator the comparison would stall the queue at every step; there cross_entropy itself asserts.
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < count:
        low, high = int(labels.min()), int(labels.max())
        hint = " (-1 marks the hidden labels of a benchmark's test split)" if low < 0 else ""
        raise ValueError(f"labels run from {low} to {high}, but num_classes is {count}: 0 to {count - 1}{hint}")
    return labels.long() if places is None else places.to(labels.device).index_select(0, labels.long())


def to_bytes(images: Tensor) -> Tensor:
    """Images as uint8: integers unchanged, floats in [0, 1] rounded; what lies outside is refused."""
    if images.dtype == torch.uint8:
        return images
    if images.dtype == torch.bool or images.is_complex():
        raise TypeError(f"images must be uint8, integers from 0 to 255, or floats in [0, 1]; got {images.dtype}")
    if not images.is_floating_point():  # with_format("torch") makes int64 of arrays
        low, high = images.long().aminmax()
        if low < 0 or high > 255:
            raise ValueError(f"images of {images.dtype} must lie in 0..255; these run from {int(low)} to {int(high)}")
        return images.to(torch.uint8)
    images = images.float()  # bfloat16 has no number between 1 and the bound
    low, high = images.aminmax()
    if not (low > -HALF_A_BYTE and high < 1 + HALF_A_BYTE):
        cure = "Leave out the normalization, or undo it by images * std + mean; bytes become uint8 by .to(torch.uint8)"
        raise ValueError(f"float images must lie in [0, 1]; these run from {low:.3g} to {high:.3g}. {cure}")
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def masks_for(module: Any, batch: Batch, batch_idx: int, count: int = 1) -> list[Tensor | None]:
    """``count`` of BERT's masks, bool (B, T), by sample numbers; ``[None]`` for autoregressive networks.

    The paper hides pixels in evaluation too, and lets five masks vote (section 4.6).
    """
    if module.config.objective == "autoregressive":
        return [None]
    if not getattr(module, "mask_inputs", True):
        return [torch.zeros_like(batch.tokens, dtype=torch.bool)]
    samples, options = sample_numbers(module, batch, batch_idx), {"ratio": module.mask_ratio}
    options["tokens_per_pixel"] = module.config.tokens_per_pixel
    seeds = [module.seed + 1_000_003 * number for number in range(count)]  # far from the seeds that people choose
    return [draw_mask(samples, module.config.n_positions, seed=seed, **options) for seed in seeds]


def sample_numbers(module: Any, batch: Batch, batch_idx: int) -> Tensor:
    """The number of each sample, int64 (B,): the loader's, or made of batch, process and row."""
    if batch.samples is not None:
        return batch.samples
    count = count_batches(module) if module.training else batch_idx
    size, rank = len(batch.tokens), module.global_rank if module.fabric is None else module.fabric.global_rank
    first = (count * MAX_PROCESSES + rank) * size
    return torch.arange(first, first + size, device=batch.tokens.device)


def count_batches(module: Any) -> int:
    """Training batches so far, this one included; without a Trainer, calls of this function."""
    trainer = trainer_of(module)
    if trainer is not None:
        return trainer.fit_loop.total_batch_idx + 1
    module.batches_seen += 1
    return int(module.batches_seen)


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
    height, width = images.shape[2:]
    if not height == width == side:
        reads = f"the network reads {side} x {side}; resize them or set its image_size"
        raise ValueError(f"images are {height} x {width} but {reads}")
    return palette.quantize(to_bytes(images))


def _check_palette_column(column: Any, palette: Palette) -> None:
    """Rows of ``palette.transform`` and ``lightning_igpt.tokenize`` name their palette by its SHA-256, as text."""
    for name in [column] if isinstance(column, str) else column if isinstance(column, (list, tuple)) else ():
        if isinstance(name, str) and name != palette.sha256:
            text = f"the tokens of this batch have the palette {name[:12]}, but the network's is {palette.sha256[:12]}"
            raise ValueError(f"{text}: every token would mean another color. Make them with the network's palette")
    if isinstance(column, Tensor):  # the class number of a ClassLabel, whose name a loader of tensors leaves out
        text = "this batch gives a number for the palette of its tokens: check that its name is"
        warnings.warn(f"{text} {palette.sha256}, or use this package's data modules", stacklevel=2)


def _check_tokens(tokens: Any, config: ImageGPTConfig) -> Tensor:
    if not isinstance(tokens, Tensor):
        got = type(tokens).__name__
        raise TypeError(f'tokens must be one tensor (B, T); got {got}: with_format("torch") makes tensors of lists')
    ids: Tensor = tokens.to(torch.int64)
    if ids.ndim != 2 or ids.shape[1] != config.n_positions:
        pixels = f"image_size={config.image_size}" + " and tokens_per_pixel=3" * (config.tokens_per_pixel == 3)
        shape = f"(B, {config.n_positions}) for {pixels}"
        raise ValueError(f"tokens must have the shape {shape}; got {tuple(ids.shape)}")
    if ids.device.type == "cpu":  # as for labels
        check_tokens(ids, config.vocab_size)
    return ids
