"""Two processes see what one sees: the order survives a change of their number, streams neither hang nor repeat."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from datasets import IterableDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning_igpt.data import PretrainDataModule
from tests.image_files import picture, tiny


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        values = batch["image"][:, 0, 0, 0] if "image" in batch else batch["tokens"][:, 0]
        self.seen.append([batch["sample"].tolist(), values.tolist()])
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.log("val/n", float(len(batch["sample"])), reduce_fx="sum", on_epoch=True, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.save_checkpoint(f"{sys.argv[3]}/{trainer.global_step}.ckpt")


def data(kind, devices):
    if kind == "map":
        return PretrainDataModule(tiny(26), batch_size=8 // devices, image_size=4)
    if kind == "disk":
        return PretrainDataModule(tiny(26), batch_size=8 // devices, image_size=4, cache="disk", cache_dir="tokens",
                                  palette="gray:16")
    def shards(sizes):
        for start, n in sizes:
            for i in range(start, start + n):
                yield {"image": picture(i, (4, 4))}
    stream = IterableDataset.from_generator(shards, gen_kwargs={"sizes": [(0, 17), (50, 5), (100, 9)]})
    return PretrainDataModule(stream, batch_size=4, image_size=4, val_fraction=0.2, val_images=4, shuffle_buffer=3)


if __name__ == "__main__":
    kind, devices, out, steps, ckpt = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), sys.argv[5]
    Path(out).mkdir(exist_ok=True)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_steps=steps,
        num_sanity_val_steps=0, val_check_interval=4, check_val_every_n_epoch=None, callbacks=[Save()],
        default_root_dir=out,
    )
    module = Recorder()
    trainer.fit(module, data(kind, devices), ckpt_path=ckpt or None, weights_only=True if ckpt else None)
    Path(out, f"seen-{trainer.global_rank}.json").write_text(json.dumps(module.seen))
"""


def fit(folder, kind, devices, out, steps=10, ckpt=""):
    """What each rank saw: [rank][step] = (samples, first values)."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), kind, str(devices), out, str(steps), str(ckpt)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads((folder / out / f"seen-{rank}.json").read_text()) for rank in range(devices)]
    return seen, done.stderr


def together(seen):
    """The global batches: those of all ranks in turn."""
    return [
        [[value for one in batches for value in one[part]] for part in (0, 1)] for batches in zip(*seen, strict=True)
    ]


@pytest.mark.slow
@pytest.mark.marathon
def test_the_order_survives_a_change_of_the_number_of_devices(tmp_path):
    whole = together(fit(tmp_path, "map", 1, "whole")[0])
    assert together(fit(tmp_path, "map", 2, "two", ckpt="whole/4.ckpt")[0]) == whole[4:]
    assert together(fit(tmp_path, "map", 1, "back", ckpt="two/7.ckpt")[0]) == whole[7:]


@pytest.mark.marathon
@pytest.mark.slow
def test_devices_share_a_token_cache_that_one_of_them_makes(tmp_path):
    one = together(fit(tmp_path, "disk", 1, "one", steps=4)[0])
    for file in (tmp_path / "tokens").rglob("*.bin"):
        file.unlink()
    seen, said = fit(tmp_path, "disk", 2, "two", steps=4)
    assert together(seen) == one and said.count("making the token cache") == 1


@pytest.mark.marathon
@pytest.mark.slow
def test_a_stream_of_unequal_shards_under_two_devices(tmp_path):
    """16 steps of 8 images are about five passes over the 25 that train."""
    whole, _ = fit(tmp_path, "stream", 2, "whole", steps=16)
    assert [len(batches) for batches in whole] == [16, 16]
    samples = [sample for batches in whole for batch in batches for sample in batch[0]]
    assert len(set(samples)) == len(samples) == 128
    resumed, _ = fit(tmp_path, "stream", 2, "resumed", steps=16, ckpt="whole/5.ckpt")
    assert resumed == [batches[5:] for batches in whole]
    alone, said = fit(tmp_path, "stream", 1, "alone", steps=16, ckpt="whole/11.ckpt")
    assert len(alone[0]) == 5 and "the stream begins its next pass" in said
    assert not {sample for batch in alone[0] for sample in batch[0]} & {
        sample for batches in whole for batch in batches[:11] for sample in batch[0]
    }
