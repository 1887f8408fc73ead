"""``lightning-igpt convert``: weights from any format that can be read into one that others read."""

from pathlib import Path
from typing import Literal

import torch

from lightning_igpt.commands.arguments import check_file, check_folder
from lightning_igpt.commands.help import row
from lightning_igpt.commands.plan import shape
from lightning_igpt.weights import load_pretrained, native, save_pretrained
from lightning_igpt.weights.card import words_for
from lightning_igpt.weights.huggingface import check_logits, compare_with_transformers

TOLERANCE = 1e-4  # of the largest logit; float32 in another order of operations stays far below


def convert(
    source: str,
    out: str,
    to: Literal["hf", "safetensors"] = "hf",
    check: bool = False,
    image_size: int | None = None,
    palette: str | None = None,
    title: str | None = None,
    data: str | None = None,
    license: str | None = None,
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Write weights in another format, read them back, and compare.

    Args:
        source: A .ckpt file, a run folder, a Hugging Face folder or hub id (owner/name or owner/name@revision), an
            OpenAI checkpoint, a .safetensors file that this command wrote, or the name of an embedded network.
        out: A folder for hf, else a file. Missing folders are made.
        to: hf is the layout of transformers' ImageGPT, with palette and model card; the classifier of a fine-tuned
            network becomes an ImageGPTForImageClassification. safetensors is one file under this package's own names,
            config in its header.
        check: Compare with transformers on random tokens and print the largest difference.
        image_size: Image size of the written network, to which positions are interpolated.
        title: Heading of the model card (hf).
        data: What the network was trained on, for the model card; default from the checkpoint.
        license: SPDX identifier of the weights' license, for the model card.
        dtype: Type of the weights in the file; float16 takes half the space. Loading converts to float32.
    """
    path = Path(out).expanduser()
    if to == "safetensors":
        check_file(path, "OUT", "weights.safetensors", ".safetensors")
    elif path.is_file() or path.suffix == ".safetensors":
        raise ValueError(f"out is {path}, a file; the format hf is a folder: name one, or add --to safetensors")
    else:
        check_folder(path, "OUT")
    loaded = load_pretrained(source, palette=palette, image_size=image_size)
    kind = getattr(torch, dtype)
    logits = check_logits(loaded.network.to(kind).float())  # of the weights as they are written
    if not logits.isfinite().all():
        raise ValueError(f"{source} gives logits that are not finite as {dtype}; write float32, or train again")
    config, head = loaded.config, loaded.head
    print(row("read", loaded.origin))
    print(row("network", f"{shape(config)}, {config.objective}"))
    print(row("images", f"{config.image_size} x {config.image_size} = {config.n_positions} tokens"))
    print(row("palette", f"{words_for(loaded.palette)}, sha256 {loaded.palette.sha256[:12]}"))
    if head is not None:
        print(row("classes", f"{len(head)}: {', '.join(loaded.class_names or ['without names'])}"))
    if check:
        peer = compare_with_transformers(loaded.network, loaded.palette, head)
        what = f"{peer.logits:,} {'color' if head is None else 'class'} logits up to {peer.largest:.3g}"
        print(row("transformers", f"largest difference {peer.difference:.3g} over {what}"))
        if not peer.difference <= TOLERANCE * max(1.0, peer.largest):
            raise ValueError(f"logits of transformers differ by up to {peer.difference:.3g}; do not use this export")
    card = loaded.card.filled(title=title, data=data, license=license)
    loaded.network.to(kind)
    if to == "hf":
        save_pretrained(path, loaded.network, loaded.palette, card=card, head=head, class_names=loaded.class_names)
    else:
        native.save_file(path, loaded.network, loaded.palette, head, loaded.class_names, card.known())
    print(row("wrote", f"{path} ({to})"))
    if to == "hf" and config.objective == "bert":
        print(row("note", "transformers cannot run a BERT network: no sos, no causal mask; load_pretrained can"))
    if to == "hf" and head is not None:
        print(row("note", "the color head is in lm_head.safetensors, as transformers' classifier has no place for it"))
    del loaded  # a large network is read back into the same memory
    again = load_pretrained(path)
    difference = (check_logits(again.network) - logits).abs().max().item()
    if head is not None and again.head is not None:
        difference = max(difference, (again.head - head).abs().max().item())
    print(row("read back", f"largest difference of check logits {difference:g}"))
    if difference != 0 or (head is None) != (again.head is None):
        raise ValueError(f"the network read back from {path} differs by {difference:g}; check the disk and repeat")
