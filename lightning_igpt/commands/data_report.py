"""The text of ``lightning-igpt data show``."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import add
from typing import NamedTuple

import torch

from lightning_igpt.commands.data_look import Kind, Seen, Tokens
from lightning_igpt.data.datamodule import ImageDataModule
from lightning_igpt.data.sources import Source
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
    uses = stream_uses(data) if data.opened.streaming else stored_uses(data)
    for source in (data.opened,):
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
    found: dict[tuple[str, str], Use] = {}
    for role, part in data.parts.items():
        purpose = VERBS[role]
        if part.rows is not None:
            purpose += f" on {len(part):,}" + (" (held out)" if role == "val" else "")
        key = (part.source, part.split)
        before = f"{found[key].purpose}, " if key in found else ""
        found[key] = Use(*key, f"{len(part.dataset):,}", before + purpose)
    return list(found.values())


def stream_uses(data: ImageDataModule) -> list[Use]:
    """The same for streams, whose hold-out is a share."""
    division, first = data.division, data.opened
    assert division is not None
    validates = f"validates on the first {data.val_images:,}"
    purposes = {(first.name, division.train): "trains"}
    if division.val is not None:
        purposes[first.name, division.val] = validates
    elif data.val_fraction:
        share = f"trains on about {1 - data.val_fraction:.0%}"
        purposes[first.name, division.train] = f"{share}, {validates} of the rest"
    if division.test is not None:
        purposes[first.name, division.test] = "tests"
    return [Use(*key, n_rows(first, key[1]), purpose) for key, purpose in purposes.items()]


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
    names = data.class_names
    if names is None:
        yield _line("classes", "none")
        return
    shown, more = names[:N_CLASSES], f"and {len(names) - N_CLASSES:,} more" if len(names) > N_CLASSES else ""
    if data.opened.streaming:
        yield _line("classes", f"{len(names):,}, counts unknown (stream): {', '.join(shown)} {more}".rstrip())
        return
    try:
        labels = data.parts["train"].labels(data.opened)
    except ValueError as error:  # pretraining does without
        yield _line("classes", f"{len(names):,}, but the labels are of no use: {error}")
        return
    counts = torch.bincount(labels, minlength=len(names)).tolist()
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
    order = "the first " if data.opened.streaming else ""
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
    share, allowed = len(total.bad) / total.n_rows, data.max_bad_share
    if data.on_bad_image == "error":
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
    size = kind.size
    yield _line("training", f"{type(data).__name__}: {size} x {size} pixels, {size**2:,} tokens per image")
    yield _line("  crop", _crop(kind, next(iter(seen.values()))))
    yield _line("  augment", _augment(kind))
    yield _line("  cache", _cache(data, kind))
    blocks = f"yes, shuffled within shards and blocks of {data.shuffle_buffer:,}"
    yield _line("  streaming", blocks if data.opened.streaming else "no")
    n_batches = data.batches_per_epoch
    if n_batches is None:
        yield _line("  batches", f"of {data.batch_size}; how many in a pass is unknown (stream)")
    elif n_batches == 0:
        n_train = data.n_train
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
    if isinstance(kind, Tokens) or data.opened.streaming:
        return "none needed for tokens" if isinstance(kind, Tokens) else "none, rows of a stream do not come back"
    return f"disk: tokens, {data.n_crops} of each image" if data.cache == "disk" else "none"


def _no_use(split: str, uses: Mapping[str, Use]) -> str:
    in_slices = any(split in re.split(r"\[[^\]]*\]|\+", name) for name in uses)
    return "used in slices" if in_slices else "not used"


def _line(name: str, text: str) -> str:
    return f"{name:<12}{text}"
