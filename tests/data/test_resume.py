"""Stopped and resumed runs see exactly the images that an uninterrupted twin sees."""

import warnings
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import IterableDataset
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_igpt.data import FineTuneDataModule, PretrainDataModule
from lightning_igpt.data.transforms import RandomCrop
from lightning_igpt.modules.resume import count_micro_batches
from tests.image_files import noise, picture, rows, tiny
from tests.processes import in_processes

SOURCE = tiny(26)  # 23 to train on, 3 steps of 6 per pass


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.sizes = [], set()

    def on_load_checkpoint(self, checkpoint):
        count_micro_batches(self, checkpoint)  # as all modules of this package do

    def training_step(self, batch, batch_idx):
        values = batch["image"][:, 0, 0, 0] if "image" in batch else batch["tokens"][:, 0]
        self.seen += zip(batch["sample"].tolist(), values.tolist(), strict=True)
        self.sizes.add((self.trainer.train_dataloader.batch_size, len(values)))
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(Callback):
    """A checkpoint wherever one is usually made: <event>-<optimizer step>.ckpt."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, event, trainer):
        trainer.save_checkpoint(self.folder / f"{event}-{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer, *_):
        if not trainer.fit_loop._should_accumulate():
            self.save("step", trainer)

    def on_validation_end(self, trainer, _):
        self.save("validation", trainer)

    def on_train_epoch_end(self, trainer, _):
        self.save("epoch", trainer)


class Estimating(Recorder):
    """Asks for the length of the run, for which Lightning makes the loader before it restores the step."""

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches < float("inf")
        return super().configure_optimizers()


def fit(options, ckpt=None, save_to=None, cls=PretrainDataModule, source=SOURCE, module=None, **data):
    module = module or Recorder()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, callbacks=[Save(save_to)] if save_to else [], **options,
    )  # fmt: skip
    data = cls(source, **{"batch_size": 6, "image_size": 4, **data})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable")
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module.seen


def checkpoints(folder):
    paths = sorted(Path(folder).iterdir())
    assert paths
    return [(path, int(path.stem.split("-")[1])) for path in paths]


RUNS = {
    "endless": {"max_steps": 12, "val_check_interval": 4, "check_val_every_n_epoch": None},
    "endless, accumulating": {
        "max_steps": 4, "accumulate_grad_batches": 3, "val_check_interval": 6, "check_val_every_n_epoch": None,
    },
    "epochs": {"max_epochs": 2},
    "epochs, validation within": {"max_epochs": 2, "val_check_interval": 2},
    "epochs, accumulating": {"max_epochs": 2, "accumulate_grad_batches": 3},
    "epochs, cut short": {"max_epochs": 3, "limit_train_batches": 2},
}  # fmt: skip


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_resume_from_every_checkpoint(options, tmp_path):
    whole = fit(options, save_to=tmp_path)
    for path, step in checkpoints(tmp_path):
        assert "PretrainDataModule" not in torch.load(path, weights_only=True)
        assert fit(options, ckpt=path) == whole[6 * step :], path.stem
        assert fit(options, ckpt=path, module=Estimating()) == whole[6 * step :], path.stem


def test_accumulation_and_workers_leave_the_order_as_it_is(tmp_path):
    whole = fit({"max_steps": 7}, save_to=tmp_path)
    for accumulate, workers in ((2, 0), (3, 2), (6, 0)):
        module, options = Recorder(), {"max_steps": 7, "accumulate_grad_batches": accumulate}
        assert fit(options, module=module, num_workers=workers) == whole
        assert module.sizes == {(6 // accumulate, 6 // accumulate)}
    for step, accumulate, workers in ((3, 2, 0), (4, 3, 2), (5, 6, 0)):  # whose batches are counted from elsewhere
        folder = tmp_path / f"{step}"
        folder.mkdir()
        module, options = Recorder(), {"max_steps": 7, "accumulate_grad_batches": accumulate}
        path = tmp_path / f"step-{step}.ckpt"
        assert fit(options, ckpt=path, save_to=folder, module=module, num_workers=workers) == whole[6 * step :]
        assert module.sizes == {(6 // accumulate, 6 // accumulate)}
        back = fit({"max_steps": 7}, ckpt=folder / "step-6.ckpt")
        assert back == whole[36:]
    epochs = fit({"max_epochs": 3}, save_to=tmp_path)
    assert fit({"max_epochs": 3, "accumulate_grad_batches": 3}, ckpt=tmp_path / "step-4.ckpt") == epochs[24:]
    with pytest.raises(ValueError, match=r"batch_size 6,.* 1 devices x accumulate_grad_batches 4; .* to 4 or 8"):
        fit({"max_steps": 7, "accumulate_grad_batches": 4})


CROPPED = [noise((20, 17), seed) for seed in range(26)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_every_step_has_the_images_of_its_number_wherever_a_run_begins(world_size, accumulate, workers):
    """Pixels of all ranks and micro-batches against crops made one by one by the formula; a pass has four steps."""
    total, size = 6, 11
    permutations = [torch.randperm(26, generator=torch.Generator().manual_seed(3 + n)).tolist() for n in range(3)]
    draws = [(row, n * 26 + place) for n in range(3) for place, row in enumerate(permutations[n][:24])]
    crops = [np.asarray(RandomCrop(8, seed=3)(CROPPED[row], sample)) for row, sample in draws[: total * size]]
    wanted = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).unflatten(0, (size, total))
    at_once = total // (world_size * accumulate)
    for first in range(size) if workers == 0 else (0, 4, 7):
        ranks = []
        for rank in range(world_size):
            options = {"batch_size": total, "image_size": 8, "seed": 3, "val_fraction": 0, "num_workers": workers}
            data = PretrainDataModule(rows(CROPPED), **options)
            data.trainer = SimpleNamespace(
                global_rank=rank, world_size=world_size, accumulate_grad_batches=accumulate, global_step=first,
                max_steps=size, max_epochs=None, lightning_module=None,
            )  # fmt: skip
            data.setup()
            batches = islice(data.train_dataloader(), (size - first) * accumulate)
            ranks.append(torch.stack([batch["image"] for batch in batches]))  # (micro-batches, at once, 3, 8, 8)
        assert ranks[0].shape[1] == at_once
        seen = torch.stack(ranks, 1).reshape(size - first, total, 3, 8, 8)
        assert torch.equal(seen, wanted[first:]), first


def test_epochs_are_whole_steps_and_a_window_that_is_cut_short_ends_its_step():
    whole, seen = fit({"max_steps": 6}), fit({"max_epochs": 2, "accumulate_grad_batches": 3})
    assert seen == whole and len(seen) == 36
    cut = fit({"max_epochs": 2, "accumulate_grad_batches": 3, "limit_train_batches": 5})  # steps of 3 and 2 batches
    assert cut == whole[:10] + whole[12:22]


def test_augmentation_resumes_too(tmp_path):
    whole = fit({"max_epochs": 2}, save_to=tmp_path, cls=FineTuneDataModule, pad=2)
    assert fit({"max_epochs": 2}, ckpt=tmp_path / "step-4.ckpt", cls=FineTuneDataModule, pad=2) == whole[24:]


def of_both(seen):
    """What two processes saw, step by step of 8 images."""
    parts = [None, None]
    torch.distributed.all_gather_object(parts, seen)
    return [pair for start in range(0, len(seen), 4) for part in parts for pair in part[start : start + 4]]


TWO = {"devices": 2, "strategy": "ddp"}


def test_devices_share_a_token_cache():
    options = {"batch_size": 8, "image_size": 5, "cache": "disk", "palette": "gray:16"}

    def work(rank):
        assert of_both(fit({"max_steps": 4, **TWO}, **options)) == fit({"max_steps": 4}, **options)

    assert in_processes(work) == [0, 0]


def shards_of(sizes):
    for start, n in sizes:
        for i in range(start, start + n):
            yield {"image": picture(i, (4, 4))}


def test_a_stream_of_unequal_shards_under_two_devices(tmp_path):
    """16 steps of 8 images are about five passes over the 25 that train."""
    stream = IterableDataset.from_generator(shards_of, gen_kwargs={"sizes": [(0, 17), (50, 5), (100, 9)]})
    options = {"source": stream, "batch_size": 8, "val_fraction": 0.2, "val_images": 4, "shuffle_buffer": 3}

    def work(rank):
        seen = of_both(fit({"max_steps": 16, **TWO}, save_to=tmp_path, **options))
        assert [sample for sample, _ in seen] == list(range(128))
        rest = of_both(fit({"max_steps": 16, **TWO}, ckpt=tmp_path / "step-5.ckpt", **options))
        assert [sample for sample, _ in rest] == list(range(40, 128))

    assert in_processes(work) == [0, 0]
    with pytest.warns(UserWarning, match="the stream begins its next pass"):
        assert len(fit({"max_steps": 16}, ckpt=tmp_path / "step-11.ckpt", **options)) == 40
