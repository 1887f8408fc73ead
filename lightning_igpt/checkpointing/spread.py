"""Checkpoints in one file, given out to processes of which each holds a part of the module.

Lightning 2.6 would give an optimiser's moments to other parameters than they belong to: it takes the numbers in the
file for places in the module, but they count through the optimiser's groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.strategies.fsdp import _get_full_state_dict_context
from torch import Tensor, nn

from lightning_igpt.checkpointing.intact import check_intact
from lightning_igpt.checkpointing.shards import by_position
from lightning_igpt.weights.safety import read_torch

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def read_whole(path: Path, n_optimizers: int, trusted: bool = False) -> dict[str, Any]:
    """A checkpoint in one file, mapped, so that processes on one machine share the memory.

    Args:
        path: The file.
        n_optimizers: How many optimisers need their states from it.
        trusted: Open it by plain pickle, which lets it run code.

    Raises:
        ValueError: It is damaged, holds Python objects, or lacks what is needed.
    """
    check_intact(path)
    checkpoint = TorchCheckpointIO().load_checkpoint(path, weights_only=False) if trusted else read_torch(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(f"{path} holds no weights of a LightningModule")
    if n_optimizers and len(checkpoint.get("optimizer_states", ())) != n_optimizers:
        raise ValueError(
            f"{path} holds the states of {len(checkpoint.get('optimizer_states', ()))} optimisers, but the run has "
            f"{n_optimizers}; start a new run from its weights with pretrained="
        )
    return checkpoint


def spread_fully_sharded(
    module: nn.Module, optimizers: list[torch.optim.Optimizer], strict: bool, checkpoint: Mapping[str, Any]
) -> None:
    """Load a whole checkpoint into a module sharded by FSDP2; each process takes its part, and none talks to another.

    Args:
        module: Its sharded parameters are DTensors.
        optimizers: Of these, made after the module was sharded; none where nothing is trained.
        strict: Whether the names of the tensors must be the module's.
        checkpoint: As read_whole gives it.
    """
    own = module.state_dict()
    state = {name: _like(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
    module.load_state_dict(state, strict=strict)
    del state
    for optimizer, saved in zip(optimizers, checkpoint.get("optimizer_states", ()), strict=False):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbered = by_position(saved, "the checkpoint")
        moments = {
            number: {name: _like(value, parameters[number]) for name, value in values.items()}
            for number, values in numbered["state"].items()
            if number < len(parameters)  # the optimiser says what is wrong
        }
        optimizer.load_state_dict({**numbered, "state": moments})


def spread_flat(
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    strict: bool,
    checkpoint: Mapping[str, Any],
    world_size: int,
) -> None:
    """Load a whole checkpoint into a module sharded by FullyShardedDataParallel; all processes call it together.

    Args:
        module: Wrapped, or with wrapped parts.
        optimizers: As for spread_fully_sharded; of the original parameters (``use_orig_params``).
        strict: Whether the names of the tensors must be the module's.
        checkpoint: As read_whole gives it.
        world_size: The number of processes.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    names = {parameter: _plain(name) for name, parameter in module.named_parameters()}
    in_full: Any = _get_full_state_dict_context(module, world_size=world_size, rank0_only=False)
    with in_full:
        module.load_state_dict(checkpoint["state_dict"], strict=strict)
        for optimizer, saved in zip(optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            listed = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
            state = by_position(saved, "the checkpoint")
            named = {
                "state": {listed[number]: values for number, values in state["state"].items()},
                "param_groups": [
                    {**group, "params": [listed[number] for number in group["params"]]}
                    for group in state["param_groups"]
                ],
            }
            optimizer.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(module, optimizer, named))


def _like(value: Any, own: Any) -> Any:
    """A copy of a whole tensor; where the module's own is sharded, of this process's part of it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(value, Tensor):
        return value
    if not isinstance(own, DTensor) or value.shape != own.shape:
        return value.clone()  # the file is only mapped
    # src_data_rank: every process has the file, so none needs to send anything
    return distribute_tensor(value.detach(), own.device_mesh, own.placements, src_data_rank=None).clone()


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
