import pytest
import torch

from lightning_igpt.modules import PretrainModule
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
