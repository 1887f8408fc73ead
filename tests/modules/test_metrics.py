import pytest
import torch

from lightning_igpt.modules import FineTuneModule, PretrainModule
from tests.modules.helpers import TINY, loader, quiet_trainer


@pytest.mark.parametrize("inside", [False, True])
def test_means_are_exact_in_bfloat16(tmp_path, inside):
    """The head is zero, so each image costs ln 8; in bfloat16 a sum of ones stands still at 256."""
    trainer = quiet_trainer(tmp_path, precision="bf16-true")
    if inside:
        with trainer.init_module():
            module = PretrainModule(TINY, "gray:8")
    else:
        module = PretrainModule(TINY, "gray:8")
    (found,) = trainer.validate(module, loader(300, batch_size=1), verbose=False)
    assert found["val/nats_per_pixel"] == pytest.approx(torch.tensor(8.0).log().item(), rel=1e-5)


def test_so_are_those_of_fine_tuning(tmp_path):
    module = FineTuneModule(network=TINY, palette="gray:8", num_classes=3)
    (found,) = quiet_trainer(tmp_path, precision="bf16-true").validate(module, loader(300, batch_size=1), verbose=False)
    assert found["val/cross_entropy"] == pytest.approx(
        torch.tensor(3.0).log().item(), rel=5e-3
    )  # each loss is a bfloat16
