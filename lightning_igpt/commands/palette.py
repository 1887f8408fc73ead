"""``lightning-igpt palette``: fit the colors of a palette to images, or show one."""

from math import sqrt
from pathlib import Path

from lightning_igpt.commands.arguments import check_file
from lightning_igpt.commands.images import images_of, open_images
from lightning_igpt.files import counted, shown
from lightning_igpt.kmeans import fit_palette
from lightning_igpt.palette import Palette
from lightning_igpt.pictures import save_png, swatch, to_tensor

N_CHECKED = 1000  # images on which a fitted palette's error is measured


def fit(
    source: str,
    out: str,
    n_colors: int = 512,
    *,
    seed: int = 0,
    split: str = "train",
    limit: int | None = None,
    image_column: str | None = None,
    overwrite: bool = False,
) -> None:
    """Fit a palette to images by k-means and write it, with a PNG of its colors next to it.

    Args:
        out: The .npy file to write; name it as ``palette`` in a recipe. Missing folders are made.
        n_colors: Colors of the palette, which become the network's vocab_size.
        seed: Seed of k-means.
        split: Split of a dataset.
        limit: Largest number of images, evenly spread over the split.
        image_column: Column of images; needed unless exactly one column has the type Image.
    """
    path, picture = Path(out), Path(out).with_suffix(".png")
    for file, suffix in ((path, ".npy"), (picture, ".png")):
        check_file(file, "OUT", "palette.npy", suffix)
        if file.exists() and not overwrite:
            raise FileExistsError(f"{file} exists; pass --overwrite true to replace it")
    opened, _ = open_images(source, split, image_column=image_column)
    n_images = min(len(opened.splits[split]), limit or 2**62)
    print(f"{shown(opened.name)}, split {split!r}: {n_colors} colors for {counted(n_images, 'image')}")
    palette = fit_palette((image for _, image in images_of(opened, split, n_images)), n_colors, seed=seed)
    palette.save(path)
    save_png(swatch(palette.rgb), picture)
    squares, n_pixels, n_checked = 0.0, 0, min(n_images, N_CHECKED)
    for _, image in images_of(opened, split, n_checked):
        size = image.width * image.height
        squares, n_pixels = squares + palette.rmse(to_tensor(image)[None]) ** 2 * size, n_pixels + size
    print(f"K {len(palette)}, sha256 {palette.sha256}")
    print(f"RMSE {sqrt(squares / n_pixels):.2f} of 255 per channel on {counted(n_checked, 'image')}")
    print(f"wrote {path} and {picture}")


def show(palette: str = "openai", out: str = "palette.png") -> None:
    """Write a PNG of a palette's colors and print its size, digest and range.

    Args:
        palette: openai, gray:K, rgb, a .npy file, a Hugging Face folder or a hub id.
        out: The PNG file to write. Missing folders are made.
    """
    check_file(out, "--out", "palette.png", ".png")
    loaded = Palette.load(palette)
    save_png(swatch(loaded.rgb), out)
    print(f"K {len(loaded)}, sha256 {loaded.sha256}")
    print(f"values {loaded.colors.min():.5f} to {loaded.colors.max():.5f}")
    print(f"wrote {out}")


VERBS = {"fit": fit, "show": show}
