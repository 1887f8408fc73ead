import contextlib
import gc
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_igpt.data.bad_images import BadImages
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
    loader = make_loader(SignalsOfAWorker(), EvalOrder(4, batch_size=2), num_workers=1, bad_images=BadImages(0))
    assert [batch["sample"].tolist() for batch in loader] == [[0, 1], [2, 3]]


def test_workers_are_stopped_before_the_program_ends():
    loader = make_loader(SignalsOfAWorker(), EvalOrder(4, batch_size=2), num_workers=2, bad_images=BadImages(0))
    next(iter(loader))
    assert loader._stopper.atexit
    loader._stopper()
    assert not any(worker.is_alive() for worker in loader._iterator._workers)


class Raises(ImageBatches):
    def __init__(self):
        pass

    def __getitem__(self, draws):
        raise ValueError("not one of ours")


@pytest.mark.parametrize("images", [SignalsOfAWorker(), Raises()])
def test_workers_stop_when_their_loader_goes_in_a_cycle(images):
    loader = make_loader(images, EvalOrder(4, batch_size=2), num_workers=1, bad_images=BadImages(0))
    batches = iter(loader)
    with contextlib.suppress(ValueError):
        next(batches)
    (worker,) = loader._watched._workers
    with contextlib.suppress(ValueError):
        list(batches)
    loader.itself = loader
    del loader
    start = time.monotonic()
    gc.collect()
    assert not worker.is_alive() and time.monotonic() - start < 4


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.marathon)])
def test_a_program_ends_while_loaders_are_alive(start_method):
    program = f"""
import multiprocessing
from lightning_igpt.data import PretrainDataModule
if __name__ == "__main__":
    multiprocessing.set_start_method("{start_method}")
    data = PretrainDataModule("digits", image_size=8, num_workers=2, cache="memory")
    data.setup()
    loader = data.train_dataloader()
    batches = iter(loader)
    print(len(next(batches)["image"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == ["128"]
