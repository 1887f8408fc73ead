"""Uses of a trained network as a density of tokens: complete images, inpaint them, score them."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_igpt.decoding import Decoder, Precision
from lightning_igpt.model import ImageGPT
from lightning_igpt.objectives import bound_estimates, per_pixel, pixel_nats
from lightning_igpt.palette import Palette

Draw: TypeAlias = Callable[[Tensor], Tensor]  # logits (B, K) to colors (B,)
Order: TypeAlias = Literal["surest", "random"]
Randomness: TypeAlias = torch.Generator | Sequence[torch.Generator] | None  # for all images, or one for each
Progress: TypeAlias = Callable[[Tensor, Tensor], None]  # tokens int64 (B, T), and which are decided, bool (B, T)
HIDDEN = (88, 118, 166)  # hidden pixels: a blue, since gray could be part of the picture
COLD = 1e-6  # lower temperatures take the likeliest color, for logits divided by them may overflow


@torch.no_grad()
def complete(
    network: ImageGPT,
    prompt: Tensor,
    *,
    n_samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    precision: Precision | None = None,
    generator: Randomness = None,
    on_progress: Progress | None = None,
) -> Tensor:
    """Draw the remaining pixels of each image in raster order, with cached keys and values.

    Args:
        network: An autoregressive network.
        prompt: int64 (B, P), the first P < T tokens; P = 0 draws whole images.
        n_samples: Completions of each prompt.
        temperature: Divides the logits; 1 keeps the model's distribution, 0 takes the likeliest color.
        top_k: Draw only among the k likeliest colors.
        top_p: Draw only among the likeliest colors whose total probability reaches this.
        precision: Of a step, see :class:`lightning_igpt.decoding.Decoder`: ``full``, ``half`` or ``int8``. The prompt
            is always processed in the network's own. docs/how-to/sampling.md states the cost of each in nats and time.
            Default: half under autocast, else full.
        generator: Source of randomness, on the network's device. Equal seeds give equal images. A list has one for each
            of the B * n_samples images, whose draws then do not depend on what else is in the batch.
        on_progress: Called after each row of pixels with the tokens, int64 (B * n_samples, T), and which of them are
            decided, bool of that shape; read-only, and the tokens change afterwards. An exception ends the drawing.

    Returns:
        int64 (B, n_samples, T); the first P tokens are the prompt.

    Raises:
        ValueError: The prompt is as long as the image or has an unknown color, an option is out of range, or logits are
            not finite.
    """
    if network.config.objective != "autoregressive":
        raise ValueError("complete() needs an autoregressive network; use inpaint() with a BERT network")
    check_tokens(prompt, network.config.vocab_size)
    device, given, total = network.wte.weight.device, prompt.shape[1], network.config.n_positions
    if given >= total:
        sizes = [count // network.config.tokens_per_pixel for count in (given, total)]
        raise ValueError(f"the prompt has {sizes[0]} pixels and the image only {sizes[1]}: nothing is left to draw")
    _check_options(temperature, top_k, top_p, n_samples=n_samples)
    tokens = F.pad(prompt.to(device), (0, total - given)).repeat_interleave(n_samples, 0)  # (B * n_samples, T)
    known = (torch.arange(total, device=device) < given).expand_as(tokens)
    pick = partial(draw, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    with evaluating(network):
        tokens = _decode(network, tokens, known, pick, precision, on_progress)
    return tokens.view(len(prompt), n_samples, total)


@contextmanager
def evaluating(network: ImageGPT) -> Iterator[None]:
    """Evaluation mode; afterwards every module is restored to its own mode."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _decode(
    network: ImageGPT, tokens: Tensor, known: Tensor, pick: Draw, precision: Precision | None, report: Progress | None
) -> Tensor:
    """Draw the unknown pixels in raster order: one pass up to the first, then one step per pixel up to the last."""
    holes = (~known).any(0).nonzero().flatten().tolist()  # positions unknown in some row
    if not holes:
        return tokens
    decoder, tokens = Decoder(network, len(tokens), precision), tokens.clone()
    row = network.config.n_positions // network.config.image_size  # of pixels, in tokens
    logits = decoder.start(tokens[:, : holes[0]])  # (B, K)
    finite = torch.ones((), dtype=torch.bool, device=tokens.device)
    for position in range(holes[0], holes[-1] + 1):
        finite &= logits.isfinite().all()  # read at the end, since reading synchronizes the device
        tokens[:, position] = torch.where(known[:, position], tokens[:, position], pick(logits))
        if report is not None and (position == holes[-1] or (position + 1) % row == 0):
            report(tokens, known | (torch.arange(tokens.shape[1], device=tokens.device) <= position))
        if position < holes[-1]:
            logits = decoder.step(tokens[:, position : position + 1])
    _check_finite(finite, decoder.precision)
    return tokens


def draw(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Randomness = None,
) -> Tensor:
    """One color per row of logits (B, K): int64 (B,)."""
    if temperature < COLD:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p is not None and top_p < 1:
        ordered, index = logits.sort(-1, descending=True)
        probability = F.softmax(ordered, -1)
        before = probability.cumsum(-1) - probability  # mass of likelier colors; the likeliest, with 0, always stays
        drop = torch.zeros_like(index, dtype=torch.bool).scatter(-1, index, before >= top_p)
        logits = logits.masked_fill(drop, -math.inf)
    # An exponential race picks index i with probability p_i and does not synchronize the device.
    race = _filled(torch.empty_like(logits), Tensor.exponential_, generator)
    return (F.softmax(logits, -1) / race).argmax(-1)


def _filled(values: Tensor, fill: Callable[..., Tensor], generator: Randomness) -> Tensor:
    owners = generator if isinstance(generator, Sequence) else [generator]
    for part, own in zip(torch.split(values, len(values) // len(owners)), owners, strict=True):  # equal parts, in place
        fill(part, generator=own)
    return values


@torch.no_grad()
def inpaint(
    network: ImageGPT,
    tokens: Tensor,
    known: Tensor,
    *,
    steps: int = 8,
    order: Order = "surest",
    temperature: float = 1.0,
    precision: Precision | None = None,
    generator: Randomness = None,
    on_progress: Progress | None = None,
) -> Tensor:
    """Fill the unknown pixels of each image, wherever they are.

    A BERT network sees all known pixels. In each step all unknown pixels are drawn in parallel and some draws are kept:
    with ``order="surest"`` the most probable ones, so that the unknown share falls as a cosine (MaskGIT, Chang et al.,
    CVPR 2022); with ``"random"`` equally many in each step, wherever they are. In random order with one pixel per step
    (``steps=T``) and nothing known, a picture comes from the distribution whose likelihood ``score`` bounds.

    An autoregressive network visits the pixels in raster order: it keeps known pixels and draws each unknown pixel
    given all pixels before it, ``p(x_t | x_<t)``. Known pixels after a hole do not influence it, so this is not a draw
    from the true conditional, and seams at the lower and right edges of a hole are to be expected. With only the first
    pixels known, the result is that of ``complete``.

    Args:
        network: Of either objective.
        tokens: int64 (B, T); values at unknown pixels are ignored.
        known: Bool (B, pixels), true where the pixel is given; masks may differ between images.
        steps: Passes of a BERT network over the image; ignored by an autoregressive network, as is ``order``. In random
            order at most one for each unknown pixel.
        order: Which draws of a BERT network are kept first: ``surest`` or ``random``.
        temperature: Divides the logits; 0 takes the likeliest color.
        precision: As in ``complete``; ignored by a BERT network.
        generator: As in ``complete``.
        on_progress: As in ``complete``, with tokens (B, T); after each step of a BERT network.

    Returns:
        int64 (B, T) on the network's device; known pixels unchanged.

    Raises:
        ValueError: Shapes differ or are not the network's, a known token is not in the palette, or an option is out of
            range.
    """
    each = network.config.tokens_per_pixel
    if tokens.ndim != 2 or known.shape != (len(tokens), tokens.shape[1] // each):
        shapes = f"(B, T) and (B, T{f' / {each}' * (each > 1)})"
        raise ValueError(f"tokens {tuple(tokens.shape)} and known {tuple(known.shape)} must be {shapes}")
    network.check_length(tokens.shape[1])
    _check_options(temperature, steps=steps)
    if order not in ("surest", "random"):
        raise ValueError(f"order is {order!r}; it must be surest or random")
    device = network.wte.weight.device
    known = known.to(device=device, dtype=torch.bool).repeat_interleave(each, 1)
    tokens = tokens.to(device).masked_fill(~known, 0)
    check_tokens(tokens, network.config.vocab_size)
    pick = partial(draw, temperature=temperature, generator=generator)
    with evaluating(network):
        if network.config.objective == "bert":
            lots = _filled(per_pixel(known.float(), each), Tensor.uniform_, generator) if order == "random" else None
            return _fill(network, tokens, known, pick, steps, on_progress, lots)
        return _decode(network, tokens, known, pick, precision, on_progress)


def _fill(
    network: ImageGPT, tokens: Tensor, known: Tensor, pick: Draw, steps: int, tell: Progress | None, lots: Tensor | None
) -> Tensor:
    each = network.config.tokens_per_pixel  # which are kept together, as they are hidden together in training
    holes = (~known).sum(1) // each
    finite = torch.ones((), dtype=torch.bool, device=tokens.device)
    if lots is not None:
        steps = min(steps, max(1, int(holes.max())))
    for step in range(1, steps + 1):
        logits = network(tokens, masked=~known)  # (B, T, K)
        finite &= logits.isfinite().all()
        drawn = pick(logits.flatten(0, 1)).view_as(tokens)
        sure = F.log_softmax(logits.float(), -1).gather(-1, drawn[..., None])[..., 0]  # (B, T)
        left = (holes * math.cos(math.pi / 2 * step / steps)).floor().long() if step < steps else holes * 0
        sure = per_pixel(sure.masked_fill(known, math.inf), each)
        if lots is not None:
            sure, left = lots.masked_fill(known[:, ::each], math.inf), holes * (steps - step) // steps
        order = sure.argsort(-1, descending=True).argsort(-1)  # rank of each pixel, known pixels first
        keep = (order < (order.shape[1] - left)[:, None]).repeat_interleave(each, 1)
        tokens = torch.where(keep & ~known, drawn, tokens)
        known = known | keep
        if tell is not None:
            tell(tokens, known)
    _check_finite(finite, "full")
    return tokens


def _check_finite(finite: Tensor, precision: str) -> None:
    if not finite:
        raise ValueError(f"logits are not all finite with precision {precision!r}; check the weights, or use 'full'")


@torch.no_grad()
def score(
    network: ImageGPT,
    tokens: Tensor,
    *,
    batch_size: int = 64,
    n_draws: int = 32,
    antithetic: bool = True,
    seed: int = 0,
) -> Tensor:
    """Nats of images whose mean over dimension 1 is an image's nats per pixel: exact, or of a BERT network a bound.

    A BERT network gives an upper bound by random masks (:func:`lightning_igpt.objectives.hidden_nats`). It holds for
    any BERT network, and is loose for those trained with another ``mask_ratio`` than ``uniform``.

    Args:
        network: Of either objective.
        tokens: int64 (N, T).
        batch_size: Images per forward pass.
        n_draws: Masks of each image, each a pass of a BERT network; ignored by an autoregressive network.
        antithetic: Draw the masks in pairs that hide k and T + 1 - k pixels, which varies less.
        seed: Of the masks, which depend on it and the image's place in ``tokens`` alone, not on ``batch_size``.

    Returns:
        Float32 on the network's device, in nats. Of an autoregressive network (N, T), each token given those before it;
        ``objectives.per_pixel`` adds those of a pixel, where it has several. Of a BERT network (N, D), independent
        estimates of the bound in nats per pixel: D is ``n_draws``, or half of it for pairs; their standard deviation
        divided by the root of D is the mean's standard error.

    Raises:
        ValueError: The tokens are not images of the network's size and palette, or n_draws is below 1 or odd.
    """
    check_tokens(tokens, network.config.vocab_size)
    if n_draws < 1 or (n_draws % 2 and antithetic):
        raise ValueError(f"n_draws is {n_draws}; it must be at least 1, and even for antithetic pairs")
    device, masked = network.wte.weight.device, network.config.objective == "bert"
    numbers = torch.split(torch.arange(len(tokens), device=device), batch_size)
    bound = partial(bound_estimates, network, n_draws=n_draws, antithetic=antithetic, seed=seed)
    with evaluating(network):
        parts = [
            bound(part, samples) if masked else pixel_nats(network(part), part)
            for part, samples in zip(torch.split(tokens.to(device), batch_size), numbers, strict=True)
        ]
    return torch.cat(parts).float()


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless ``tokens`` is int64 (B, T) with values in 0 .. vocab_size - 1."""
    if tokens.ndim != 2 or tokens.dtype != torch.long:
        raise ValueError(f"tokens must be int64 (B, T); got {tokens.dtype} {tuple(tokens.shape)}")
    low, high = map(int, tokens.aminmax()) if tokens.numel() else (0, 0)
    if low < 0 or high >= vocab_size:
        raise ValueError(f"tokens run from {low} to {high}; this network has {vocab_size} colors: 0..{vocab_size - 1}")


def _check_options(temperature: float, top_k: int | None = None, top_p: float | None = None, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not temperature >= 0:  # catches NaN too
        raise ValueError(f"temperature is {temperature}; it must be at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1, or None for all colors")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1, or None for all colors")


def completion_rows(
    network: ImageGPT,
    palette: Palette,
    tokens: Tensor,
    *,
    n_samples: int = 3,
    keep_rows: int | None = None,
    hole: Tensor | None = None,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """The prompt, completions of it and the ground truth of images int64 (B, T): uint8 (B, 2 + n_samples, 3, S, S).

    ``keep_rows`` rows of pixels are given, from 0 to S - 1, by default half of them, or all but a ``hole`` of pixels,
    bool (S * S,). Options are those of ``complete`` or, for a hole and for a BERT network, of ``inpaint``.
    """
    side, total = network.config.image_size, network.config.n_positions
    each = network.config.tokens_per_pixel
    rows = side // 2 if keep_rows is None else keep_rows
    if not 0 <= rows < side or n_samples < 1:
        limits = f"an image of {side} rows can keep 0 to {side - 1}, and has at least 1 sample"
        raise ValueError(f"keep_rows is {rows} and n_samples {n_samples}; {limits}")
    options.setdefault("generator", torch.Generator(tokens.device).manual_seed(seed))
    hidden = torch.arange(side * side, device=tokens.device) >= rows * side if hole is None else hole
    if hole is None and network.config.objective == "autoregressive":
        samples = complete(network, tokens[:, : rows * side * each], n_samples=n_samples, **options)
    else:
        if (options.pop("top_k", None), options.pop("top_p", None)) != (None, None):
            raise ValueError("top_k and top_p are for rows below a line in an autoregressive network; leave them out")
        repeated = tokens.repeat_interleave(n_samples, 0)
        samples = inpaint(network, repeated, (~hidden).expand(len(repeated), -1), **options)
    samples = palette.dequantize(samples.reshape(-1, total)).view(len(tokens), n_samples, 3, side, side)
    truth = palette.dequantize(tokens)[:, None]  # (B, 1, 3, S, S)
    color = torch.tensor(HIDDEN, dtype=torch.uint8, device=truth.device)[:, None, None]
    return torch.cat([torch.where(hidden.view(side, side), color, truth), samples, truth], 1)


def captions(n_samples: int) -> list[str]:
    """Headings of the columns that ``completion_rows`` makes."""
    return ["given", *(f"sample {i}" for i in range(1, n_samples + 1)), "truth"]
