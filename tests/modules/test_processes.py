"""What two processes must do alike, and what each must do its own way."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, seed_everything

from lightning_igpt.modules import PretrainModule, ProbeModule
from tests.modules.helpers import TINY, quiet_trainer
from tests.processes import Shared, batches, in_processes


class Generators(Callback):
    """The state of torch's generator before each batch."""

    def __init__(self):
        self.states = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.states.append(torch.get_rng_state())


def test_each_process_drops_others(tmp_path):
    def work(rank):
        seed_everything(0)
        seen = Generators()
        trainer = quiet_trainer(tmp_path, max_steps=2, devices=2, strategy="ddp", callbacks=[seen])
        trainer.fit(PretrainModule(replace(TINY, dropout=0.5), "gray:8"), Shared(batches(TINY, 2)))
        for state in seen.states:
            both = [torch.empty_like(state) for _ in range(2)]
            torch.distributed.all_gather(both, state)
            assert not torch.equal(*both)

    assert in_processes(work) == [0, 0]


@pytest.mark.parametrize(
    ("count", "options"), [(8, {"c": [0.01, 1.0], "concat": 3}), (4, {"solver": "sgd", "standardize": True})]
)
def test_a_probe_fits_to_the_images_of_all(tmp_path, count, options):
    def fit(devices, **rest):
        torch.manual_seed(0)
        module = ProbeModule(network=TINY, palette="gray:8", num_classes=3, **options)
        rest |= {"max_epochs": 1 if "c" in options else 2, "devices": devices, "use_distributed_sampler": False}
        quiet_trainer(tmp_path, **rest).fit(module, Shared(batches(TINY, count)))
        return module

    twin = fit(1)

    def work(rank):
        module = fit(2, strategy="ddp")
        for mine, other in zip(module.results, twin.results, strict=True):
            assert mine == pytest.approx(other)
        for name, value in module.state_dict().items():
            torch.testing.assert_close(value, twin.state_dict()[name], rtol=1e-4, atol=1e-5)
        for name, value in module.named_buffers():
            both = [torch.empty_like(value) for _ in range(2)]
            torch.distributed.all_gather(both, value)
            assert torch.equal(*both), name

    assert in_processes(work) == [0, 0]
