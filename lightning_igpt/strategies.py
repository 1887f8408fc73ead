"""Which strategy a run takes, and why: one device, the whole network on each of several, or a share of it on each."""

import contextlib
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.accelerators.cpu import CPUAccelerator
from lightning.pytorch.accelerators.cuda import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.planning import ACTIVATION_BYTES, choose, usable_bytes
from lightning_igpt.weights.safety import check_intact, read_torch


class Chosen(NamedTuple):
    """What a trainer is given, and why."""

    strategy: str | Strategy
    reason: str


class FullyShardedStrategy(ModelParallelStrategy):
    """FSDP2: of weights, gradients and optimizer each device holds a share, and a checkpoint is one file.

    All ``devices`` of all nodes share the network, as its module says in ``configure_model``. Checkpoints load under
    every other strategy, and theirs under this one. Options are those of ModelParallelStrategy but for the sizes.
    """

    def __init__(self, devices: int, **options: Any) -> None:
        super().__init__(devices, 1, save_distributed_checkpoint=False, **options)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: the module sees and may change the optimizer's state before it is loaded, as on one device."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Open a checkpoint, mapped, so that the processes of a machine share memory; ValueError if it is damaged."""
        path = Path(self.broadcast(checkpoint_path))
        if weights_only is not None and not weights_only:
            return self.checkpoint_io.load_checkpoint(path, weights_only=False)
        check_intact(path)
        return dict(read_torch(path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give each process its share of the weights."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.model, dict(checkpoint["state_dict"]), options=options)  # type: ignore[arg-type]

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give each process its share of the optimizers' states, which count parameters through their groups."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
            parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
            state = {
                number: {name: _share_of(value, parameter) for name, value in saved["state"][number].items()}
                for number, parameter in zip(numbers, parameters, strict=True)
                if number in saved["state"]
            }
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _share_of(value: Any, parameter: Any) -> Any:
    """The share of a value that lies as a sharded parameter does; others, such as counts of steps, unchanged."""
    if not hasattr(parameter, "placements") or getattr(value, "shape", None) != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    whole = value.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def choose_strategy(
    given: str | Strategy,
    *,
    accelerator: Any,
    devices: Any,
    num_nodes: int,
    precision: str,
    config: ImageGPTConfig | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
) -> Chosen:
    """The strategy for a trainer that is given ``strategy=given`` and the other options.

    ``auto`` is planned: on GPUs by memory, where ``config`` and ``batch_size``, of an optimizer step, are known.
    """
    kind = kind_of_device(accelerator)
    count = _count(kind, devices)
    if isinstance(given, str) and given.lower() == "fsdp2":
        if count is None:
            raise ValueError(f"strategy is fsdp2 and devices is {devices!r}; set devices to a number")
        return Chosen(FullyShardedStrategy(count * num_nodes), "as given")
    if given != "auto":
        return Chosen(given, "as given")
    if count is None:
        return Chosen("auto", "Lightning's choice for this machine")
    total, plan = count * num_nodes, None
    if kind == "cuda" and config is not None and batch_size is not None and precision in ACTIVATION_BYTES:
        smallest = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
        images = max(1, batch_size // (total * accumulate))
        plan = choose(config, images, total, usable_bytes(smallest), precision)
    if total == 1:
        return Chosen("auto", plan.reason if plan else "one device")
    reason = plan.reason if plan else f"{total} devices, each with the whole network"
    if plan is not None and plan.strategy == "fsdp":
        return Chosen(FullyShardedStrategy(total), reason)
    # Buffers are the same everywhere: the palette, and a probe's scale, which is of all processes' images.
    return Chosen(DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False), reason)


def kind_of_device(accelerator: Any) -> str:
    """``cuda`` or ``cpu``; ``unknown`` where only Lightning knows."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    is_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available())
    return "cpu" if is_cpu else "unknown"


def _count(kind: str, devices: Any) -> int | None:
    """Devices of a run on this machine; None where only Lightning knows."""
    with contextlib.suppress(Exception):  # Lightning will say what is wrong with them
        if kind == "cuda" and devices in ("auto", None):  # Lightning takes one in a notebook
            return 1 if hasattr(sys, "ps1") or sys.flags.interactive else torch.cuda.device_count()
        if kind == "cuda":
            return len(CUDAAccelerator.parse_devices(devices) or [0])
        if kind == "cpu":
            return 1 if devices in ("auto", None) else CPUAccelerator.parse_devices(devices)
    return None
