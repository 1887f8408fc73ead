"""The speed of pixels to palette ids, compared with the processor of ``transformers``.

Both sides get the same images, smooth colors with some grain, and must give the same ids. The slow peer gets
``--peer-images`` of them; its time is scaled to a whole batch. A further side gets random bytes, whose ids are all over
the table, which no real image is. Ours gets another of 8 batches each turn, as in training.

The limit: every pixel is read (3 bytes), looked up (2 bytes) and written (8 bytes, int64) at the speed at which the
device copies large tensors. Below the table: the time to build the table of all 2^24 colors, without the cache on disk.
"""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_igpt.benchmarks import harness
from lightning_igpt.benchmarks.harness import Turns
from lightning_igpt.benchmarks.peers import transformers
from lightning_igpt.lookup import build_table
from lightning_igpt.palette import Palette

BATCHES, TABLE_REPEATS = 8, 3
BYTES_PER_PIXEL = 3 + 2 + 8
TABLE = "table from nothing"
OURS, NOISE, PEER = "lightning_igpt", "lightning_igpt, random bytes", "transformers"


def pictures(count: int, size: int, seed: int) -> Tensor:
    """uint8 (count, 3, size, size): smooth colors and grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 3, generator=generator) * 255
    smooth = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    grain = torch.randn(smooth.shape, generator=generator) * 8
    return (smooth + grain).round().clamp(0, 255).to(torch.uint8)


def noise(count: int, size: int, seed: int) -> Tensor:
    """uint8 (count, 3, size, size): independent random bytes."""
    shape = (count, 3, size, size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def processor_tokens(palette: Palette, images: Tensor) -> Callable[[], Tensor]:
    """The processor of ``transformers`` on images (B, 3, S, S), which need no resizing."""
    processor = transformers.ImageGPTImageProcessorPil(clusters=palette.to_list(), do_resize=False)
    arrays = list(images.permute(0, 2, 3, 1).contiguous().cpu().numpy())
    given = {"images": arrays, "return_tensors": "pt", "input_data_format": "channels_last"}
    return lambda: processor(**given)["input_ids"].flatten(1)


def measure(options: Namespace) -> dict[str, Turns]:
    """Turns of every side for a whole batch, after a check for equal ids."""
    palette, batch, few = Palette.load("openai"), options.batch_size, min(options.peer_images, options.batch_size)
    batches, drawn = (
        itertools.cycle([make(batch, options.size, seed).to(options.device) for seed in range(BATCHES)])
        for make in (pictures, noise)
    )
    images = pictures(batch, options.size, 0)[:few].to(options.device)
    sides = {
        OURS: lambda: palette.quantize(next(batches)),
        NOISE: lambda: palette.quantize(next(drawn)),
        PEER: processor_tokens(palette, images),
    }
    same = float((palette.quantize(images).cpu() == sides[PEER]()).float().mean())
    harness.require(same == 1, f"{same:.4%} of the ids are those of transformers")
    turns = harness.in_turns(sides, repeats=options.repeats, device=options.device)
    return turns | {PEER: turns[PEER].times(batch / few)}


def main(words: Sequence[str] | None = None) -> None:
    """Read the options, compare, print."""
    parser = harness.options_parser("quantize", __doc__, batch_size=128, repeats=15)
    parser.add_argument("--size", type=int, default=32, help="side of the images (default 32)")
    parser.add_argument("--peer-images", type=int, default=8, help="images for the peer (default 8)")
    options = parser.parse_args(words)
    rows = measure(options)
    colors = Palette.load("openai").colors.numpy()
    built = harness.in_turns({TABLE: lambda: build_table(colors)}, repeats=TABLE_REPEATS, warm_up=0)
    limit = harness.machine_limits(options.device).bytes_per_second
    pixels = options.batch_size * options.size**2
    title = f"{options.batch_size} images of {options.size} x {options.size}"
    work = {name: BYTES_PER_PIXEL * pixels for name in (OURS, NOISE)}
    harness.print_table(title, rows, peer=PEER, work=work, limit=limit)
    speeds = {name: round(pixels / turns.median / 1e6, 3) for name, turns in rows.items()}
    print("\nMpx/s: " + ", ".join(f"{name} {speed:,.3g}" for name, speed in speeds.items()))
    print(f"the table of 2^24 colors from nothing: {built[TABLE].median:.2f} s")
    harness.print_result(
        options,
        rows | built,
        np,
        transformers,
        ratio_vs_peer=rows[OURS].ratio_to(rows[PEER]),
        fraction_of_limit=work[OURS] / limit / rows[OURS].median,
        ratio_vs_peer_random_bytes=round(rows[NOISE].ratio_to(rows[PEER]), 1),
        mpx_per_s=speeds,
        size=options.size,
    )


if __name__ == "__main__":
    main()
