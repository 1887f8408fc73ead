"""Bytes of the tensors that are alive, measured on devices whose allocator does not say."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
