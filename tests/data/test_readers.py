import gc
import os
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_igpt.data import PretrainDataModule, readers, tokenize
from lightning_igpt.data.loaders import make_loader, n_steps
from lightning_igpt.data.order import EvalOrder
from lightning_igpt.data.readers import BadImages, ImageBatches, ImageReader
from lightning_igpt.data.splits import Part
from lightning_igpt.data.transforms import CenterCrop
from lightning_igpt.palette import Palette
from tests.data.test_datamodule import ready
from tests.image_files import noise, rows, tiny

UNDECODED = datasets.Image(decode=False)


def batches(dataset, part_rows=None, resize=None, **options):
    part = Part("some/source", "train", dataset.cast_column("image", UNDECODED), part_rows)
    return ImageBatches(ImageReader(part, "image", resize or CenterCrop(4)), **options)


def by_hand(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_a_batch_holds_the_images_in_order():
    images = [noise((4, 4), seed) for seed in range(5)]
    labels = torch.tensor([3, 1, 4, 1, 5])
    batch = batches(rows(images), labels=labels)[[(4, 104), (0, 7)]]
    assert torch.equal(batch["image"], torch.stack([by_hand(images[4]), by_hand(images[0])]))
    assert batch["image"].dtype == torch.uint8 and batch["image"].is_contiguous()
    assert batch["sample"].tolist() == [104, 7] and batch["label"].tolist() == [5, 3]
    assert set(batches(rows(images))[[(0, 0)]]) == {"image", "sample"}
    part = batches(tiny(9), np.array([2, 5, 8]))
    assert len(part) == 3 and part[[(2, 0), (0, 1)]]["image"][:, 0, 0, 0].tolist() == [8, 2]


def test_small_images_are_decoded_once_and_large_datasets_are_not_kept(monkeypatch):
    images, decoded = [noise((4, 4), seed) for seed in range(5)], []
    decode = readers.decode
    monkeypatch.setattr(readers, "decode", lambda *a, **k: decoded.append(1) or decode(*a, **k))
    for limit, n_decoded in ((4 * 4 * 4 * 5, 4), (4 * 4 * 4 * 5 - 1, 6)):
        monkeypatch.setattr(readers, "KEPT_BYTES", limit)
        part = batches(rows(images))
        for places in ([4, 0, 4], [0, 3, 2, 4]):
            batch = part[[(place, 0) for place in places]]
            assert torch.equal(batch["image"], torch.stack([by_hand(images[place]) for place in places]))
        assert len(decoded) == n_decoded, limit
        decoded.clear()


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "CMYK"])
def test_the_mode_of_a_column_is_honored_as_by_datasets(mode):
    """In every way from a dataset to tokens: by data modules, streams, caches, tokenize and with_transform."""
    pictures = [noise((4, 4), seed).convert("RGBA") for seed in range(4)]
    pictures[0].putalpha(9)
    palette, dataset = Palette.load("openai"), rows(pictures).cast_column("image", datasets.Image(mode=mode))
    wanted = torch.from_numpy(np.array(dataset.with_transform(palette.transform(size=4))[:]["tokens"]).astype(int))
    assert (np.array(tokenize(dataset, palette, size=4)["tokens"]) == wanted.numpy()).all()
    assert mode == "RGB" or not torch.equal(
        wanted, palette.quantize(batches(rows(pictures))[[(i, i) for i in range(4)]]["image"])
    )
    for options in ({}, {"cache": "disk", "palette": "openai"}, {"streaming": True, "shuffle_buffer": 1}):
        splits = datasets.DatasetDict(train=dataset, test=dataset)
        (batch,) = ready(PretrainDataModule, splits, image_size=4, batch_size=4, **options).test_dataloader()
        tokens = batch["tokens"].long() if "tokens" in batch else palette.quantize(batch["image"])
        assert torch.equal(tokens, wanted)


@pytest.mark.parametrize(
    "options, length",
    [
        ({"max_steps": 30, "accumulate_grad_batches": 2}, 30),
        ({"max_steps": 30, "max_epochs": -1}, 30),
        ({"max_epochs": 3}, 7),
        ({"max_epochs": -1}, 7),
        ({"fast_dev_run": True}, 7),
    ],
)
def test_steps_of_a_lightning_epoch(options, length):
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **options)
    assert n_steps(trainer, 7, "source") == length and n_steps(None, 7, "source") == 7


class Signals(ImageBatches):
    """Each batch brings the signals of a scheduler upon its worker."""

    def __init__(self):
        pass

    def __getitem__(self, draws):
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), name)
        return {"sample": torch.tensor([sample for _, sample in draws])}


def test_workers_outlive_signals_and_stop_when_their_loader_is_collected():
    loader = make_loader(Signals(), EvalOrder(4, batch_size=2), BadImages(0), None, 1)
    assert [batch["sample"].tolist() for batch in loader] == [[0, 1], [2, 3]]
    (worker,) = loader._iterator._workers
    loader.itself = loader
    del loader
    start = time.monotonic()
    gc.collect()
    assert not worker.is_alive() and time.monotonic() - start < 4


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", pytest.param("spawn", marks=pytest.mark.marathon)])
@pytest.mark.parametrize("cache", ["none", "disk"])
def test_a_program_ends_while_loaders_are_alive(start_method, cache, tmp_path):
    program = f"""
import multiprocessing
from lightning_igpt.data import PretrainDataModule
if __name__ == "__main__":
    multiprocessing.set_start_method("{start_method}")
    data = PretrainDataModule("digits", image_size=8, num_workers=2, cache="{cache}", palette="gray:16")
    data.setup()
    loader = data.train_dataloader()
    batches = iter(loader)
    print(len(next(batches)["sample"]))
"""
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == ["128"]
