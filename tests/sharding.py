"""A process group of one process, for runs that share a network."""

import os

import pytest
import torch

from lightning_igpt.modules import PretrainModule
from lightning_igpt.strategies import FullyShardedStrategy
from tests.modules.helpers import quiet_trainer

FullySharded = PretrainModule


def trainer(folder, _="fsdp2", **options):
    options = {"max_steps": 2, "enable_checkpointing": False, "strategy": FullyShardedStrategy(1)} | options
    return quiet_trainer(folder, **options)


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
