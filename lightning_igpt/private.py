"""Every private name of a third party that this package uses, each with the versions it was checked on."""

from __future__ import annotations

from collections.abc import Callable
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


def attention_kernels() -> list[Any]:
    """What ``scaled_dot_product_attention`` runs where it is one kernel, on any device.

    ``torch.ops.aten._scaled_dot_product_*_attention``: torch 2.7 to 2.14.
    """
    import torch

    names = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    return [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in names]


def int8_product() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The product of bfloat16 rows (B, in) and int8 weights (out, in) with scales (out,), on a CPU: (B, out).

    It reads past the end of rows whose length is no multiple of 16. ``torch._weight_int8pack_mm``: torch 2.7 to 2.14.
    """
    import torch

    return torch._weight_int8pack_mm


def uncompiled(module: Any) -> Any:
    """The module that ``torch.compile`` wraps, or the module itself. ``_orig_mod``: torch 2.10 to 2.14."""
    return getattr(module, "_orig_mod", module)


def current_datamodule(trainer: Any) -> Any:
    """The data module in use now, None where there are loaders; ``trainer.datamodule`` may be an earlier call's.

    ``Trainer._data_connector._datahook_selector``: lightning 2.6.
    """
    selector = trainer._data_connector._datahook_selector
    return None if selector is None else selector.datamodule


def allow_clipping(optimizer: Any) -> Any:
    """Let Lightning clip gradients of a fused optimizer in bf16-mixed, where no scale is involved.

    ``Optimizer._step_supports_amp_scaling``: torch 2.10 to 2.14. Without the mark a GradScaler undoes its scale itself.
    """
    optimizer._step_supports_amp_scaling = False
    return optimizer


def stop_workers(iterator: Any) -> None:
    """Stop the workers of a DataLoader's iterator, also those that ignore SIGTERM.

    ``_MultiProcessingDataLoaderIter._workers`` and ``_shutdown_workers``: torch 2.10 to 2.14.
    """
    workers = list(iterator._workers)
    iterator._shutdown_workers()
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def forget_iterator(loader: Any) -> None:
    """Let a DataLoader start new persistent workers. ``DataLoader._iterator``: torch 2.10 to 2.14."""
    loader._iterator = None
