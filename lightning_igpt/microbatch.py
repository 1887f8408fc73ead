"""The largest micro-batch whose training fits into a device's memory, found by training steps that are really made."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_igpt.model import Recomputing
from lightning_igpt.modules import PretrainModule
from lightning_igpt.optim import make_adam
from lightning_igpt.planning import largest_batch
from lightning_igpt.private import multiplies_bfloat16
from lightning_igpt.progress import working

GIB = 2**30
UNITS = ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
AUTOCAST = {"bf16-mixed": torch.bfloat16, "32-true": None}
SAFETY = 0.95  # of the memory, for the peak of what is allocated: the rest is for gaps between allocations


class MicroBatch(NamedTuple):
    """What :func:`find_micro_batch` found.

    Attributes:
        batch_size: Images that each device computes at once.
        accumulate_grad_batches: Of how many such batches an optimiser step is made.
        bytes: The most memory that its steps took at any moment.
        tried: The same of every size that was tried; None where the device had not enough.
    """

    batch_size: int
    accumulate_grad_batches: int
    bytes: int
    tried: Mapping[int, int | None] = MappingProxyType({})


def find_micro_batch(
    module: PretrainModule,
    batch_size: int,
    *,
    devices: int = 1,
    device: torch.device | str = "auto",
    recompute: Recomputing = "none",
    compiled: bool = False,
    precision: str | None = None,
    memory_bytes: int | None = None,
    safety: float = SAFETY,
) -> MicroBatch:
    """Try training steps on random tokens with ever better sizes, and keep the largest that fits.

    The steps are made by a copy: module, gradients and random numbers stay as they are. A module that lies on the
    device takes a part of it during the trials, so leave it on the CPU. State that is spread over devices (FSDP) is not
    tried.

    Args:
        module: What is to be trained.
        batch_size: Images of an optimiser step over all devices.
        devices: Number of devices that share them, each of which holds the whole network.
        device: Where to try; auto is the GPU, or the CPU where there is none.
        recompute: Activation checkpointing, as ``ImageGPT.set_recompute`` takes it.
        compiled: Compile the blocks, as ``CompileBlocks`` does; this takes less memory.
        precision: ``bf16-mixed`` or ``32-true``. Default: the former where the device computes it fast.
        memory_bytes: What may be used. Default: all memory of the GPU. On a CPU it must be given.
        safety: The share of it that the peak may reach.

    Returns:
        The size, how many of them make a step, and what was tried.

    Raises:
        ValueError: An argument is out of range, there is no such device, or not even one image fits.
    """
    for name, value in (("batch_size", batch_size), ("devices", devices)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a whole number from 1 on")
    if batch_size % devices:
        raise ValueError(f"a step of {batch_size} images cannot be shared by {devices} devices")
    place = place_of(device)
    precision = precision or ("bf16-mixed" if multiplies_bfloat16(place.type) else "32-true")
    if precision not in AUTOCAST:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(AUTOCAST)}")
    usable = int(safety * memory_of(place, memory_bytes))
    sizes = divisors(batch_size // devices)
    options: dict[str, Any] = {"precision": precision, "recompute": recompute, "compiled": compiled}
    expected = largest_batch(module.config, usable, **options)
    tried: dict[int, int | None] = {}
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        trial = _Trial(module, place, AUTOCAST[precision], recompute, compiled)

        def fits(size: int) -> bool:
            peak = tried[size] = trial.peak(size, accumulates=size < sizes[-1])
            return peak is not None and peak <= usable

        with working("trying steps"):
            best = last_that_fits(sizes, fits, sum(size <= expected for size in sizes) - 1)
    if best is None:
        raise ValueError(_refusal(tried[1], usable, recompute))
    taken = tried[best]
    assert taken is not None
    return MicroBatch(best, sizes[-1] // best, taken, MappingProxyType(tried))


def place_of(device: torch.device | str) -> torch.device:
    """The device to try on.

    Args:
        device: cpu, cuda, one of several GPUs such as cuda:1, or auto for the GPU where there is one.

    Raises:
        ValueError: It is none of these, or there is no such GPU.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return torch.device("cuda" if gpus else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        place = None
    if place is None or place.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {str(device)!r}; it must be cpu, cuda or auto")
    if place.type == "cuda" and not gpus:
        raise ValueError(f"device is {str(device)!r}, and torch finds no CUDA GPU here: take cpu")
    if place.type == "cuda" and (place.index or 0) >= gpus:
        raise ValueError(f"device is {str(device)!r}, and the last of {gpus} CUDA GPUs is cuda:{gpus - 1}")
    return place


def memory_of(device: torch.device, memory_bytes: int | None) -> int:
    """Bytes that training may use: those of a GPU, or fewer if so told.

    Args:
        device: A CPU or a CUDA GPU.
        memory_bytes: What the user allows; None for all of a GPU.

    Raises:
        ValueError: It is below 1, or None on a CPU.
    """
    if memory_bytes is not None and memory_bytes < 1:
        raise ValueError(f"memory_bytes (--memory-gib) is {memory_bytes}; it must be at least 1")
    if device.type == "cuda":
        there: int = torch.cuda.get_device_properties(device).total_memory
        return there if memory_bytes is None else min(memory_bytes, there)
    if memory_bytes is None:
        raise ValueError(
            f"a {device.type} device does not say when its memory is used up: give memory_bytes (--memory-gib)"
        )
    return memory_bytes


def readable(size: int) -> str:
    """Bytes in GiB, or in a smaller unit where that would say next to nothing."""
    unit, name = next(((unit, name) for unit, name in UNITS if size >= 0.1 * unit), UNITS[-1])
    return f"{size / unit:.2f} {name}"


def divisors(number: int) -> list[int]:
    """In rising order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def last_that_fits(sizes: Sequence[int], fits: Callable[[int], bool], guess: int = 0) -> int | None:
    """The last of rising sizes that fits; where one does not fit, no larger one does.

    The search goes out from a guess by 1, 2, 4, ... places, and halves the gap once both ends are known.

    Args:
        sizes: At least one.
        fits: Asked at most once for each.
        guess: The place in ``sizes`` to ask first, for which any number is taken.

    Returns:
        None where the first does not fit.
    """
    low, high, stride = -1, len(sizes), 1  # low fits, high does not
    place = guess
    while high - low > 1:
        place = min(max(place, low + 1), high - 1)
        if fits(sizes[place]):
            low = place
        else:
            high = place
        inwards = high - stride if low == -1 else (low + high) // 2
        place = low + stride if high == len(sizes) else inwards
        stride *= 2
    return sizes[low] if low >= 0 else None


class MemoryMeter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors that are alive, on devices whose allocator does not tell.

    Counts distinct storages that operations have returned since it was entered, and those it was told of. What a kernel
    takes for itself while it runs is not seen.

    Args:
        held: Tensors that are there already and count.
        ignored: Tensors that are there and do not.
    """

    supports_higher_order_operators = True

    def __init__(self, held: Iterable[Tensor] = (), ignored: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0  # bytes
        self.peak = 0
        self._seen: dict[int, Any] = {}
        for tensor in ignored:
            self._seen[tensor.untyped_storage()._cdata] = tensor  # held, so that its address is not given away
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation, then look at what it returned."""
        returned = func(*args, **(kwargs or {}))
        for value in tree_leaves(returned):
            if isinstance(value, Tensor):
                self._count(value)
        return returned

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._seen:
            return

        def gone(_: object) -> None:
            del self._seen[address]
            self.live -= size

        self._seen[address] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


class _Trial:
    """A copy of a module that makes training steps of any size."""

    def __init__(
        self,
        module: PretrainModule,
        device: torch.device,
        autocast: torch.dtype | None,
        recompute: Recomputing,
        compiled: bool,
    ) -> None:
        self.device, self.autocast = device, autocast
        self.module = copy.deepcopy(module).to(device).train()
        self.module.zero_grad()
        self.module.log = lambda *args, **options: None  # type: ignore[method-assign]  # there is no trainer to log to
        self.module.network.set_recompute(recompute)
        if compiled:
            for block in self.module.network.blocks():
                block.compile()
        self.optimizer = make_adam(self.module.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)

    def peak(self, size: int, *, accumulates: bool) -> int | None:
        """The most bytes that are alive at once; None where the device has not enough."""
        try:
            return self._peak(size, accumulates)
        except torch.OutOfMemoryError:
            pass
        finally:
            self.module.zero_grad()
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return None

    def _peak(self, size: int, accumulates: bool) -> int:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._steps(size, accumulates)
            torch.cuda.synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        meter = MemoryMeter([*self.module.parameters(), *self.module.buffers(), *state])
        with meter:
            self._steps(size, accumulates)
        return meter.peak

    def _steps(self, size: int, accumulates: bool) -> None:
        for _ in range(2):  # the second one meets the optimiser's state
            loss = self._loss(size)
            self.module.zero_grad()  # here, as Lightning does
            torch.autograd.backward(loss)
            if accumulates:  # the next batch meets gradients
                torch.autograd.backward(self._loss(size))
            self.optimizer.step()

    def _loss(self, size: int) -> Tensor:
        config, device = self.module.config, self.device
        tokens = torch.randint(config.vocab_size, (size, config.n_positions), device=device)
        batch = {"tokens": tokens, "sample": torch.arange(size, device=device)}
        with torch.autocast(device.type, self.autocast, enabled=self.autocast is not None):
            loss: Tensor = self.module.training_step(batch, 0)
        return loss


def _refusal(needed: int | None, usable: int, recompute: Recomputing) -> str:
    taken = "more than there is" if needed is None else readable(needed)
    cure = "recompute='full' (--recompute full), or" if recompute != "full" else "a larger device, or"
    return (
        f"training on one image at a time takes {taken}, and {readable(usable)} may be used: "
        f"{cure} a strategy that spreads the network over several devices"
    )
