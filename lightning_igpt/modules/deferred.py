"""Networks without weights, for which a trainer draws them later: for those that no process could hold as a whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.model import ImageGPT

DRAWN = ("normal_", "uniform_")
FILLS = (*DRAWN, "fill_", "zero_")  # each gives a tensor all of its values


def check_deferred(defer_init: bool, pretrained: str | None) -> None:
    """Raise where weights shall be drawn later that are loaded now.

    Raises:
        ValueError: Both are asked for.
    """
    if defer_init and pretrained is not None:
        raise ValueError(
            f"defer_init is for weights that are drawn, and pretrained={pretrained!r} has some; leave it out"
        )


NOT_DRAWN = (
    "this network's weights are not drawn yet (defer_init=True): a trainer draws them when it sets the module up; "
    "without one, call module.configure_model()"
)


_draws: ContextVar[bool] = ContextVar("_draws", default=True)


@contextmanager
def never_drawn() -> Iterator[None]:
    """Make deferred networks only to look at: their random numbers are not used up, which takes long for large ones."""
    token = _draws.set(False)
    try:
        yield
    finally:
        _draws.reset(token)


class Fill(NamedTuple):
    """How a tensor gets its values; picklable, so that a module can be sent to other processes."""

    name: str  # of a method of Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Tensor | None  # of torch's generator before it; None where nothing is drawn

    def __call__(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor on the CPU with these values; torch's generator goes on from behind them."""
        if self.state is not None:
            torch.set_rng_state(self.state)
        filled: Tensor = getattr(torch.empty(shape, dtype=dtype, device="cpu"), self.name)(*self.args, **self.kwargs)
        return filled


class DeferredGPT(ImageGPT):
    """An ImageGPT on the meta device, which knows how each weight is to be drawn.

    Making it uses up the random numbers that an ImageGPT uses up, so that whatever is drawn after it is the same.
    ``take_fills`` makes an ImageGPT of it, and ``draw`` gives that its weights, bit for bit what it would have had.

    Args:
        config: Shape and objective.
    """

    def __init__(self, config: ImageGPTConfig) -> None:
        with _Recorder() as recorder, torch.device("meta"):
            super().__init__(config)
        self.fills = {name: recorder.fills[id(parameter)] for name, parameter in self.named_parameters()}

    def take_fills(self) -> dict[str, Fill]:
        """Become an ImageGPT, still on the meta device; what was known of the weights, by name."""
        fills = self.fills
        del self.fills
        self.__class__ = ImageGPT  # type: ignore[assignment]
        return fills

    def _embed(self, *_: Any) -> Tensor:
        raise RuntimeError(NOT_DRAWN)

    def load_state_dict(self, *_: Any, **__: Any) -> Any:
        """Refused: what is on the meta device takes nothing in, and says nothing."""
        raise RuntimeError(NOT_DRAWN)


@torch.no_grad()
def draw(network: ImageGPT, fills: dict[str, Fill], device: torch.device | str) -> None:
    """Give a network on the meta device its weights, one after another.

    Where it is sharded, a process keeps its own part of each: at no time does it hold more than that and one whole
    weight. The random numbers that are used up are those of making the network; torch's generator stays where it is.

    Args:
        network: Its parameters are replaced, so no optimiser may have them yet.
        fills: Of every parameter.
        device: Where the weights come to lie. They are drawn on the CPU in any case.
    """
    network.to_empty(device=device)
    with torch.random.fork_rng(devices=[]):
        for name, parameter in network.named_parameters():
            _give(parameter, fills[name](parameter.shape, parameter.dtype))


def _give(parameter: Any, whole: Tensor) -> None:
    """Copy a weight, which all processes have, into a parameter, of which this one may hold a part; nothing is sent."""
    if not hasattr(parameter, "placements"):
        parameter.copy_(whole)
        return
    from torch.distributed.tensor import distribute_tensor  # some builds of torch have none

    part: Any = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(part.to_local())


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how tensors on the meta device are filled, and lets torch's generator go on as if they were real."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fills: dict[int, Fill] = {}  # by the id of a tensor; the last one counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name in FILLS:
            filled, *rest = args
            state = torch.get_rng_state() if name in DRAWN else None
            fill = self.fills[id(filled)] = Fill(name, tuple(rest), kwargs, state)
            if state is not None and _draws.get():
                fill(filled.shape, filled.dtype)
        return func(*args, **kwargs)
