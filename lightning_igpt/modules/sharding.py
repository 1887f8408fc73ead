"""Sharded training (FSDP2): each process holds a part of every weight, and gathers a block when its turn comes.

Lightning's ModelParallelStrategy leaves it to the module how. A unit, which is gathered and let go of at once, is a
block; what is left of the network is another, and so is a classifier's head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from lightning_igpt.decoding import is_sharded
from lightning_igpt.model import ImageGPT
from lightning_igpt.modules.deferred import DeferredGPT, draw


def set_up(module: Any) -> None:
    """Shard a module's network where its trainer's strategy asks for it, and draw the weights that wait for that.

    Doing it again changes nothing.

    Args:
        module: One of this package's modules, attached to a trainer or not.

    Raises:
        ValueError: The strategy asks for tensor parallelism, or the network is sharded already and the strategy is
            none that goes on with that.
    """
    network: ImageGPT = module.network
    trainer: Trainer | None = module._trainer
    strategy = None if trainer is None else trainer.strategy
    sharded = isinstance(strategy, ModelParallelStrategy)
    if sharded:
        check_mesh(module.device_mesh)
        if any(isinstance(one, WeightAveraging) for one in trainer.callbacks):  # type: ignore[union-attr]
            raise ValueError(
                "weights cannot be averaged while they are sharded: torch makes no copy of such a network; leave out "
                "WeightAveraging (EMAWeightAveraging), or train with strategy ddp"
            )
    elif is_sharded(network) and trainer is not None and trainer.world_size > 1:
        raise ValueError(
            f"this module's network is sharded, which {type(strategy).__name__} cannot go on with: load its checkpoint "
            "into a new module"
        )
    fills = network.take_fills() if isinstance(network, DeferredGPT) else None
    if trainer is not None and sharded:
        if not is_sharded(network):
            shard(module, module.device_mesh["data_parallel"], str(trainer.precision))
        _allow_gradients_later(trainer)
    if fills is not None:
        draw(network, fills, strategy.root_device if strategy is not None and sharded else "cpu")


def check_mesh(mesh: Any) -> None:
    """Raise where the processes are to share the work within a layer.

    Raises:
        ValueError: More than one process is to do so.
    """
    data, tensor = mesh["data_parallel"].size(), mesh["tensor_parallel"].size()
    if tensor > 1:
        raise ValueError(
            f"the strategy has tensor_parallel_size={tensor}, but layers are not cut up here: shard over all "
            f"processes with AtomicModelParallelStrategy(data_parallel_size={data * tensor}, tensor_parallel_size=1)"
        )


def shard(module: nn.Module, mesh: Any, precision: str = "32-true") -> None:
    """Shard the network of a module, and its other children that have weights, over the processes of a mesh.

    Afterwards all processes must call the network together and equally often, whatever for. Parameters of the module
    itself stay whole on each of them (``average_gradients``).

    In bf16-mixed the blocks' weights are gathered in bfloat16, which halves what is sent, and gradients are added up in
    float32. Embeddings, the last norm and the heads are gathered as they are, and blocks take their input as it is, so
    that the residual stream is in float32 as without sharding: rounded to bfloat16 it would lose what the last of many
    blocks add to it. What differs from bf16-mixed without sharding is that the gains of the blocks' norms are rounded.

    Args:
        module: Has a ``network``.
        mesh: One-dimensional.
        precision: Lightning's name.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    network: Any = module.network
    mixed = precision == "bf16-mixed"
    narrow = torch.bfloat16 if mixed else None
    wide = torch.float32 if mixed or precision in ("bf16-true", "16-true") else None
    inner = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=wide, cast_forward_inputs=False)
    outer = MixedPrecisionPolicy(reduce_dtype=wide, cast_forward_inputs=False)
    for block in network.blocks():
        fully_shard(block, mesh=mesh, mp_policy=inner)
        block.ln_1.register_forward_pre_hook(partial(_gather_for_tap, block))
    for child in module.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh, mp_policy=outer)
    for name in ("hidden", "features"):
        register_fsdp_forward_method(network, name)
    network.features = _tapped(network)
    if mixed:  # called outside of a step too, products get bfloat16 weights
        for name in ("forward", "hidden", "features"):
            setattr(network, name, _under_autocast(getattr(network, name), mesh.device_type))


def average_gradients(module: Any) -> None:
    """Of parameters that are whole on every process, average the gradients over the processes, as DDP does."""
    if not is_sharded(module.network) or torch.distributed.get_world_size() == 1:
        return
    for parameter in module.parameters(recurse=False):
        if parameter.grad is not None:
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= torch.distributed.get_world_size()


def let_go(module: nn.Module) -> None:
    """Let go of all that is gathered of a sharded module, so that its parameters are the parts that are trained.

    FSDP2 does so after each backward pass, but keeps what is no block's after a forward pass, since one will follow.
    """
    for part in module.modules():
        if is_sharded(part):
            part.reshard()  # type: ignore[operator]


def _gather_for_tap(block: Any, norm: nn.Module, _: Any) -> None:
    """``ImageGPT.features`` calls a block's first norm before the block, and so before the block is gathered."""
    if hasattr(norm.weight, "placements"):
        block.unshard()


def _tapped(network: Any) -> Callable[..., Tensor]:
    features = network.features

    @wraps(features)
    def tapped(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in network.parameters()):
            raise RuntimeError("features of a sharded network come without gradients: call it under torch.no_grad()")
        taps: Tensor = features(*args, **kwargs)
        let_go(network)  # of the deepest tap, the norm was called and the block was not
        return taps

    return tapped


def _under_autocast(method: Callable[..., Tensor], device_type: str) -> Callable[..., Tensor]:
    @wraps(method)
    def called(*args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast(device_type, torch.bfloat16, cache_enabled=False):
            return method(*args, **kwargs)

    return called


def _allow_gradients_later(trainer: Trainer) -> None:
    """Evaluate under no_grad: FSDP2 keeps what it gathers into, and what was made in inference mode cannot be trained.

    Lightning 2.6 sees to it for FSDPStrategy and gloo, but not here.
    """
    for loop in (trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop):
        loop.inference_mode = False
