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


def current_datamodule(trainer: Any) -> Any:
    """The data module in use now, None where there are loaders; ``trainer.datamodule`` may be an earlier call's.

    ``Trainer._data_connector._datahook_selector``: lightning 2.6.
    """
    selector = trainer._data_connector._datahook_selector
    return None if selector is None else selector.datamodule


def allow_clipping(optimizer: Any) -> Any:
    """Let Lightning clip gradients of a fused optimizer, which it refuses in bf16-mixed, where no scale is involved.

    ``Optimizer._step_supports_amp_scaling``: torch 2.10 to 2.14. Without the mark a GradScaler undoes its scale itself.
    """
    optimizer._step_supports_amp_scaling = False
    return optimizer
