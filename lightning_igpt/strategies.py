"""Which strategy a run takes, and why: one device, the whole network on each of several, or a share of it on each."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.imports import _IS_INTERACTIVE
from lightning.pytorch.accelerators.cpu import CPUAccelerator
from lightning.pytorch.accelerators.cuda import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.nn.parallel import DistributedDataParallel

from lightning_igpt.checkpointing import AtomicModelParallelStrategy, with_whole_shards
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.planning import ACTIVATION_BYTES, Choice, choose, usable_bytes

log = logging.getLogger(__name__)

# One of them is set where something starts a process for each device, or a user has said which machine this is.
LAUNCHERS = {"TORCHELASTIC_RUN_ID", "GROUP_RANK", "NODE_RANK", "SLURM_NTASKS", "LSB_JOBID", "OMPI_COMM_WORLD_RANK"}


class Chosen(NamedTuple):
    """What a trainer is given, and why."""

    strategy: str | Strategy
    reason: str
    sharded: bool = False  # no process holds the whole network


class StaticDDPStrategy(DDPStrategy):
    """Lightning's DDPStrategy for a network that does the same in every step, as an Image GPT does.

    With a static graph DDP looks for unused parameters once, and activation checkpointing may be used; gradients are
    views of what is sent, which saves a copy of them; buffers are the same everywhere anyway (the palette, and a
    probe's scale, which is of all processes' images) and are not sent at each step.

    Args:
        **options: As DDPStrategy takes.
    """

    def __init__(self, **options: Any) -> None:
        defaults = {"static_graph": True, "gradient_as_bucket_view": True, "broadcast_buffers": False}
        super().__init__(**(defaults | options))
        self._knows_graph = False

    def _setup_model(self, model: torch.nn.Module) -> DistributedDataParallel:
        self._knows_graph = False
        return super()._setup_model(model)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep gradients here until the window of accumulation ends, but for the first backward pass of all.

        In that pass DDP learns the graph, and without sending anything it cannot (torch 2.13: an internal assertion
        fails). Its gradients are then averaged twice, which gives what averaging once does.
        """
        knows, self._knows_graph = self._knows_graph, True
        static = isinstance(self.model, DistributedDataParallel) and self.model.static_graph
        context: AbstractContextManager[Any] = super().block_backward_sync() if knows or not static else nullcontext()
        with context:
            yield


class FullyShardedStrategy(AtomicModelParallelStrategy):
    """FSDP2: of weights, gradients and optimiser each device holds a share, and checkpoints are whole or absent.

    Lightning's ModelParallelStrategy, with all devices of all nodes in one group that shares the network; how the
    network is divided, its modules say in ``configure_model``.

    Args:
        save_distributed_checkpoint: Write a folder to which each process adds its share; else one file, which the first
            process gathers in its memory.
        **options: As ModelParallelStrategy takes, but for the sizes.
    """

    def __init__(self, save_distributed_checkpoint: bool = True, **options: Any) -> None:
        super().__init__("auto", 1, save_distributed_checkpoint=save_distributed_checkpoint, **options)

    def setup_environment(self) -> None:
        """Make the group once the number of processes is known."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def choose_strategy(
    told: str | Strategy,
    *,
    accelerator: Any,
    devices: Any,
    num_nodes: int,
    precision: str,
    config: ImageGPTConfig | None = None,
    batch_size: int | None = None,
) -> Chosen:
    """The strategy for a trainer.

    What the user named is taken: by ``fsdp2`` ours, by all other names what Lightning means by them. Otherwise it is
    planned: on GPUs by their memory and by what the network takes there.

    Args:
        told: What the user gave for ``strategy``.
        accelerator: As Trainer takes it.
        devices: As Trainer takes it.
        num_nodes: Number of machines.
        precision: Lightning's name of it.
        config: The network that is trained; None leaves the plan out.
        batch_size: Images that a device computes at once; None leaves the plan out.
    """
    if num_nodes > 1 and not LAUNCHERS & os.environ.keys():
        log.warning(
            "num_nodes is %d, and nothing here says which machine this is: processes will wait for the others; start "
            "them with torchrun or srun (lightning-igpt launch), or set NODE_RANK, MASTER_ADDR and MASTER_PORT",
            num_nodes,
        )
    told = told.lower() if isinstance(told, str) and "." not in told else told  # as Lightning takes its own names
    if told == "fsdp2":
        return Chosen(FullyShardedStrategy(), "as told", True)
    if told != "auto":
        taken = with_whole_shards(told, accelerator)
        return Chosen(taken, "as told", isinstance(taken, ModelParallelStrategy))
    kind, count = _devices(accelerator, devices)
    if count is None or (num_nodes == 1 and count > 1 and _IS_INTERACTIVE):
        return Chosen("auto", "Lightning's choice for this machine")
    total = count * num_nodes
    plan = _plan(kind, total, precision, config, batch_size)
    if total == 1:
        return Chosen("auto", plan.reason if plan else "one device")
    if plan is None:
        return Chosen(StaticDDPStrategy(), f"{total} devices, each with the whole network")
    if plan.strategy == "fsdp":
        return Chosen(FullyShardedStrategy(), plan.reason, True)
    return Chosen(StaticDDPStrategy(), plan.reason)


def _devices(accelerator: Any, devices: Any) -> tuple[str, int | None]:
    """(kind of device, number of them on this machine); None where only Lightning knows."""
    try:
        if accelerator in ("cuda", "gpu", "auto") and torch.cuda.is_available():
            if devices in ("auto", None):
                return "cuda", 1 if _IS_INTERACTIVE else torch.cuda.device_count()
            return "cuda", len(CUDAAccelerator.parse_devices(devices) or [0])
        if accelerator == "cpu" or (accelerator == "auto" and not torch.backends.mps.is_available()):
            return "cpu", 1 if devices in ("auto", None) else CPUAccelerator.parse_devices(devices)
    except Exception:  # Lightning will tell what is wrong with them
        return "unknown", None
    return "unknown", None


def _plan(
    kind: str, total: int, precision: str, config: ImageGPTConfig | None, batch_size: int | None
) -> Choice | None:
    """What the plan chooses; None where there is nothing to plan with: only CUDA tells how much memory it has."""
    if kind != "cuda" or config is None or batch_size is None or precision not in ACTIVATION_BYTES:
        return None
    smallest = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return choose(config, batch_size, total, usable_bytes(smallest), precision)
