"""``lightning-igpt convert``: hand a network to people who only know transformers."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_igpt.commands.arguments import run_function
from lightning_igpt.weights import load_pretrained, save_pretrained


def convert(source: str, out: str) -> None:
    """Write a network as a folder that transformers' ImageGPT classes load: config, weights and palette.

    Args:
        source: A .ckpt file or run folder, a Hugging Face folder or hub id, or an OpenAI checkpoint.
        out: The folder to write.
    """
    loaded = load_pretrained(source)
    save_pretrained(out, loaded.network, loaded.palette)
    config = loaded.config
    count = sum(parameter.numel() for parameter in loaded.network.parameters())
    print(f"read    {loaded.origin}")
    print(f"network {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, {count:,} parameters")
    print(f"palette {len(loaded.palette)} colours, sha256 {loaded.palette.sha256[:12]}")
    print(f"wrote   {out}: config.json, model.safetensors, preprocessor_config.json")
    if config.objective == "bert":
        print("note    a BERT network has no sos and no causal mask: transformers cannot run it, load_pretrained can")


def run(words: Sequence[str]) -> int:
    """Entry point of the verb."""
    return run_function(convert, words, "convert", positional=True)
