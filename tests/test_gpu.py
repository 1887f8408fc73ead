"""A step of training never waits for the device."""

import lightning
import pytest
import torch

from lightning_igpt.callbacks import CompileBlocks, Throughput
from lightning_igpt.modules import FineTuneModule, PretrainModule
from lightning_igpt.trainer import make_trainer
from tests.modules.helpers import BERT, TINY, labelled_images


class Forbid(lightning.pytorch.Callback):
    """From the start of the third batch on, what waits for the device is an error; the first two warm up."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx >= 2:
            torch.cuda.set_sync_debug_mode("error")


class Allow(lightning.pytorch.Callback):
    """Ends that once the callbacks before this one have seen the end of the batch."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, trainer, pl_module, exception):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kind", ["autoregressive", "bert", "finetune"])
def test_a_step_of_training_does_not_wait_for_the_device(tmp_path, kind, compiled, precision):
    if kind == "finetune":
        module = FineTuneModule(num_classes=3, network=TINY, palette="gray:8")
    else:
        module = PretrainModule(BERT if kind == "bert" else TINY, "gray:8")
    images, labels = (part.cuda() for part in labelled_images(48))
    batches = torch.utils.data.DataLoader(list(zip(images.split(8), labels.split(8), strict=True)), batch_size=None)
    trainer = make_trainer(
        max_epochs=1, accelerator="gpu", devices=1, precision=precision, logger=False, log_every_n_steps=5,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_checkpointing=False,
        callbacks=[Forbid(), CompileBlocks(compiled), Throughput(), Allow()],
    )  # fmt: skip
    trainer.fit(module, batches)
    assert trainer.callback_metrics["throughput/images_per_second"] > 0
