"""``lightning-igpt convert``: weights from any format that is read here into one that others read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lightning_igpt.commands.arguments import run_function
from lightning_igpt.commands.places import check_file, check_folder
from lightning_igpt.planning import parameter_count
from lightning_igpt.weights import Pretrained, load_pretrained, native, openai, save_pretrained
from lightning_igpt.weights.check import check_logits, compare_with_transformers

TOLERANCE = 1e-4  # of the largest logit; float32 in another order of operations stays far below
SUFFIXES = {"openai-npz": ".npz", "safetensors": ".safetensors"}


def convert(
    source: str,
    out: str,
    to: Literal["hf", "openai-npz", "safetensors"] = "hf",
    check: bool = False,
    image_size: int | None = None,
    palette: str | None = None,
    title: str | None = None,
    data: str | None = None,
    license: str | None = None,
) -> None:
    """Write weights in another format, read them back, and show what was read and written.

    Args:
        source: A .ckpt file, or the folder that a sharded run saves in its place; a run folder, a Hugging Face folder
            or hub id (owner/name or owner/name@revision), an OpenAI checkpoint, or an .npz or .safetensors file that
            this command wrote.
        out: Where to: a folder for hf, else a file. Missing folders are made.
        to: hf is the layout of transformers' ImageGPT, with palette and model card; the classifier of a fine-tuned
            network becomes an ImageGPTForImageClassification. openai-npz is one file of OpenAI's variables for NumPy,
            with the palette. safetensors is one file under this package's own names, config in its header.
        check: Compare with transformers on random tokens and print the largest difference.
        image_size: Side of the images of the written network; positions are interpolated where it is another.
        palette: The palette that the network was trained with, where the source holds none: openai, gray:16, a .npy
            file, a Hugging Face folder or hub id.
        title: Heading of the model card (hf).
        data: What the network was trained on, for the model card; default what the checkpoint says.
        license: SPDX identifier of the weights' licence, for the model card.
    """
    out = str(Path(out).expanduser())
    card = {"title": title, "data": data, "license": license}
    _check_out(out, to)
    if to == "hf":
        check_folder(out, "OUT")
    else:
        check_file(out, "OUT", f"weights{SUFFIXES[to]}")
    loaded = load_pretrained(source, palette=palette, image_size=image_size)
    logits = check_logits(loaded.network)
    _row("read", loaded.origin)
    _describe(loaded)
    _row("check logits", " ".join(f"{value:.5f}" for value in logits[-1, :4].tolist()) + f" ... of pixel {len(logits)}")
    if check:
        _compare(loaded)
    _write(loaded, Path(out), to, card)
    head = loaded.head if to != "openai-npz" else None
    del loaded  # before it comes back from the disk; of large networks there is room for one
    again = load_pretrained(out)
    difference = (check_logits(again.network) - logits).abs().max().item()
    if head is not None:
        difference = max(difference, (again.head - head).abs().max().item() if again.head is not None else float("inf"))
    _row("read back", f"largest difference of check logits {difference:g}")
    if difference != 0:
        raise ValueError(f"{out} does not give the network back that was written; its disk may be damaged")


def _describe(loaded: Pretrained) -> None:
    config = loaded.config
    _row("network", f"{config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, {config.objective}")
    _row("images", f"{config.image_size} x {config.image_size} = {config.n_positions} tokens")
    _row("parameters", f"{parameter_count(config):,}")
    _row("palette", f"{len(loaded.palette)} colours, sha256 {loaded.palette.sha256[:12]}")
    if loaded.head is not None:
        _row("classes", f"{len(loaded.head)}: {', '.join(loaded.class_names or ['without names'])}")


def _write(loaded: Pretrained, out: Path, to: str, card: dict[str, str | None]) -> None:
    head, names = loaded.head, loaded.class_names
    filled = loaded.card.filled(**card)
    if to == "hf":
        save_pretrained(out, loaded.network, loaded.palette, card=filled, head=head, class_names=names)
    elif to == "safetensors":
        native.save_file(out, loaded.network, loaded.palette, head, names, filled.known())
    else:
        openai.save_archive(out, loaded.network, loaded.palette)
    _row("wrote", f"{out} ({to})")
    if to == "hf" and loaded.config.objective == "bert":
        _row("note", "transformers cannot run a BERT network: no sos, no causal mask; load_pretrained can")
    if to == "openai-npz" and head is not None:
        _row("note", "OpenAI's layout has no place for the class head; it was left out")
    if to == "hf" and head is not None:
        _row(
            "note", "the colour head is in lm_head.safetensors, for load_pretrained; transformers' classifier has none"
        )


def _compare(loaded: Pretrained) -> None:
    found = compare_with_transformers(loaded.network, loaded.palette, loaded.head)
    what = "class" if loaded.head is not None else "colour"
    _row(
        "transformers",
        f"largest difference {found.difference:.3g} over {found.logits:,} {what} logits up to {found.largest:.3g}",
    )
    if not found.difference <= TOLERANCE * max(1.0, found.largest):
        raise ValueError(f"transformers computes other logits: the largest difference is {found.difference:.3g}")


def _check_out(out: str, to: str) -> None:
    suffix = SUFFIXES.get(to)
    if suffix is not None and Path(out).suffix != suffix:
        raise ValueError(f"out is {out}; a file of the format {to} must end in {suffix}")
    if suffix is None and (Path(out).is_file() or Path(out).suffix in SUFFIXES.values()):
        meant = next((f"; did you mean --to {name}?" for name, end in SUFFIXES.items() if out.endswith(end)), "")
        raise ValueError(f"out is {out}, a file; the format {to} is a folder{meant}")


def _row(name: str, value: str) -> None:
    print(f"{name:<14}{value}")


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    return run_function(convert, words, "convert", positional=True)
