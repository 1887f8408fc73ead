"""``lightning-igpt data``: look at a dataset before training on it."""

import io
from collections import Counter
from math import sqrt

import torch
from PIL import Image

from lightning_igpt.commands.arguments import check_file
from lightning_igpt.commands.help import row
from lightning_igpt.commands.images import fitted, open_images, rows_of
from lightning_igpt.data.sources import Source
from lightning_igpt.files import counted, shown
from lightning_igpt.images import FORMATS, BadImageError, decode, fetch, resize_center_crop
from lightning_igpt.palette import Palette
from lightning_igpt.pictures import CELL, enlarge, heading, image_grid, save_png, stack, to_tensor
from lightning_igpt.weights.card import words_for

N_CLASSES, N_BAD = 20, 10  # lines at most
HEADINGS = ("original", "resized", "quantized")


def show(
    source: str,
    image_size: int = 32,
    palette: str = "openai",
    out: str = "data.png",
    limit: int = 1000,
    n_images: int = 8,
    config_name: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
) -> None:
    """Print splits, classes, bad images and the palette's error, and write a contact sheet.

    Args:
        image_size: Side of the square images that a network would read.
        palette: openai, gray:16, rgb, a .npy file, a Hugging Face folder or hub id.
        out: The contact sheet to write. Missing folders are made.
        limit: Images to open per split, evenly spread; 0 means all.
        n_images: Rows of the contact sheet.
    """
    check_file(out, "--out", "data.png", ".png")
    opened, _ = open_images(source, name=config_name, image_column=image_column, label_column=label_column)
    colors = Palette.load(palette)
    print(row("source", opened.name))
    print(row("splits", ", ".join(f"{split} {len(rows):,}" for split, rows in opened.splits.items())))
    print(row("columns", f"{opened.image_column}, {opened.label_column or 'no labels'}"))
    print(*class_lines(opened), sep="\n", flush=True)
    modes: Counter[str] = Counter()
    sizes, squares, bad, counts = [], [], [], []  # (width, height) upright, of the palette's error, names, of splits
    for split, rows in opened.splits.items():
        counts.append(f"{min(len(rows), limit or len(rows)):,} of {split}")
        for name, value in rows_of(opened, split, limit):
            try:
                image = decode(value)
            except BadImageError as error:
                bad.append(f"{name}: {' '.join(str(error).split())}")
                continue
            with Image.open(io.BytesIO(fetch(value)["bytes"]), formats=FORMATS) as file:
                modes[str(file.mode)] += 1  # before it was decoded
            sizes.append(image.size)
            squares.append(colors.rmse(to_tensor(resize_center_crop(image, image_size))[None]) ** 2)
    print(row("examined", ", ".join(counts)))
    if sizes:
        small, large = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
        kinds = ", ".join(f"{mode} {count:,}" for mode, count in modes.most_common())
        print(row("images", f"{kinds}; {small[0]} x {small[1]} to {large[0]} x {large[1]}"))
        rmse = sqrt(sum(squares) / len(squares))
        print(row("palette", f"{palette}, {words_for(colors)}: RMSE {rmse:.2f} of 255 per channel at {image_size}"))
    print(row("bad images", f"{len(bad):,}; on_bad_image=skip leaves them out" if bad else "none"))
    print(*(f"  {shown(line)}" for line in bad[:N_BAD]), sep="\n", end="\n" * bool(bad))
    sheet, n_shown = contact_sheet(opened, image_size, colors, n_images)
    save_png(sheet, out)
    print(f"wrote {out}: {counted(n_shown, 'image')} ({', '.join(HEADINGS)})")


def class_lines(source: Source) -> list[str]:
    """The classes with their numbers of images in the training split."""
    names, split = source.class_names, "train" if "train" in source.splits else next(iter(source.splits))
    if names is None:
        return [row("classes", "none")]
    try:
        counts = torch.bincount(source.labels(split), minlength=len(names)).tolist()
    except ValueError as error:  # pretraining needs no labels
        return [row("classes", f"{len(names):,}, but the labels cannot be used: {error}")]
    head = row("classes", f"{len(names):,}, with {min(counts):,} to {counted(max(counts), 'image')} of {split} each")
    lines = [f"  {shown(name)}  {count:,}" for name, count in zip(names[:N_CLASSES], counts, strict=False)]
    return [head, *lines, *[f"  and {len(names) - N_CLASSES:,} more"] * (len(names) > N_CLASSES)]


def contact_sheet(source: Source, size: int, palette: Palette, n_images: int) -> tuple[torch.Tensor, int]:
    """Images, and what the network reads, uint8 (3, H, W), and their number; of the training or else first split."""
    split = "train" if "train" in source.splits else next(iter(source.splits))
    parts: list[torch.Tensor] = []
    for name, value in rows_of(source, split, n_images):
        try:
            image = decode(value)
        except BadImageError:
            continue
        resized = to_tensor(resize_center_crop(image, size))[None]
        squares = torch.cat([resized, palette.dequantize(palette.quantize(resized))])
        enlarged = enlarge(squares, max(1, CELL // size))
        pictures = torch.cat([fitted(image, enlarged.shape[-1])[None], enlarged])
        grid = image_grid(pictures[None], scale=1, captions=None if parts else HEADINGS)
        parts += [grid, heading(f"{name}, {image.width} x {image.height}")]
    return (stack(parts) if parts else heading("no image could be read")), len(parts) // 2


VERBS = {"show": show}
