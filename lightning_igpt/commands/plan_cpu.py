"""This CPU as a device to plan for, by a measurement of a second or two."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from lightning_igpt.planning import Device
from lightning_igpt.private import multiplies_bfloat16

SIDE = 1024  # of the matrices
COPIED = 2**27  # bytes, beyond any cache
REPEATS = 5


def measured_cpu() -> Device:
    """This CPU: what large products in float32 and bfloat16, and a large copy, reach with the threads torch takes."""
    import torch  # planning for other devices does without

    def product(dtype: torch.dtype) -> float:
        a, b = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
        return 2 * SIDE**3 / _seconds(lambda: a @ b) / 1e12

    source = torch.ones(COPIED // 4)
    target = torch.ones_like(source)
    bandwidth = 2 * COPIED / _seconds(lambda: target.copy_(source))
    single, half = product(torch.float32), product(torch.bfloat16)
    return Device(
        name=f"this CPU ({torch.get_num_threads()} threads)",
        memory=_memory(),
        tflops_16=half,
        tflops_tf32=None,
        tflops_32=single,
        bandwidth=bandwidth,
        source="measured now",
        torch_name="",
        bfloat16=multiplies_bfloat16("cpu"),
    )


def _seconds(run: Callable[[], object]) -> float:
    """Of the fastest of a few calls, after one to warm up."""
    run()
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return min(found)


def _memory() -> int:
    """Bytes of main memory."""
    if not hasattr(os, "sysconf"):
        raise ValueError("this system does not tell how much memory it has; plan for another device kind")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
