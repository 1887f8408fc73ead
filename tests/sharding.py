"""Sharded runs on the CPU: modules that Lightning's strategies shard, and a process group that leaves no trace."""

import os

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard

from lightning_igpt.checkpointing import AtomicFSDPStrategy, AtomicModelParallelStrategy
from lightning_igpt.modules import PretrainModule
from tests.modules.helpers import TINY, loader, quiet_trainer


class FullySharded(PretrainModule):
    """As ModelParallelStrategy asks for: FSDP2."""

    def configure_model(self):
        if not isinstance(self.network, FSDPModule):
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])


class Wrapped(PretrainModule):
    """Wrapped beforehand, for a strategy that would wrap for GPUs only."""

    def configure_model(self):
        if not isinstance(self.network, FullyShardedDataParallel):
            self.network = FullyShardedDataParallel(self.network, device_id=torch.device("cpu"), use_orig_params=True)


class StockFSDPStrategy(FSDPStrategy):
    """Lightning refuses the class itself without a GPU."""


def strategy(kind, atomic, folders=True, data_parallel_size=1):
    if kind == "fsdp":
        made = AtomicFSDPStrategy if atomic else StockFSDPStrategy
        return made(state_dict_type="sharded" if folders else "full")
    made = AtomicModelParallelStrategy if atomic else ModelParallelStrategy
    return made(data_parallel_size, 1, save_distributed_checkpoint=folders)


def module(kind):
    torch.manual_seed(0)
    return (Wrapped if kind == "fsdp" else FullySharded)(TINY, "gray:8")


def trainer(folder, kind, atomic=True, folders=True, **options):
    made = strategy(kind, atomic, folders, options.get("devices", 1))
    options = {"max_steps": 2, "enable_checkpointing": False, "strategy": made} | options
    return quiet_trainer(folder, **options)


def fit(folder, kind, ckpt_path=None, **options):
    """A trained module and its trainer."""
    made, runner = module(kind), trainer(folder, kind, **options)
    runner.fit(made, loader(), ckpt_path=ckpt_path)
    return made, runner


@pytest.fixture(scope="module")
def process_group():
    """Let trainers make a group of this process alone, and take it away again."""
    before = dict(os.environ)
    os.environ.pop("PL_GLOBAL_SEED", None)  # to which Lightning goes back when it makes a group
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
