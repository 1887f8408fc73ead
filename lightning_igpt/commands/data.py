"""``lightning-igpt data``: look at a data set before training on it.

Not here: reading and measuring images, the contact sheet (``data_look.py``); the text of the report
(``data_report.py``).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf

from lightning_igpt.commands import recipes
from lightning_igpt.commands.arguments import one_line_errors
from lightning_igpt.commands.data_look import contact_sheet, kind_of, look, rows_by_split
from lightning_igpt.commands.data_report import (
    Colors,
    class_lines,
    palette_lines,
    seen_lines,
    source_lines,
    training_lines,
)
from lightning_igpt.commands.parsers import VerbParser
from lightning_igpt.commands.places import check_file
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.data import PretrainDataModule
from lightning_igpt.data.datamodule import ImageDataModule
from lightning_igpt.data.loaders import DEFAULT_IMAGE_SIZE
from lightning_igpt.palette import Palette
from lightning_igpt.pictures import save_png
from lightning_igpt.weights import load_pretrained

LEAST = {"limit": 0, "n_images": 1, "image_size": 1}


class Wanted(NamedTuple):
    """What a network wants of its images, as far as anything says; None where nothing does."""

    palette: Any  # what Palette.load takes
    palette_name: str | None
    image_size: int | None
    missing: str | None = None  # weights that would say more, but are not there


def show(data: ImageDataModule, colors: Colors, *, out: str, limit: int, n_images: int) -> None:
    """Print what a data set holds and what training makes of it, and write a contact sheet.

    Args:
        data: Before ``setup``.
        colors: The palette, and what it is called.
        out: The PNG file to write.
        limit: Images to open per split; 0 means all.
        n_images: Rows of the contact sheet.

    Raises:
        ValueError: The data set cannot be used at all.
    """
    data.setup()
    kind = kind_of(data, colors.palette)
    print(*source_lines(data), *class_lines(data), sep="\n", flush=True)
    seen = {split: look(rows, kind) for split, rows in rows_by_split(data, limit).items()}
    print(*seen_lines(data, seen), *palette_lines(kind, colors, seen), *training_lines(data, kind, seen), sep="\n")
    if kind.palette is None:
        return
    sheet, n_shown = contact_sheet(data, kind, n_images)
    save_png(sheet, out)
    print(f"wrote {out}: {n_shown} training images ({', '.join(kind.headings)})")


def open_data(options: Namespace, recipe: DictConfig) -> tuple[ImageDataModule, Colors]:
    """The data module, knowing its image size, and the palette.

    Args:
        options: What the parser of ``show`` gave.
        recipe: The whole recipe; empty without one.

    Raises:
        TypeError: The data module is not one of this package's.
        ValueError: An option is out of range, or palette or network are unusable.
    """
    for name, least in LEAST.items():
        if options[name] is not None and options[name] < least:
            raise ValueError(f"{name} is {options[name]}; it must be at least {least}")
    data = make_data(options)
    recipe["data"] = options.data.as_dict()  # so that flags count where the network refers to them
    wanted = wishes(section_of(recipe, "model"), options)
    mark = data.opened.tokens
    default = mark.image_size if mark else DEFAULT_IMAGE_SIZE
    # Set here, the size needs no trainer to be asked for its network's.
    size = data.image_size = options.image_size or data.image_size or wanted.image_size or default
    spec = wanted.palette or data.palette or "openai"
    name = wanted.palette_name or (spec if isinstance(spec, str) else "of the recipe")
    if wanted.missing:
        print(f"{wanted.missing} is not there yet: palette {name} and {size} x {size} pixels are assumed")
    return data, Colors(Palette.load(spec), name)


def make_data(options: Namespace) -> ImageDataModule:
    """The data module that the options describe.

    Raises:
        TypeError: It is not one of this package's.
        ValueError: Its own arguments are out of range.
    """
    parser: Any = show_parser()
    # jsonargparse 4.49 renamed it.
    data = getattr(parser, "instantiate", parser.instantiate_classes)(Namespace(data=options.data)).data
    if not isinstance(data, ImageDataModule):
        raise TypeError(
            f"{type(data).__name__} is not a data module of lightning_igpt, so nothing is known of its images; give "
            "them as SOURCE: a folder, Parquet or a hub id"
        )
    return data


def wishes(model: Any, options: Namespace) -> Wanted:
    """What the model section of a recipe says, and the weights that it starts from.

    Raises:
        ValueError: There is no such network, or the weights are damaged.
    """
    init = (model.get("init_args") if isinstance(model, Mapping) else None) or {}
    palette, size = options.palette or init.get("palette"), options.image_size or init.get("image_size")
    network, pretrained, name = init.get("network"), init.get("pretrained"), None
    if size is None and isinstance(network, Mapping):
        size = ImageGPTConfig.resolve(network).image_size
    if pretrained and (palette is None or size is None):
        try:
            loaded = load_pretrained(pretrained)
        except FileNotFoundError:
            return Wanted(palette, None, size, missing=str(pretrained))
        size = size or loaded.config.image_size
        if palette is None:
            palette, name = loaded.palette, f"of {pretrained}"
    if model is not None and size is None:
        size = ImageGPTConfig.resolve(network or "igpt_s").image_size
    if model is not None and palette is None:
        palette = "openai"
    return Wanted(palette, name, size)


def read_recipe(files: Sequence[str]) -> DictConfig:
    """Recipes, by file or name, merged from left to right; empty without any.

    Raises:
        FileNotFoundError: There is no such file, and no shipped recipe of the name.
        ValueError: A file is no YAML, or no recipe with data.
    """
    merged = OmegaConf.create()
    for file in files:
        merged.merge_with(recipes.read(file))
    if files and merged.get("data") is None:
        raise ValueError(f"{', '.join(files)} has no section data; give its images as SOURCE instead")
    return merged


def section_of(recipe: DictConfig, name: str) -> Any:
    """A section with plain values in the place of references to other sections; None where it is absent."""
    section = recipe.get(name)
    return OmegaConf.to_container(section, resolve=True) if OmegaConf.is_config(section) else section


def show_parser() -> VerbParser:
    """The parser of ``data show``."""
    show = VerbParser(
        parser_mode="omegaconf+",
        allow_abbrev=False,
        description="Look at a data set before training: splits, classes, bad images, palette error, a contact sheet.",
    )
    show.add_argument("source", nargs="?", help="A folder of images, Parquet, a hub id, or digits; or give --config.")
    show.add_argument("--config", "-c", help="A recipe, by file or name, whose data, palette and image size to take.")
    show.add_argument("--image_size", type=int | None, help="Side of the square images. Default: the recipe's, or 32.")
    show.add_argument("--palette", type=str | None, help="Palette. Default: the recipe's, or openai.")
    sheet = "The contact sheet to write. Missing folders are made."
    show.add_argument("--out", type=str, default="data.png", help=sheet)
    show.add_argument("--limit", type=int, default=1000, help="Images to open per split, evenly spread; 0 means all.")
    show.add_argument("--n_images", type=int, default=8, help="Rows of the contact sheet.")
    about = "A data module, such as ProbeDataModule, and by --data.NAME its options; they win over the recipe's."
    show.add_subclass_arguments(LightningDataModule, "data", required=False, help=about)
    return show


def parse(words: Sequence[str]) -> tuple[Namespace, DictConfig]:
    """The options of ``data show``, overrides of the recipe's data among them, and the whole recipe.

    Raises:
        SystemExit: Wrong usage.
        ValueError: There is no source, or one too many.
    """
    about = "Look at a data set before training on it."
    parser = VerbParser(prog="lightning-igpt data", description=about, parser_mode="omegaconf+", allow_abbrev=False)
    parser.add_subcommands(required=True, dest="verb").add_subcommand("show", show_parser(), help="look at a data set")
    configs = argparse.ArgumentParser(prog="lightning-igpt data show", add_help=False, allow_abbrev=False)
    configs.add_argument("--config", "-c", action="append", default=[])
    files, rest = configs.parse_known_args(list(words))
    recipe = read_recipe(files.config)
    section: Any = {"class_path": PretrainDataModule.__name__}
    if files.config:
        section = section_of(recipe, "data")
    given = [f"--data={json.dumps(section)}"] if rest[:1] == ["show"] else []
    options = parser.parse_args([*rest[:1], *given, *rest[1:]]).show
    if options.source is None:
        if not files.config and not any(word.startswith("--data") for word in rest):
            raise ValueError("give a source, such as digits or a folder of images, or a recipe by --config")
        return options, recipe
    if files.config:
        raise ValueError(
            f"{options.source} and the recipe both name images; for the recipe with other images give "
            f"--data.init_args.source {options.source}"
        )
    if options.data.init_args.get("source", "digits") != "digits":
        raise ValueError(f"{options.source} and --data.source both name images; give one of them")
    options.data.init_args.source = options.source
    return options, recipe


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    with one_line_errors("lightning-igpt data"):
        options, recipe = parse(words)
        check_file(options.out, "--out", "data.png", ".png")
        data, colors = open_data(options, recipe)
        show(data, colors, out=options.out, limit=options.limit, n_images=options.n_images)
    return 0
