"""Every private name of a third party that this package uses, each with the versions it was checked on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether the device has instructions for bfloat16; a CPU without them emulates it, slower than float32.

    ``torch.cpu._is_amx_tile_supported`` and ``_is_avx512_bf16_supported``: torch 2.10 to 2.14.
    """
    import torch  # planning and other light commands do without

    device = torch.device(device)
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return False


def stop_workers(iterator: Any) -> None:
    """Stop the worker processes of a DataLoader's iterator, also those that ignore SIGTERM.

    ``_MultiProcessingDataLoaderIter._workers`` and ``_shutdown_workers``: torch 2.10 to 2.14.
    """
    workers = list(iterator._workers)
    iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def forget_iterator(loader: Any) -> None:
    """Let a DataLoader with persistent workers start new ones, after the others were stopped.

    ``DataLoader._iterator``: torch 2.10 to 2.14.
    """
    loader._iterator = None
