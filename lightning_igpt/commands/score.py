"""``lightning-igpt score``: how surprising images are to a network, as numbers and as pictures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_igpt import pictures as drawing
from lightning_igpt import sampling
from lightning_igpt.commands import against as comparing
from lightning_igpt.commands.arguments import check_file
from lightning_igpt.commands.complete import DEFAULT, pick_device
from lightning_igpt.commands.images import read_images
from lightning_igpt.files import shown, write_csv
from lightning_igpt.objectives import nats_to_bits, per_pixel
from lightning_igpt.palette import Palette
from lightning_igpt.weights import Pretrained, load_pretrained

N_PRINTED, N_LEAST = 5, 4  # rows of the list; least surprising images on the sheet, for contrast


def score(
    images: str,
    pretrained: str = DEFAULT,
    out: str = "scores.csv",
    pictures: int = 16,
    limit: int | None = None,
    split: str | None = None,
    batch_size: int = 32,
    device: str = "auto",
    on_bad_image: Literal["error", "skip"] = "error",
    palette: str | None = None,
    against: str | None = None,
    n_draws: int = 32,
    seed: int = 0,
) -> None:
    """Write the surprise of each image in nats per pixel, draw heat maps, and print the mean.

    A BERT network gives an upper bound for each image, and no heat maps. With against, also print how well three scores
    detect anomalies: nats, their distance from the mean, and nats minus those of a lossless file.

    Args:
        out: The CSV file, most surprising image first. Missing folders are made.
        pictures: Number of the most surprising images to draw with heat maps, in scores_surprise.png next to
            scores.csv.
        on_bad_image: What to do with an image that cannot be read: error stops; skip names it and leaves it out.
        against: Anomalies to detect, a source like images, with the same split and limit. Writes the scores of each
            image into scores_against.csv, and AUROC and the false positive rate at 95 % detected anomalies into
            scores_auroc.csv. Every second image only gives the mean.
        n_draws: Random masks of each image for a BERT network's bound, an even number.
        seed: Seed of these masks.
    """
    path, sheet = Path(out), Path(out).with_name(f"{Path(out).stem}_surprise.png")
    for file in (path, *([sheet] if pictures else []), *(comparing.files(path) if against else ())):
        check_file(file, "--out", "scores.csv")
    loaded = load_pretrained(pretrained, palette=palette)
    print(shown(loaded.origin))
    loaded.network.to(pick_device(device))
    reading: dict[str, Any] = {"split": split, "limit": limit, "on_bad_image": on_bad_image}
    scoring: dict[str, Any] = {"batch_size": batch_size, "n_draws": n_draws, "seed": seed}
    tokens, names = read_tokens(loaded, images, **reading)
    others = read_tokens(loaded, against, **reading) if against else None
    nats, per_image = surprise(loaded, tokens, names, **scoring)
    ranked = [(names[i], per_image[i].item(), i) for i in per_image.argsort(descending=True, stable=True).tolist()]
    n_tokens, bounded = loaded.palette.tokens_per_pixel, loaded.config.objective == "bert"
    scales = {"nats_per_pixel": 1.0, "bits_per_pixel": nats_to_bits(1.0)}
    scales |= {"bits_per_dim": nats_to_bits(1.0) / n_tokens} if loaded.palette.is_exact else {}
    heads = ["image", *scales]
    rows = [[name, *(f"{value * scale:.6f}" for scale in scales.values())] for name, value, _ in ranked]
    if bounded:
        error = nats.std(1) / math.sqrt(nats.shape[1])  # (N,), of the draws
        heads = [heads[0], *(f"{head}_bound" for head in heads[1:]), "standard_error_nats_per_pixel"]
        rows = [[*row, f"{error[i].item():.6f}"] for row, (_, _, i) in zip(rows, ranked, strict=True)]
    write_csv(path, [heads, *rows])
    print(summary(per_image, n_tokens * math.log(loaded.config.vocab_size)))
    if loaded.palette.is_exact:
        print(f"{per_image.mean() * scales['bits_per_dim']:.4f} bits per dimension (uniform: 8.0000)")
    if bounded:
        print(f"an upper bound by {n_draws} masks of each image; standard error of an image's: {error.mean():.4f}")
    print(f"{'rank':>6}  {'nats per pixel':>14}  image")
    for rank, (name, value, _) in enumerate(ranked[:N_PRINTED], 1):
        print(f"{rank:>6}  {value:>14.4f}  {shown(name)}")
    print(f"wrote {path}")
    if others is not None:
        _, foreign = surprise(loaded, *others, **scoring)
        comparing.compare(loaded.palette, (tokens, per_image, names), (others[0], foreign, others[1]), path)
    if pictures and not bounded:
        drawing.save_png(surprise_sheet(tokens, nats, names, loaded.palette, pictures=pictures), sheet)
        print(f"wrote {sheet}")


def read_tokens(loaded: Pretrained, source: str, **options: Any) -> tuple[Tensor, list[str]]:
    """The images of a source as the network reads them, int64 (N, T), and their names."""
    pixels, names = read_images(source, loaded.config.image_size, loaded.resize_filter, **options)
    return loaded.palette.quantize(pixels), names


def surprise(loaded: Pretrained, tokens: Tensor, names: Sequence[str], **options: Any) -> tuple[Tensor, Tensor]:
    """What ``sampling.score`` gives, and its mean for each image, nats per pixel in float64 (N,)."""
    nats = sampling.score(loaded.network, tokens, **options).cpu()
    if loaded.config.objective == "autoregressive":
        nats = per_pixel(nats, loaded.palette.tokens_per_pixel)
    per_image = nats.mean(1, dtype=torch.float64)
    if not per_image.isfinite().all():
        name, value = next(pair for pair in zip(names, per_image.tolist(), strict=True) if not math.isfinite(pair[1]))
        raise ValueError(f"{name}: its surprise is {value}; the weights are damaged, or training diverged")
    return nats, per_image


def summary(per_image: Tensor, uniform: float) -> str:
    """Mean of float64 (N,) nats per pixel and its standard error, in words; ``uniform`` is ln K."""
    n, mean = len(per_image), f"{per_image.mean():.4f}"
    if n == 1:
        return f"1 image: {mean} nats per pixel (no standard error from one image; uniform: {uniform:.4f})"
    error = per_image.std().item() / math.sqrt(n)
    return f"{n} images: {mean} +- {error:.4f} nats per pixel (mean, standard error, n = {n}; uniform: {uniform:.4f})"


def surprise_sheet(tokens: Tensor, nats: Tensor, names: Sequence[str], palette: Palette, *, pictures: int) -> Tensor:
    """The most surprising images and a few of the least, next to heat maps of ``nats`` (N, S * S): uint8 (3, h, w)."""
    per_image = nats.mean(1, dtype=torch.float64)
    n, side = len(names), math.isqrt(nats.shape[1])
    ranked = list(enumerate(per_image.argsort(descending=True, stable=True).tolist(), 1))
    most, least = ranked[:pictures], ranked[max(pictures, n - N_LEAST) :]
    n_colors = len(palette) ** palette.tokens_per_pixel
    limit = drawing.surprise_limit(nats[[index for _, index in most + least]], n_colors)
    parts = [drawing.heading("surprise of each pixel in nats"), drawing.surprise_bar(limit, n_colors)]
    for title, part in ((f"the most surprising of {n} images", most), ("the least surprising", least)):
        if part:
            places = [index for _, index in part]
            maps = drawing.surprise_map(nats[places].view(-1, side, side), limit=limit)
            pairs = torch.stack([palette.dequantize(tokens[places]).cpu(), maps], 1)  # (n, 2, 3, S, S)
            cells = torch.stack([drawing.image_grid(pair[None], gap=4) for pair in pairs])
            lines = [(f"{rank}: {per_image[index]:.3f} nats per pixel", names[index]) for rank, index in part]
            parts += [drawing.heading(title), drawing.contact_sheet(cells, lines)]
    return drawing.stack(parts)
