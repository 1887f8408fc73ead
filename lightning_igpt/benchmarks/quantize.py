"""The speed of pixels to palette ids, compared with the processor of ``transformers``.

Both sides get the same images, smooth colors with some grain, and must give the same ids. The slow peer gets
``--peer-images`` of them; its time is scaled to a whole batch. A further side gets random bytes, whose ids are all over
the table, which no real image is. Ours gets another of 8 batches each turn, as in training.

The limit: every pixel is read (3 bytes), looked up (2 bytes) and written (8 bytes, int64) at the speed at which the
device copies large tensors. Below the table: the time to build the table of all 2^24 colors, without the cache on disk.
"""

import itertools
import statistics
from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_igpt.benchmarks import harness
from lightning_igpt.benchmarks.harness import Comparison, Turns, pictures, transformers
from lightning_igpt.lookup import build_table
from lightning_igpt.palette import Palette

BATCHES, TABLE_REPEATS = 8, 3
BYTES_PER_PIXEL = 3 + 2 + 8
OURS, NOISE, PEER = "lightning_igpt", "lightning_igpt, random bytes", "transformers"


def processor_tokens(palette: Palette, images: Tensor) -> Callable[[], Tensor]:
    """The processor of ``transformers`` on images (B, 3, S, S), which need no resizing."""
    processor = transformers.ImageGPTImageProcessorPil(clusters=palette.to_list(), do_resize=False)
    arrays = list(images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    given = {"images": arrays, "return_tensors": "pt", "input_data_format": "channels_last"}
    return lambda: processor(**given)["input_ids"].flatten(1)


def measure(options: Namespace) -> dict[str, Turns]:
    """Turns of every side for a whole batch, after a check for equal ids."""
    palette, batch, few = Palette.load("openai"), options.batch_size, min(options.peer_images, options.batch_size)
    made = [pictures(batch, options.size, options.size, seed).to(options.device) for seed in range(BATCHES)]
    batches, drawn = itertools.cycle(made), itertools.cycle([torch.randint_like(each, 256) for each in made])
    images = made[0][:few]
    sides = {
        OURS: lambda: palette.quantize(next(batches)),
        NOISE: lambda: palette.quantize(next(drawn)),
        PEER: processor_tokens(palette, images),
    }
    same = float((palette.quantize(images).cpu() == sides[PEER]()).float().mean())
    harness.require(same == 1, f"{same:.4%} of the ids are those of transformers")
    turns = harness.in_turns(sides, options.repeats, options.device)
    return turns | {PEER: turns[PEER].times(batch / few)}


def main(words: Sequence[str] | None = None) -> None:
    """Read the options, compare, print."""
    own = {"size": (32, "side of the images"), "peer_images": (8, "images for transformers")}
    options = harness.parse("quantize", __doc__, words, repeats=(15, "turns"), batch_size=(128, "images"), **own)
    rows = measure(options)
    colors, pixels = Palette.load("openai").colors.numpy(), options.batch_size * options.size**2
    least = BYTES_PER_PIXEL * pixels / harness.machine_limits(options.device).bytes_per_second
    comparison = Comparison(rows, OURS, PEER, dict.fromkeys((OURS, NOISE), least), pixels, "pixels")
    comparison.print_table(f"{options.batch_size} images of {options.size} x {options.size}")
    seconds = statistics.median(harness.seconds_of(lambda: build_table(colors)) for _ in range(TABLE_REPEATS))
    print(f"the table of 2^24 colors from nothing: {seconds:.2f} s")
    comparison.print_result(options, np, transformers, table_seconds=seconds)


if __name__ == "__main__":
    main()
