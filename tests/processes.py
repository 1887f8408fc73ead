"""Runs of several processes on the CPU, forked from one that has imported all there is to import."""

import os
import sys
import traceback

import lightning
import torch
from torch.utils.data import DataLoader


def in_processes(work, world_size=2):
    """Call ``work(rank)`` in each of some processes of a run, as torchrun would start them; the exit statuses."""
    common = {"WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "GROUP_RANK": 0, "TORCHELASTIC_RUN_ID": "test"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 20_000 + os.getpid() % 20_000}
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            os.environ |= {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            status = 1
            try:
                work(rank)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


class Shared(lightning.LightningDataModule):
    """Global batches, of which each process reads its part, so that their number changes nothing."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def train_dataloader(self):
        rank, count = self.trainer.global_rank, self.trainer.world_size

        def part(value):
            return value[rank * len(value) // count : (rank + 1) * len(value) // count]

        batches = [{name: part(value) for name, value in batch.items()} for batch in self.batches]
        return DataLoader(batches, batch_size=None)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


def batches(config, count, size=8, classes=3):
    """Batches of tokens with labels: noisy copies of one picture for each class."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, config.vocab_size, (classes, config.n_positions), generator=generator)
    made = []
    for number in range(count):
        label = torch.randint(0, classes, (size,), generator=generator)
        noise = torch.randint(0, config.vocab_size, (size, config.n_positions), generator=generator)
        is_noise = torch.rand(noise.shape, generator=generator) < 0.3
        sample = torch.arange(number * size, (number + 1) * size)
        made.append({"tokens": torch.where(is_noise, noise, pictures[label]), "label": label, "sample": sample})
    return made


class Losses(lightning.Callback):
    """The loss of every batch, over all processes."""

    def __init__(self):
        self.all = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.all.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")))


def whole(module):
    """The weights of a module, complete and as copies; all processes together."""
    parameters = dict(module.named_parameters())
    return {
        name: getattr(one, "full_tensor", lambda one=one: one)().detach().clone() for name, one in parameters.items()
    }
