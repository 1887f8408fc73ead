"""The text of ``lightning-igpt data show``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import add
from typing import NamedTuple

import torch

from lightning_igpt.commands.data_look import Kind, Seen, Tokens
from lightning_igpt.data.base import ImageDataModule
from lightning_igpt.data.readers import CACHE_LIMIT
from lightning_igpt.data.sources import Source
from lightning_igpt.data.stored import StoredImages
from lightning_igpt.data.streamed import StreamedImages
from lightning_igpt.data.transforms import PadCropFlip, RandomCrop
from lightning_igpt.palette import Palette

N_CLASSES, N_BAD = 20, 10  # lines at most
VERBS = {"train": "trains", "val": "validates", "test": "tests"}


class Colors(NamedTuple):
    """A palette, and what it is called."""

    palette: Palette
    name: str


class Use(NamedTuple):
    """A split and what a run does with it."""

    source: str
    split: str
    rows: str
    purpose: str


def source_lines(data: ImageDataModule) -> Iterator[str]:
    """The sources with their splits, what each split is for, and the columns.

    Args:
        data: After ``setup``.
    """
    uses = stream_uses(data) if isinstance(data.images, StreamedImages) else stored_uses(data)
    for source in data.sources:
        yield _line("source", source.name)
        mine = {use.split: use for use in uses if use.source == source.name}
        names = [*source.splits, *(split for split in mine if split not in source.splits)]
        width = max(len(name) for name in names)
        for number, name in enumerate(names):
            use = mine.get(name) or Use(source.name, name, n_rows(source, name), _no_use(name, mine))
            yield _line("" if number else "splits", f"{name:<{width}}  {use.rows:>12}  {use.purpose}")
        yield _line("columns", f"{source.image_column}, {source.label_column or 'no labels'}")


def stored_uses(data: ImageDataModule) -> list[Use]:
    """The splits and slices that make up the parts, each with all its purposes."""
    assert isinstance(data.images, StoredImages)
    found: dict[tuple[str, str], Use] = {}
    for role, part in data.images.parts.items():
        for member in part.members or (part,):
            purpose = VERBS[role]
            if member.rows is not None:
                purpose += f" on {len(member):,}" + (" (held out)" if role == "val" else "")
            key = (member.source, member.split)
            before = f"{found[key].purpose}, " if key in found else ""
            found[key] = Use(*key, f"{len(member.dataset):,}", before + purpose)
    return list(found.values())


def stream_uses(data: ImageDataModule) -> list[Use]:
    """The same for streams, whose hold-out is a share."""
    assert isinstance(data.images, StreamedImages)
    division, settings = data.images.division, data.settings
    train, first = data.hparams["train_split"] or "train", data.sources[0]
    validates = f"validates on the first {settings.val_images:,}"
    purposes = {(source.name, train): "trains" for source in data.sources}
    if division.val is not None:
        purposes[first.name, division.val] = validates
    elif settings.val_fraction:
        purposes[first.name, train] = f"trains on about {1 - settings.val_fraction:.0%}, {validates} of the rest"
    if division.test is not None:
        purposes[first.name, division.test] = "tests"
    sources = {source.name: source for source in data.sources}
    return [Use(*key, n_rows(sources[key[0]], key[1]), purpose) for key, purpose in purposes.items()]


def n_rows(source: Source, split: str) -> str:
    """How many rows a split has; of a stream what it says itself."""
    rows = source.splits[split]
    if not source.streaming:
        return f"{len(rows):,}"
    known = (rows.info.splits or {}).get(split)
    return f"{known.num_examples:,}" if known is not None and known.num_examples else "unknown (stream)"


def class_lines(data: ImageDataModule) -> Iterator[str]:
    """The classes with their numbers of training images.

    Args:
        data: After ``setup``.
    """
    names, images = data.class_names, data.images
    if names is None:
        yield _line("classes", "none")
        return
    shown, more = names[:N_CLASSES], f"and {len(names) - N_CLASSES:,} more" if len(names) > N_CLASSES else ""
    if not isinstance(images, StoredImages):
        yield _line("classes", f"{len(names):,}, counts unknown (stream): {', '.join(shown)} {more}".rstrip())
        return
    part = images.parts["train"]
    try:
        labels = images.source.labels(part.split)
    except ValueError as error:  # pretraining does without
        yield _line("classes", f"{len(names):,}, but the labels are of no use: {error}")
        return
    counts = torch.bincount(labels if part.rows is None else labels[part.rows], minlength=len(names)).tolist()
    yield _line("classes", f"{len(names):,}, with {min(counts):,} to {max(counts):,} training images each")
    width = max(len(name) for name in shown)
    yield from (f"  {name:<{width}}  {count:>9,}" for name, count in zip(shown, counts, strict=False))
    if more:
        yield f"  {more}"


def seen_lines(data: ImageDataModule, seen: Mapping[str, Seen]) -> Iterator[str]:
    """What the files are like, and which of them cannot be used.

    Args:
        data: After ``setup``.
        seen: What was found, by split.
    """
    total = reduce(add, seen.values(), Seen())
    order = "the first " if isinstance(data.images, StreamedImages) else ""
    yield _line("looked at", ", ".join(f"{order}{one.n_rows:,} of {split}" for split, one in seen.items()))
    if total.sizes:
        modes = ", ".join(f"{mode} {count:,}" for mode, count in total.modes.most_common())
        small, large = (pick(total.sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
        sizes = f"{small[0]} x {small[1]}" + (f" to {large[0]} x {large[1]}" if small != large else "")
        yield _line("images", f"{modes}; {sizes}" if modes else f"tokens; {sizes}")
    if not total.bad:
        yield _line("bad images", "none")
        return
    by_split = ", ".join(f"{split} {len(one.bad):,}" for split, one in seen.items() if one.bad)
    yield _line("bad images", f"{len(total.bad):,} of {total.n_rows:,} ({by_split})")
    yield from (f"  {' '.join(f'{bad.place}: {bad.reason}'.split())}" for bad in total.bad[:N_BAD])
    if len(total.bad) > N_BAD:
        yield f"  and {len(total.bad) - N_BAD:,} more"
    share, allowed = len(total.bad) / total.n_rows, data.settings.max_bad_share
    if data.settings.on_bad_image == "error":
        yield "  on_bad_image is error: a run stops at the first of them; skip leaves them out"
    elif share > allowed:
        yield f"  on_bad_image is skip, but max_bad_share is {allowed:g} and these are {share:.2g}: a run stops"
    else:
        yield f"  on_bad_image is skip: a run leaves them out, up to a share of {allowed:g} (max_bad_share)"


def palette_lines(kind: Kind, colors: Colors, seen: Mapping[str, Seen]) -> Iterator[str]:
    """The palette, and what it costs."""
    total = reduce(add, seen.values(), Seen())
    text = f"{colors.name}, {len(colors.palette)} colours"
    if isinstance(kind, Tokens):
        mark = kind.sha256[:12]
        if kind.palette is None:
            mine = f"{colors.name} ({colors.palette.sha256[:12]})"
            yield _line("palette", f"unknown: the tokens belong to {mark}, and {mine} is another; name theirs")
            yield _line("", "with --palette for a contact sheet and, in a recipe, for the network")
        else:
            yield _line("palette", f"{text}, the tokens' own ({mark})")
    elif total.squares:
        yield _line("palette", f"{text}: RMSE {total.rmse:.2f} of 255 per channel at {kind.size} x {kind.size}")
    else:
        yield _line("palette", text)


def training_lines(data: ImageDataModule, kind: Kind, seen: Mapping[str, Seen]) -> Iterator[str]:
    """What training makes of the images.

    Args:
        data: After ``setup``.
        kind: How images are looked at.
        seen: What was found, by split, that of training first.
    """
    size, settings = kind.size, data.settings
    yield _line("training", f"{type(data).__name__}: {size} x {size} pixels, {size**2:,} tokens per image")
    yield _line("  crop", _crop(kind, next(iter(seen.values()))))
    yield _line("  augment", _augment(kind))
    yield _line("  cache", _cache(data, kind))
    blocks = f"yes, shuffled within shards and blocks of {settings.shuffle_buffer:,}"
    yield _line("  streaming", blocks if isinstance(data.images, StreamedImages) else "no")
    n_batches = data.batches_per_epoch
    if n_batches is None:
        yield _line("  batches", f"of {data.batch_size}; how many in a pass is unknown (stream)")
    elif n_batches == 0:
        n_train = data.images.n_train if data.images is not None else 0
        yield _line("  batches", f"none: batch_size is {data.batch_size}, more than the {n_train} training images")
    else:
        yield _line("  batches", f"{n_batches:,} of {data.batch_size} in a pass on one device")


def _crop(kind: Kind, seen: Seen) -> str:
    if isinstance(kind, Tokens):
        return "none, tokens are as they were made"
    if not isinstance(kind.resize, RandomCrop):
        return "the middle square of each image"
    n_large = sum(count for size, count in seen.sizes.items() if min(size) >= 2 * kind.size)
    if not n_large:
        return f"the middle square; none looked at is large enough ({2 * kind.size} pixels) for random crops"
    share = f"{n_large:,} of {seen.sizes.total():,}" if n_large < seen.sizes.total() else "all"
    return f"random squares of {share} looked at (shorter side at least {2 * kind.size}); else the middle square"


def _augment(kind: Kind) -> str:
    augment = kind.augment
    if not isinstance(augment, PadCropFlip):
        return "none"
    shift = f"padded by {augment.pad} reflected pixels and cut at random" if augment.pad else ""
    return ", ".join(text for text in (shift, "mirrored at random" if augment.flip else "") if text)


def _cache(data: ImageDataModule, kind: Kind) -> str:
    settings, images = data.settings, data.images
    if isinstance(kind, Tokens) or not isinstance(images, StoredImages):
        return "none needed for tokens" if isinstance(kind, Tokens) else "none, rows of a stream do not come back"
    if settings.cache == "disk":
        return f"disk: tokens in {settings.token_folder}, {settings.n_crops} of each image"
    if settings.cache == "none":
        return "none"
    needed = images.n_train * 3 * kind.size**2
    amount = f"{needed / 2**20:.1f} MiB for the training images"
    if settings.cache == "auto" and (settings.num_workers or needed > CACHE_LIMIT):
        why = "num_workers is not 0" if settings.num_workers else f"more than {CACHE_LIMIT // 2**20} MiB"
        return f"none: auto keeps nothing here ({why}); memory would take {amount}"
    return f"memory: {amount}" + (", but not those cropped at random" if isinstance(kind.resize, RandomCrop) else "")


def _no_use(split: str, uses: Mapping[str, Use]) -> str:
    in_slices = any(split in re.split(r"\[[^\]]*\]|\+", name) for name in uses)
    return "used in slices" if in_slices else "not used"


def _line(name: str, text: str) -> str:
    return f"{name:<12}{text}"
