import os
import signal

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_igpt.data.dataset import ImageBatches
from lightning_igpt.data.loaders import epoch_length, make_loader
from lightning_igpt.data.order import EvalOrder


def trainer(**options):
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False, **options)


@pytest.mark.parametrize(
    "options, length",
    [
        ({"max_steps": 30, "accumulate_grad_batches": 2}, 60),
        ({"max_steps": 30, "max_epochs": -1}, 30),
        ({"max_epochs": 3}, 7),
        ({"max_epochs": -1}, 7),
        ({"fast_dev_run": True}, 7),
    ],
)
def test_length_of_a_lightning_epoch(options, length):
    assert epoch_length(trainer(**options), 7) == length
    assert epoch_length(None, 7) == 7


def test_steps_and_epochs_together_are_warned_of():
    with pytest.warns(UserWarning, match="Set only one of them"):
        assert epoch_length(trainer(max_steps=30, max_epochs=2), 7) == 7


class SignalsOfAWorker(ImageBatches):
    def __init__(self):
        pass

    def __getitem__(self, draws):
        for name in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), name)
        return {"sample": torch.tensor([sample for _, sample in draws])}


def test_a_worker_outlives_the_signals_of_a_scheduler():
    loader = make_loader(SignalsOfAWorker(), EvalOrder(4, batch_size=2), num_workers=1)
    assert [batch["sample"].tolist() for batch in loader] == [[0, 1], [2, 3]]
