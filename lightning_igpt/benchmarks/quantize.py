"""How fast pixels become palette ids, beside the processor of ``transformers`` and a plain search in torch.

All sides get the same pictures, smooth colours with some grain, and must give the same ids. The peers are so slow that
they get ``--peer-images`` of them; their times are scaled to a whole batch. A side of its own gets bytes drawn at
random, whose ids lie all over the table: no real picture is as bad for the caches. Ours takes another of 8 batches
each turn, as a training run would.

The limit: every pixel is read (3 bytes), looked up (2 bytes) and written (8 bytes, int64) at the speed at which the
device copies large tensors. Below the tables: how long it takes to build the table of all 2^24 colours, without the
cache on disk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_igpt.benchmarks.harness import (
    Turns,
    as_json,
    conditions,
    in_turns,
    machine_limits,
    options_parser,
    positive,
    print_json,
    print_table,
    require,
    say_unused,
)
from lightning_igpt.benchmarks.peers import transformers
from lightning_igpt.lookup import N_COLORS, build_table
from lightning_igpt.palette import Palette

BATCHES = 8
BYTES_PER_PIXEL = 3 + 2 + 8
CHECKED_COLORS = 20_000  # of the table, against a search over all centres
OURS, NOISE, PEER, SEARCH = "lightning_igpt", "lightning_igpt, random bytes", "transformers", "distances in torch"


def pictures(count: int, size: int, seed: int) -> Tensor:
    """uint8 (count, 3, size, size): smooth colours and grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 3, 3, generator=generator) * 255
    smooth = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
    grain = torch.randn(smooth.shape, generator=generator) * 8
    return (smooth + grain).round().clamp(0, 255).to(torch.uint8)


def noise(count: int, size: int, seed: int) -> Tensor:
    """uint8 (count, 3, size, size): every byte drawn for itself."""
    shape = (count, 3, size, size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def processor_tokens(palette: Palette, images: Tensor) -> Callable[[], Tensor]:
    """The processor of ``transformers`` on images (B, 3, S, S), which need no resizing."""
    processor = transformers.ImageGPTImageProcessorPil(clusters=palette.to_list(), do_resize=False)
    arrays = list(images.permute(0, 2, 3, 1).contiguous().cpu().numpy())

    def run() -> Tensor:
        tokens: Tensor = processor(images=arrays, return_tensors="pt", input_data_format="channels_last")["input_ids"]
        return tokens.flatten(1)

    return run


def search_tokens(palette: Palette, images: Tensor) -> Callable[[], Tensor]:
    """The distances of all pixels to all colours, and the least of each."""
    colors = palette.colors.to(images.device)  # (K, 3)
    squares = colors.square().sum(1)

    def run() -> Tensor:
        pixels = images.permute(0, 2, 3, 1).reshape(-1, 3) / 127.5 - 1
        # |pixel|^2 is the same for all colours.
        return torch.addmm(squares, pixels, colors.T, alpha=-2).argmin(1).view(len(images), -1)

    return run


def each_turn_another(run: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Callable[[], Tensor]:
    """``run`` on one batch after the other, round and round."""
    endless = itertools.cycle(batches)
    return lambda: run(next(endless))


def for_all(turns: Turns, images: int, wanted: int) -> Turns:
    """The times that ``wanted`` images would take."""
    return Turns(tuple(seconds * wanted / images for seconds in turns.seconds))


def check_agreement(palette: Palette, images: Tensor, processor: Tensor, search: Tensor) -> float:
    """Insist on the processor's ids; the share of ids that the search in float32 gives, too."""
    ours = palette.quantize(images)
    same = float((ours.cpu() == processor).float().mean())
    require(same == 1, f"{same:.4%} of the ids are those of transformers")
    found = float((ours == search).float().mean())
    require(found >= 0.999, f"{found:.4%} of the ids are those of a search over all distances")
    return found


def check_table(palette: Palette, table: np.ndarray[Any, np.dtype[np.int16]]) -> None:
    """Insist on the rule of ``Palette.quantize`` for colours drawn at random."""
    codes = np.random.default_rng(0).integers(N_COLORS, size=CHECKED_COLORS)
    values = np.stack([codes >> 16, codes >> 8 & 255, codes & 255]) / 127.5 - 1  # (3, N)
    squares = np.square(values[:, :, None] - palette.colors.double().numpy().T[:, None])  # (3, N, K)
    nearest = (squares[0] + squares[1] + squares[2]).argmin(1)
    require(bool((table[codes] == nearest).all()), "the table holds an id that is not the nearest")


def table_turns(palette: Palette, repeats: int) -> Turns:
    """Seconds to build the table of a palette from nothing."""
    colors = palette.colors.numpy()
    built = []
    turns = in_turns({"table": lambda: built.append(build_table(colors))}, repeats=repeats, warm_up=0)["table"]
    check_table(palette, built[0])
    return turns


def measure(options: Any) -> tuple[dict[str, Turns], float]:
    """Turns of every side for a whole batch, and the share of ids that the search in float32 gives, too."""
    palette, batch, few = Palette.load("openai"), options.batch_size, min(options.peer_images, options.batch_size)
    batches = [pictures(batch, options.size, seed).to(options.device) for seed in range(BATCHES)]
    drawn = [noise(batch, options.size, seed).to(options.device) for seed in range(BATCHES)]
    images = batches[0][:few]
    sides = {
        OURS: each_turn_another(palette.quantize, batches),
        NOISE: each_turn_another(palette.quantize, drawn),
        PEER: processor_tokens(palette, images),
        SEARCH: search_tokens(palette, images),
    }
    found = check_agreement(palette, images, sides[PEER](), sides[SEARCH]())
    turns = in_turns(sides, repeats=options.repeats, device=options.device)
    return turns | {name: for_all(turns[name], few, batch) for name in (PEER, SEARCH)}, found


def main(words: Sequence[str] | None = None) -> None:
    """Read the options, compare, print."""
    parser = options_parser("quantize", __doc__, preset="igpt_s", batch_size=128, repeats=15)
    parser.add_argument("--size", type=positive, default=32, help="side of the pictures (default 32)")
    parser.add_argument("--peer-images", type=positive, default=8, help="pictures for the peers (default 8)")
    parser.add_argument("--table-repeats", type=positive, default=3, help="times to build the table (default 3)")
    options = parser.parse_args(words)
    say_unused(words, "preset", "precision", "compile")
    rows, found = measure(options)
    table = table_turns(Palette.load("openai"), options.table_repeats)
    limit = machine_limits(options.device).bytes_per_second
    pixels = options.batch_size * options.size**2
    title = f"{options.batch_size} pictures of {options.size} x {options.size}"
    work = {name: BYTES_PER_PIXEL * pixels for name in (OURS, NOISE)}
    print_table(title, rows, peer=PEER, work=work, limit=limit)
    speeds = {name: round(pixels / turns.median / 1e6, 3) for name, turns in rows.items()}
    print("\nMpx/s: " + ", ".join(f"{name} {speed:,.3g}" for name, speed in speeds.items()))
    print(f"the table of 2^24 colours from nothing: {table.median:.2f} s")
    print_json(
        "quantize",
        ratio_vs_peer=rows[OURS].ratio_to(rows[PEER]),
        fraction_of_limit=BYTES_PER_PIXEL * pixels / limit / rows[OURS].median,
        ratio_vs_peer_random_bytes=round(rows[NOISE].ratio_to(rows[PEER]), 1),
        bytes_per_pixel=BYTES_PER_PIXEL,
        mpx_per_s=speeds,
        same_ids_as_float32_search=found,
        batch_size=options.batch_size,
        size=options.size,
        sides=as_json(rows | {"table from nothing": table}),
        **conditions(options.device, np, transformers),
    )


if __name__ == "__main__":
    main()
