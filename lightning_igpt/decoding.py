"""One step of cached sampling: the network processes the prompt, a lighter form of it one pixel at a time.

A step reads all weights and the whole cache and computes little with them, so its time depends on the bytes it reads.
"""

import logging
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_igpt.model import GELU_SLOPE, NORM_EPS, Block, ImageGPT, KVCache, RMSNorm
from lightning_igpt.private import int8_product

log = logging.getLogger(__name__)

Precision: TypeAlias = Literal["full", "half", "int8"]
Product: TypeAlias = Callable[[Tensor], Tensor]  # (B, in) to (B, out)

FEW_ROWS = 4  # up to this number x W^T is the faster product on a CPU, above it (W x^T)^T
INT8_WIDTH = 16  # of whose multiples the int8 kernel needs its rows
WINDOWS = 8  # captured steps of one network; each reads an eighth of the cache more than the previous


def is_sharded(network: nn.Module) -> bool:
    """Whether each process holds a part of the weights (FSDP2), so that all must call the network together."""
    return hasattr(network, "unshard")


class Decoder:
    """Keys, values and steps of one batch of images.

    Args:
        network: An autoregressive network in evaluation mode; not modified.
        batch_size: Images decoded together, B.
        precision: ``full``: the network's own. ``half``: weights in 16 bits, float16 on x86 CPUs, else bfloat16.
            ``int8``: weights in 8 bits with a scale per row; on CPUs only. Keys and values have 16 bits in half
            precision on a GPU; on a CPU they stay in float32, since converting them at every step takes longer than
            reading fewer bytes saves. Default: half under autocast, else full.

    Raises:
        ValueError: The precision is unknown, or the device has no kernel for it.
    """

    def __init__(self, network: ImageGPT, batch_size: int, precision: Precision | None = None) -> None:
        weight, sharded = network.wte.weight, is_sharded(network)
        if precision is None:
            precision = "half" if torch.is_autocast_enabled(weight.device.type) else "full"
        if precision not in get_args(Precision):
            raise ValueError(f"precision is {precision!r}; it must be 'full', 'half' or 'int8'")
        if precision == "int8" and weight.device.type != "cpu":
            raise ValueError(f"precision 'int8' needs a CPU, but this network is on {weight.device}; use 'half'")
        if precision == "int8" and sharded:
            raise ValueError("precision 'int8' needs whole weights, but this network is sharded; use 'half'")
        widens = precision == "full" or weight.dtype != torch.float32 or weight.device.type == "cpu"
        dtype = weight.dtype if widens else torch.bfloat16
        self.network, self.precision = network, precision
        self.cache = KVCache(network.config, batch_size, device=weight.device, dtype=dtype)
        light = network if sharded else _in_type(network, dtype)  # only calls of the network itself gather its weights
        self._step: Product = lambda pixel: light(pixel, cache=self.cache)[:, -1]
        if weight.device.type == "cpu" and not sharded:
            self._step = FlatSteps(network, self.cache, precision)
        elif weight.device.type == "cuda" and not sharded:
            self._step = CapturedSteps(light, self.cache)

    def start(self, prompt: Tensor) -> Tensor:
        """Logits (B, K) of the first pixel after a prompt, int64 (B, P), which may be empty; one pass."""
        return self.network(prompt, cache=self.cache)[:, -1]  # type: ignore[no-any-return]

    def step(self, pixel: Tensor) -> Tensor:
        """Logits (B, K) of the next pixel, given the previous pixel, int64 (B, 1); valid until the next step."""
        with torch.autocast(self.cache.k.device.type, enabled=False):  # which would convert every weight in every step
            return self._step(pixel)


def _in_type(network: ImageGPT, dtype: torch.dtype) -> ImageGPT:
    """The network, or a copy with weights of another dtype."""
    if network.wte.weight.dtype == dtype:
        return network
    with torch.device("meta"):
        copy = ImageGPT(network.config)
    copy.load_state_dict({name: value.to(dtype) for name, value in network.state_dict().items()}, assign=True)
    return copy.requires_grad_(False).eval()


def reads_float16() -> bool:
    """Whether torch has FBGEMM, an x86 library whose product converts float16 weights as it reads them."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def make_product(linear: nn.Module, rows: int, precision: Precision) -> Product:
    """A linear layer for few rows, on a CPU: (rows, in) to (rows, out); adapters are called unchanged."""
    if type(linear) is not nn.Linear:
        return linear
    weight, bias = linear.weight.detach(), linear.bias
    if precision == "int8":
        return _with_bias(_int8_product(weight.float()), bias)
    if precision == "half" and weight.dtype == torch.float32:
        if not reads_float16():
            narrow = weight.bfloat16()
            return _with_bias(lambda x: F.linear(x.bfloat16(), narrow).to(x.dtype), bias)
        if weight.abs().max() <= torch.finfo(torch.float16).max:  # larger weights stay in float32
            packed = torch.ops.quantized.linear_prepack_fp16(weight.clone(), bias)  # may clamp its argument
            return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)
    if rows > FEW_ROWS and weight.dtype == torch.float32:
        return _with_bias(lambda x: torch.mm(weight, x.t()).t().contiguous(), bias)
    transposed = weight.t()
    return _with_bias(lambda x: torch.mm(x, transposed), bias)


def _int8_product(weight: Tensor) -> Product:
    scale = weight.abs().amax(1).clamp(min=1e-12) / 127  # (out,)
    missing = -weight.shape[1] % INT8_WIDTH
    rounded = F.pad((weight / scale[:, None]).round().to(torch.int8), (0, missing))
    scale, multiply = scale.bfloat16(), int8_product()

    def product(x: Tensor) -> Tensor:
        rows = x.bfloat16() if not missing else F.pad(x.bfloat16(), (0, missing))
        return multiply(rows, rounded, scale).to(x.dtype)

    return product


def _with_bias(product: Product, bias: Tensor | None) -> Product:
    return product if bias is None else lambda x: product(x) + bias


class FlatBlock:
    """A block for one position per image, on a CPU, without calls of modules, which would take longer than the work."""

    def __init__(self, block: Block, rows: int, precision: Precision) -> None:
        self.gain_1, self.gain_2 = _doubled_gain(block.ln_1), _doubled_gain(block.ln_2)
        self.c_attn = make_product(block.attn.c_attn, rows, precision)
        self.attn_proj = make_product(block.attn.c_proj, rows, precision)
        self.c_fc, self.mlp_proj = (make_product(part, rows, precision) for part in (block.mlp.c_fc, block.mlp.c_proj))
        self.n_head = block.attn.n_head

    def __call__(self, x: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        """(B, D) to (B, D); writes the position's keys and values into those of the cache, (B, H, T, d)."""
        B, D = x.shape
        qkv = self.c_attn(_norm(x, self.gain_1)).view(B, 3, self.n_head, 1, D // self.n_head)
        q, k, v = qkv.unbind(1)  # (B, H, 1, d)
        keys.narrow(2, length, 1).copy_(k)
        values.narrow(2, length, 1).copy_(v)
        keys, values = keys.narrow(2, 0, length + 1), values.narrow(2, 0, length + 1)
        y = F.scaled_dot_product_attention(q, keys, values)
        x = x + self.attn_proj(y.view(B, D))
        hidden = F.silu(self.c_fc(_norm(x, self.gain_2)).mul_(GELU_SLOPE)).mul_(1 / GELU_SLOPE)
        return x + self.mlp_proj(hidden)


class FlatSteps:
    """Embedding, all blocks as ``FlatBlock``, head."""

    def __init__(self, network: ImageGPT, cache: KVCache, precision: Precision) -> None:
        rows = cache.k.shape[1]
        self.network, self.cache = network, cache
        self.blocks = [FlatBlock(block, rows, precision) for block in network.blocks()]
        self.gain = _doubled_gain(network.ln_f)
        self.head = make_product(network.lm_head, rows, precision)
        self.keys, self.values = cache.k.unbind(0), cache.v.unbind(0)

    def __call__(self, pixel: Tensor) -> Tensor:
        """See ``Decoder.step``."""
        length = self.cache.length
        x = self.network.wte(pixel[:, 0]) + self.network.wpe.weight[length]  # (B, D)
        for block, keys, values in zip(self.blocks, self.keys, self.values, strict=True):
            x = block(x, keys, values, length)
        self.cache.advance(1)
        return self.head(_norm(x, self.gain))


def _doubled_gain(norm: RMSNorm) -> Tensor:
    return torch.cat([norm.weight.detach()] * 2)


def _norm(x: Tensor, doubled_gain: Tensor) -> Tensor:
    """RMSNorm as the LayerNorm of (x, -x), whose mean is 0: four kernels on a CPU instead of nine."""
    return F.layer_norm(torch.cat([x, -x], -1), doubled_gain.shape, doubled_gain, None, NORM_EPS)[:, : x.shape[1]]


class CapturedSteps:
    """Steps as CUDA graphs, one per window of the cache: one launch instead of hundreds, which would take longer."""

    def __init__(self, network: ImageGPT, cache: KVCache) -> None:
        self.network, self.cache = network, cache
        total = network.config.n_positions
        self.grain = -(-total // WINDOWS)
        self.pixel = torch.zeros(cache.k.shape[1], 1, dtype=torch.long, device=cache.k.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.works = True

    def __call__(self, pixel: Tensor) -> Tensor:
        """See ``Decoder.step``; it reads the positions seen and its own, rounded up to a multiple of the grain."""
        window = min(-(-(self.cache.length + 1) // self.grain) * self.grain, self.cache.k.shape[3])
        if self.works and window not in self.graphs:
            self._capture(window)
        if not self.works:
            return self.network(pixel, cache=self.cache)[:, -1]  # type: ignore[no-any-return]
        graph, logits = self.graphs[window]
        self.pixel.copy_(pixel)
        graph.replay()
        self.cache.length += 1  # the graph has moved the position on the device
        return logits

    def _capture(self, window: int) -> None:
        cache, length = self.cache, self.cache.length
        cache.window = window
        try:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # warm-up: libraries initialize, which cannot be captured
                for _ in range(2):
                    self.network(self.pixel, cache=cache)
                    self._back_to(length)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self.network(self.pixel, cache=cache)[:, -1]
            self.graphs[window] = graph, logits
        except RuntimeError as error:
            log.warning("steps cannot be captured as a CUDA graph; launching their kernels one by one: %s", error)
            self.works = False
        finally:
            cache.window = None
            self._back_to(length)

    def _back_to(self, length: int) -> None:
        """The next step overwrites what was written beyond ``length``."""
        self.cache.length = length
        self.cache.position.fill_(length)
