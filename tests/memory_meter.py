"""Bytes of the tensors that are alive, on devices whose allocator does not say."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """Counts storages that operations return, and those of ``held`` but not of ``ignored``, which exist before.

    What a kernel takes for itself while it runs is not seen.
    """

    supports_higher_order_operators = True

    def __init__(self, held=(), ignored=()):
        super().__init__()
        self.live = self.peak = 0  # bytes
        self._seen = {}
        for tensor in ignored:
            self._seen[tensor.untyped_storage()._cdata] = tensor  # held, so that its address is not given away
        for tensor in held:
            self._count(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        for value in tree_leaves(returned):
            if isinstance(value, Tensor):
                self._count(value)
        return returned

    def _count(self, tensor):
        storage = tensor.untyped_storage()
        address, size = storage._cdata, storage.nbytes()
        if address in self._seen:
            return

        def gone(_):
            del self._seen[address]
            self.live -= size

        self._seen[address] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)
