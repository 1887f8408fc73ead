"""The network of Image GPT, read downward: norm, attention, MLP, block, cache, network.

Follows ``src/model.py`` of github.com/openai/image-gpt and section 2 of Chen et al., "Generative Pretraining from
Pixels" (ICML 2020). It sees tokens only. Parameter names are GPT-2's.

Shapes: B batch, T tokens, D width (n_embd), H heads, d head width, K colors (vocab_size), L blocks (n_layer).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.private import attention_kernels

NORM_EPS = 1e-5  # inside the root, as published
GELU_SLOPE = 1.702

Recomputing = Literal["none", "selective", "full"]
ATTENTION_KERNELS = attention_kernels()


class Normed(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * gain; saves only x for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor) -> Tensor:
        ctx.save_for_backward(x, gain)
        return (x * _row_scale(x)).mul_(gain)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, gain = ctx.saved_tensors
        scale, product = _row_scale(x), grad * x
        with torch.autocast(x.device.type, enabled=False):
            inner = (product @ gain)[..., None]  # a row's sum in one pass
        grad_x = (grad * gain).mul_(scale).addcmul_(x, inner * scale**3, value=-1 / x.shape[-1])
        return grad_x, (product * scale).flatten(0, -2).sum(0)


def _row_scale(x: Tensor) -> Tensor:  # (..., 1)
    squares: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
    return (squares / x.shape[-1] + NORM_EPS).rsqrt()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * gain: no centering, no bias."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        # Where torch has no fused kernel, its norm and the gradient are some thirty passes over memory.
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        eager = torch.is_grad_enabled() and not traced
        if eager and x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32:
            apply: Any = Normed.apply  # typed in torch from 2.14 on
            return apply(x, self.weight)  # type: ignore[no-any-return]
        # Sharded in bf16-mixed, the gain is bfloat16 and x float32; the fused kernel needs one dtype.
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), NORM_EPS)


class Attention(nn.Module):
    """Dense multi-head attention with q, k and v from one packed projection."""

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, causal: bool, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        B, T, D = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, D // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # 3 x (B, H, T, d)
        p, seen = self.dropout if self.training else 0.0, None
        if cache is not None:
            cached = cache.append(layer, k, v)
            if T == 1:  # later queries attend to the cache, in its dtype; a prompt attends to itself
                (k, v, seen), q, causal = cached, q.to(cached[0].dtype), False  # k, v (B, H, seen + 1, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=p, is_causal=causal)
        y = y.transpose(1, 2).reshape(B, T, D).to(qkv.dtype)
        return F.dropout(self.c_proj(y), p, self.training)


class QuickGELU(torch.autograd.Function):
    """x sigmoid(1.702 x), the sigmoid approximation of GELU; saves only x for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x * GELU_SLOPE, inplace=True).mul_(1 / GELU_SLOPE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, which the fused kernel lacks
            share = torch.sigmoid(x * GELU_SLOPE)
            return grad * share * (1 + x * GELU_SLOPE * (1 - share))  # type: ignore[no-any-return]
        # The slope cancels, d/dx silu(a x) / a = silu'(a x), which saves one pass over the tensor.
        return torch.ops.aten.silu_backward(grad, x * GELU_SLOPE)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """D -> 4 D -> D."""

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, config.mlp_width, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        apply: Any = QuickGELU.apply  # typed in torch from 2.14 on
        hidden = apply(self.c_fc(x))  # (B, T, 4 D)
        return F.dropout(self.c_proj(hidden), self.dropout, self.training)


def _uncached_autocast(device_type: str) -> Any:
    """The current autocast without its cache of cast weights, which would hold those of all blocks.

    A hit would also make the recomputed operations differ from the first ones, which torch reports as an error.
    """
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return nullcontext()
    return torch.autocast(device_type, torch.get_autocast_dtype(device_type), cache_enabled=False)


class Block(nn.Module):
    """Pre-norm residual block: attention, then MLP.

    Attributes:
        recompute: What the forward pass saves for the backward pass, which computes the rest again, to the bit.
            ``none``: all. ``selective``: the input and the output of attention's kernel; with dropout, or where
            attention is no single kernel, as ``full``. ``full``: the input alone. Not part of config or checkpoints.
    """

    recompute: Recomputing = "none"

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = RMSNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, causal: bool, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        if self.recompute == "none" or cache is not None or not (self.training and torch.is_grad_enabled()):
            return self._computed(x, causal, cache, layer)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": self.attn.dropout > 0}
        # A kernel that is not run again would not draw its random numbers, and later dropout would draw others.
        if self.recompute == "selective" and not self.attn.dropout:
            options["context_fn"] = partial(create_selective_checkpoint_contexts, ATTENTION_KERNELS)
        with _uncached_autocast(x.device.type):
            y: Tensor = checkpoint(self._computed, x, causal, **options)
            return y

    def _computed(self, x: Tensor, causal: bool, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal, cache, layer)
        x = x + self.mlp(self.ln_2(x))
        return x


class KVCache:
    """Keys and values of the positions already seen, preallocated for a whole image.

    Position 0 is ``sos``; pixel t is fed at position t + 1. ``position`` is a tensor on the device for captured steps;
    ``length`` is the same number on the host, which needs no synchronization.

    Args:
        config: The network's shape.
        batch_size: Sequences decoded together.
        device: Device of keys and values.
        dtype: Their dtype.
    """

    def __init__(
        self,
        config: ImageGPTConfig,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        head_width = config.n_embd // config.n_head
        shape = (config.n_layer, batch_size, config.n_head, config.n_positions, head_width)  # (L, B, H, T, d)
        self.k: Tensor = torch.zeros(shape, device=device, dtype=dtype)
        self.v: Tensor = torch.zeros(shape, device=device, dtype=dtype)
        self.position: Tensor = torch.zeros((), device=device, dtype=torch.long)
        self.length: int = 0
        self.window: int | None = None  # number of positions that a captured step reads

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store new keys and values (B, H, T, d) of one layer.

        Returns:
            Keys and values of all positions so far, (B, H, seen + T, d); with a window (B, H, window, d) and, third, a
            mask of the valid ones, bool (1, window).
        """
        if self.window is not None:
            index = self.position[None]
            self.k[layer].index_copy_(2, index, k.to(self.k.dtype))
            self.v[layer].index_copy_(2, index, v.to(self.v.dtype))
            seen = torch.arange(self.window, device=k.device)[None] <= self.position
            return self.k[layer, :, :, : self.window], self.v[layer, :, :, : self.window], seen
        stop = self.length + k.shape[2]
        self.k[layer, :, :, self.length : stop] = k
        self.v[layer, :, :, self.length : stop] = v
        return self.k[layer, :, :, :stop], self.v[layer, :, :, :stop], None

    def advance(self, n: int) -> None:
        """Advance by ``n`` positions after every layer has appended them."""
        self.position += n
        self.length += n


class ImageGPT(nn.Module):
    """The network of a config, which has its shape and objective: palette tokens in, logits over the palette out."""

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        self.config = config
        self.wte: nn.Embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe: nn.Embedding = nn.Embedding(config.n_positions, config.n_embd)
        autoregressive = config.objective == "autoregressive"
        self.sos: nn.Parameter | None = nn.Parameter(torch.empty(config.n_embd)) if autoregressive else None
        self.h: nn.ModuleList = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f: RMSNorm = RMSNorm(config.n_embd)
        self.lm_head: nn.Linear = nn.Linear(config.n_embd, config.vocab_size, bias=False)  # not tied to wte
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initial values of the published code. The zero head makes the first loss exactly ln K."""
        width, depth = self.config.n_embd, self.config.n_layer
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)
        if self.sos is not None:
            nn.init.normal_(self.sos, std=0.02)
        for block in self.blocks():
            nn.init.normal_(block.attn.c_attn.weight, std=1 / math.sqrt(width))
            nn.init.normal_(block.attn.c_proj.weight, std=1 / math.sqrt(width * depth))
            nn.init.normal_(block.mlp.c_fc.weight, std=0.02)
            nn.init.normal_(block.mlp.c_proj.weight, std=0.02)  # not scaled by depth, unlike GPT-2
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or name == "lm_head.weight":
                nn.init.zeros_(parameter)
            elif "ln_" in name:
                nn.init.ones_(parameter)

    def blocks(self) -> list[Block]:
        """The blocks in order."""
        return [block for block in self.h if isinstance(block, Block)]

    def forward(self, tokens: Tensor, *, masked: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits for every pixel.

        Args:
            tokens: Palette ids, int64 (B, T) in raster order. With an empty cache the prompt, (B, P), which may be
                empty; with a cache in use the previous pixel, (B, 1).
            masked: For BERT networks: bool (B, T), true where the pixel is hidden. Position t predicts pixel t from
                both sides.
            cache: For autoregressive networks: keys and values of earlier pixels.

        Returns:
            Float (B, T, K): at index t the logits of pixel t given pixels before t. With an empty cache (B, P + 1, K),
            of which the last row predicts the first pixel after the prompt; with a cache in use (B, 1, K).
        """
        return self.lm_head(self.hidden(tokens, masked=masked, cache=cache))  # type: ignore[no-any-return]

    def hidden(self, tokens: Tensor, *, masked: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """The output of the final norm, (B, T, D): the input of ``lm_head`` and of a classifier's head."""
        x = self._embed(tokens, masked, cache)  # (B, T, D)
        for layer, block in enumerate(self.h):
            x = block(x, masked is None, cache, layer)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.ln_f(x)  # type: ignore[no-any-return]

    def features(self, tokens: Tensor, layers: Sequence[int], *, masked: Tensor | None = None, skip: int = 0) -> Tensor:
        """Pooled taps for probing, in one pass that stops at the deepest layer of ``layers``.

        Tap l is the mean over positions of the norm-ed input of block l, tap L that of the final norm (paper, 2.2-2.4).

        Args:
            tokens: int64 (B, T).
            layers: Numbers from 0 (embeddings) to L (after the last block).
            masked: For BERT networks: bool (B, T).
            skip: How many positions, from the first on, the mean leaves out; -1 leaves out all but the last.

        Returns:
            Float (B, len(layers), D) in the order of ``layers``.

        Raises:
            ValueError: ``layers`` is empty, or a layer does not exist.
        """
        depth = self.config.n_layer
        wrong = [layer for layer in layers if not 0 <= layer <= depth]
        if wrong or not layers:
            raise ValueError(f"layers is {list(layers)}; it must be one or more numbers from 0 to {depth}")
        x = self._embed(tokens, masked, None)
        norms = [block.ln_1 for block in self.blocks()] + [self.ln_f]
        taps: dict[int, Tensor] = {}  # of (B, D)
        for layer in range(max(layers) + 1):
            if layer in layers:
                taps[layer] = norms[layer](x[:, skip:]).mean(1, dtype=torch.promote_types(x.dtype, torch.float32))
            if layer < max(layers):
                x = self.h[layer](x, masked is None)
        return torch.stack([taps[layer] for layer in layers], 1)

    def _embed(self, tokens: Tensor, masked: Tensor | None, cache: KVCache | None) -> Tensor:
        if masked is not None and cache is not None:
            raise ValueError("masked= and cache= exclude each other: a cache holds only earlier pixels; drop one")
        if masked is None and self.sos is None:
            raise ValueError("this is a BERT network: it needs masked=, a bool (B, T) that marks hidden pixels")
        started = cache is not None and cache.length > 0  # and holds sos
        if cache is None:
            self.check_length(tokens.shape[1])
        elif started and tokens.shape[1] != 1:
            raise ValueError(f"a cache in use takes one pixel at a time, not {tokens.shape[1]}; use a new cache")
        x = self.wte(tokens[:, :-1] if cache is None and masked is None else tokens)
        if masked is not None:
            x = x * ~masked[:, :, None]  # a hidden pixel keeps only its position
        elif self.sos is not None and not started:
            x = torch.cat([self.sos.expand(x.shape[0], 1, -1), x], 1)
        positions = torch.arange(x.shape[1], device=x.device)
        if cache is not None:
            self.check_length(cache.length + x.shape[1], exact=False)
            positions = positions + cache.position
        # Not by wpe.weight: pruning and parametrizations hook the call.
        return F.dropout(x + self.wpe(positions), self.config.dropout, self.training)

    def check_length(self, length: int, *, exact: bool = True) -> None:
        """Raise ValueError unless ``length`` is the number of tokens of an image or, if not ``exact``, less."""
        side, expected = self.config.image_size, self.config.n_positions
        if length > expected or (exact and length != expected):
            unit = "pixels" if self.config.tokens_per_pixel == 1 else "tokens, 3 of each pixel"
            raise ValueError(f"{length} tokens; this network reads images of {side} x {side} = {expected} {unit}")
