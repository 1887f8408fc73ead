"""The two losses of the paper (section 2.1), in nats per token, and counter-based random masks.

A pixel is one palette token, or three of the palette ``rgb``. Nats per pixel divided by ln 2 are bits per pixel; where
a token is a byte (``Palette.is_exact``), nats per token divided by ln 2 are bits per dimension.
"""

import math
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_igpt.model import ImageGPT

MaskRatio: TypeAlias = float | Literal["uniform"]
MASK_RATIO = 0.15  # paper, section 3.4: 15 %; 25 % and more were worse


def nats_to_bits(nats: Tensor | float) -> Tensor | float:
    """Nats to bits."""
    return nats / math.log(2)


def per_pixel(nats: Tensor, tokens_per_pixel: int) -> Tensor:
    """The nats of whole pixels (B, T / tokens_per_pixel) from those of their tokens (B, T)."""
    return nats.reshape(len(nats), -1, tokens_per_pixel).sum(2)


def pixel_nats(logits: Tensor, tokens: Tensor) -> Tensor:
    """Nats of every token, float32 or wider (B, T), from logits (B, T, K) and int64 tokens (B, T)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")


def next_pixel_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean nats over all B * T tokens of logits (B, T, K), of which index t predicts token t of int64 tokens (B, T)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def masked_pixel_loss(logits: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
    """Mean nats over the tokens hidden by bool ``masked`` (B, T), per image, then over images that have some."""
    return hidden_nats(logits, tokens, masked).sum() / masked.any(1).sum().clamp(min=1)


def hidden_nats(logits: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
    """Mean nats over the tokens of each image that bool ``masked`` (B, T) hides, (B,); 0 where it hides none.

    Under masks of ``ratio="uniform"`` the expectation is the average, over all orders of the pixels, of the image's
    nats per pixel when its pixels are predicted one by one in that order. By Jensen's inequality that is an upper bound
    of its negative log-likelihood under the mixture of all orders, from which ``inpaint`` draws in random order.
    """
    return (pixel_nats(logits, tokens) * masked).sum(1) / masked.sum(1).clamp(min=1)


def draw_mask(
    samples: Tensor, n_positions: int, *, seed: int, ratio: MaskRatio = MASK_RATIO, tokens_per_pixel: int = 1
) -> Tensor:
    """Independent masks, bool (B, n_positions), in which a pixel, with all its tokens, is hidden at rate ``ratio``.

    ``"uniform"`` hides k pixels, k drawn uniformly from 1 to all of them. A function of the seed and the numbers
    ``samples``, int64 (B,), alone, so a resumed run repeats it on any device.
    """
    if ratio == "uniform":
        return antithetic_masks(samples, n_positions, seed=seed, tokens_per_pixel=tokens_per_pixel)[0]
    hidden = counter_uniform(samples, n_positions // tokens_per_pixel, seed=seed) <= ratio
    return hidden.repeat_interleave(tokens_per_pixel, 1)


def antithetic_masks(samples: Tensor, n_positions: int, *, seed: int, tokens_per_pixel: int = 1) -> Tensor:
    """Two masks of each sample, bool (2, B, n_positions), each like one of ``draw_mask`` with ``ratio="uniform"``.

    The first hides k of n pixels, the first k of a random order; the second its last n + 1 - k. So a loss that rises or
    falls with k varies less in the mean of both than in that of two independent draws.
    """
    n = n_positions // tokens_per_pixel
    drawn = counter_uniform(samples, n + 1, seed=seed)
    k = 1 + (drawn[:, n:] * n).long()  # (B, 1), 1 .. n, for float32 rounds no product with a number below 1 up to n
    rank = drawn[:, :n].argsort(dim=1, stable=True).argsort(1)  # (B, n)
    return torch.stack([rank < k, rank >= k - 1]).repeat_interleave(tokens_per_pixel, 2)


def bound_estimates(
    network: ImageGPT, tokens: Tensor, samples: Tensor, *, n_draws: int, antithetic: bool, seed: int
) -> Tensor:
    """Independent estimates of the bound of ``hidden_nats`` in nats per pixel (B, D), each by one mask or a pair."""
    total, estimates = network.config.n_positions, []
    each = total // network.config.image_size**2  # tokens of a pixel
    for number in range(n_draws // 2 if antithetic else n_draws):
        masks = antithetic_masks(samples, total, seed=seed + 1_000_003 * number, tokens_per_pixel=each)
        used = masks if antithetic else masks[:1]
        nats = [hidden_nats(network(tokens, masked=masked), tokens, masked) for masked in used]
        estimates.append(torch.stack(nats).mean(0) * each)
    return torch.stack(estimates, 1)


def majority_vote(votes: Tensor, samples: Tensor, num_classes: int, *, seed: int) -> Tensor:
    """The class with most of int64 ``votes`` (M, B), int64 (B,); seed and sample number decide ties (section 4.6)."""
    counts = F.one_hot(votes, num_classes).sum(0)  # (B, C)
    return (counts + counter_uniform(samples, num_classes, seed=seed).double()).argmax(-1)  # below 1


def counter_uniform(counters: Tensor, n: int, *, seed: int) -> Tensor:
    """Uniform numbers in [0, 1) without a generator: float32 (B, n) from int64 counters (B,).

    The mixing function is SplitMix64's finalizer (Steele, Lea and Flood, OOPSLA 2014), applied twice.
    """
    golden = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed number
    stream = _mix(counters.to(torch.int64) * golden + seed)  # (B,)
    columns = torch.arange(1, n + 1, device=counters.device) * golden  # (n,)
    bits = _mix(stream[:, None] + columns[None])  # (B, n)
    return _shift_right(bits, 40).to(torch.float32) / 2**24


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Logical shift; that of torch keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
