"""Uses of a trained network as a density of tokens: complete images, inpaint them, score them."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_igpt.decoding import Decoder, Precision
from lightning_igpt.model import ImageGPT
from lightning_igpt.objectives import pixel_nats
from lightning_igpt.palette import Palette

Draw: TypeAlias = Callable[[Tensor], Tensor]  # logits (B, K) to colors (B,)
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
        prompt: int64 (B, P), the first P < T pixels; P = 0 draws whole images.
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
        raise ValueError(f"the prompt has {given} pixels and the image only {total}: nothing is left to draw")
    _check_options(temperature, top_k, top_p, n_samples=n_samples)
    tokens = F.pad(prompt.to(device), (0, total - given)).repeat_interleave(n_samples, 0)  # (B * n_samples, T)
    known = (torch.arange(total, device=device) < given).expand_as(tokens)
    pick = partial(draw, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    with _evaluating(network):
        tokens = _decode(network, tokens, known, pick, precision, on_progress)
    return tokens.view(len(prompt), n_samples, total)


@contextmanager
def _evaluating(network: ImageGPT) -> Iterator[None]:
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
    logits = decoder.start(tokens[:, : holes[0]])  # (B, K)
    finite = torch.ones((), dtype=torch.bool, device=tokens.device)
    for position in range(holes[0], holes[-1] + 1):
        finite &= logits.isfinite().all()  # read at the end, since reading synchronizes the device
        tokens[:, position] = torch.where(known[:, position], tokens[:, position], pick(logits))
        if report is not None and (position == holes[-1] or (position + 1) % network.config.image_size == 0):
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
    if generator is None or isinstance(generator, torch.Generator):
        race = torch.empty_like(logits).exponential_(generator=generator)
    else:
        parts = torch.split(
            torch.empty_like(logits), len(logits) // len(generator)
        )  # of a BERT network T rows per image
        race = torch.cat([part.exponential_(generator=own) for part, own in zip(parts, generator, strict=True)])
    return (F.softmax(logits, -1) / race).argmax(-1)


@torch.no_grad()
def inpaint(
    network: ImageGPT,
    tokens: Tensor,
    known: Tensor,
    *,
    steps: int = 8,
    temperature: float = 1.0,
    precision: Precision | None = None,
    generator: Randomness = None,
    on_progress: Progress | None = None,
) -> Tensor:
    """Fill the unknown pixels of each image, wherever they are.

    A BERT network sees all known pixels. In each step all unknown pixels are drawn in parallel and the most probable
    draws are kept, so that the unknown share falls as a cosine (MaskGIT, Chang et al., CVPR 2022).

    An autoregressive network visits the pixels in raster order: it keeps known pixels and draws each unknown pixel
    given all pixels before it, ``p(x_t | x_<t)``. Known pixels after a hole do not influence it, so this is not a draw
    from the true conditional, and seams at the lower and right edges of a hole are to be expected. With only the first
    pixels known, the result is that of ``complete``.

    Args:
        network: Of either objective.
        tokens: int64 (B, T); values at unknown pixels are ignored.
        known: Bool (B, T), true where the pixel is given; masks may differ between images.
        steps: Passes of a BERT network over the image; ignored by an autoregressive network.
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
    if tokens.shape != known.shape or tokens.ndim != 2:
        raise ValueError(f"tokens {tuple(tokens.shape)} and known {tuple(known.shape)} must both be (B, T)")
    network.check_length(tokens.shape[1])
    _check_options(temperature, steps=steps)
    device = network.wte.weight.device
    known = known.to(device=device, dtype=torch.bool)
    tokens = tokens.to(device).masked_fill(~known, 0)
    check_tokens(tokens, network.config.vocab_size)
    pick = partial(draw, temperature=temperature, generator=generator)
    with _evaluating(network):
        if network.config.objective == "bert":
            return _fill(network, tokens, known, pick, steps, on_progress)
        return _decode(network, tokens, known, pick, precision, on_progress)


def _fill(network: ImageGPT, tokens: Tensor, known: Tensor, pick: Draw, steps: int, report: Progress | None) -> Tensor:
    holes, finite = (~known).sum(1), torch.ones((), dtype=torch.bool, device=tokens.device)
    for step in range(1, steps + 1):
        logits = network(tokens, masked=~known)  # (B, T, K)
        finite &= logits.isfinite().all()
        drawn = pick(logits.flatten(0, 1)).view_as(tokens)
        sure = F.log_softmax(logits.float(), -1).gather(-1, drawn[..., None])[..., 0]  # (B, T)
        left = (holes * math.cos(math.pi / 2 * step / steps)).floor().long() if step < steps else holes * 0
        order = sure.masked_fill(known, math.inf).argsort(-1, descending=True).argsort(-1)  # rank, known pixels first
        keep = order < (tokens.shape[1] - left)[:, None]
        tokens = torch.where(keep & ~known, drawn, tokens)
        known = known | keep
        if report is not None:
            report(tokens, known)
    _check_finite(finite, "full")
    return tokens


def _check_finite(finite: Tensor, precision: str) -> None:
    if not finite:
        raise ValueError(f"logits are not all finite with precision {precision!r}; check the weights, or use 'full'")


@torch.no_grad()
def score(network: ImageGPT, tokens: Tensor, *, batch_size: int = 64) -> Tensor:
    """Negative log-likelihood of each pixel given the pixels before it, under an autoregressive network.

    Args:
        network: An autoregressive network.
        tokens: int64 (N, T).
        batch_size: Images per forward pass.

    Returns:
        Float32 (N, T) in nats on the network's device; the mean over T is an image's nats per pixel.

    Raises:
        ValueError: The network is a BERT network, or the tokens are not images of its size and palette.
    """
    check_has_likelihood(network)
    check_tokens(tokens, network.config.vocab_size)
    device = network.wte.weight.device
    with _evaluating(network):
        parts = [pixel_nats(network(part), part) for part in torch.split(tokens.to(device), batch_size)]
    return torch.cat(parts).float()


def check_has_likelihood(network: ImageGPT) -> None:
    """Raise ValueError for a BERT network, which ``score`` cannot use."""
    if network.config.objective != "autoregressive":
        raise ValueError("score() needs an autoregressive network; a BERT network has no likelihood of a whole image")


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
    """The prompt, completions of it and the truth of whole images int64 (B, T): uint8 (B, 2 + n_samples, 3, S, S).

    ``keep_rows`` rows of pixels are given, from 0 to S - 1, by default half of them, or all but a ``hole``, bool (T,).
    Options are those of ``complete`` or, for a hole and for a BERT network, of ``inpaint``.
    """
    side, total = network.config.image_size, network.config.n_positions
    rows = side // 2 if keep_rows is None else keep_rows
    if not 0 <= rows < side or n_samples < 1:
        limits = f"an image of {side} rows can keep 0 to {side - 1}, and has at least 1 sample"
        raise ValueError(f"keep_rows is {rows} and n_samples {n_samples}; {limits}")
    options.setdefault("generator", torch.Generator(tokens.device).manual_seed(seed))
    hidden = torch.arange(total, device=tokens.device) >= rows * side if hole is None else hole
    if hole is None and network.config.objective == "autoregressive":
        samples = complete(network, tokens[:, : rows * side], n_samples=n_samples, **options)
    else:
        if (options.pop("top_k", None), options.pop("top_p", None)) != (None, None):
            raise ValueError("top_k and top_p are for rows below a line in an autoregressive network; leave them out")
        repeated = tokens.repeat_interleave(n_samples, 0)
        samples = inpaint(network, repeated, (~hidden).expand_as(repeated), **options)
    samples = palette.dequantize(samples.reshape(-1, total)).view(len(tokens), n_samples, 3, side, side)
    truth = palette.dequantize(tokens)[:, None]  # (B, 1, 3, S, S)
    color = torch.tensor(HIDDEN, dtype=torch.uint8, device=truth.device)[:, None, None]
    return torch.cat([torch.where(hidden.view(side, side), color, truth), samples, truth], 1)


def captions(n_samples: int) -> list[str]:
    """Headings of the columns that ``completion_rows`` makes."""
    return ["given", *(f"sample {i}" for i in range(1, n_samples + 1)), "truth"]
