"""Lightning's EMAWeightAveraging beside our modules is what docs/how-to/optimisers.md says it is."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

import lightning_igpt as igpt
from tests.modules.helpers import TINY, loader, quiet_trainer
from tests.test_resume import ENDLESS, NETWORK, SOURCE, Recorder, fit

WEIGHT = "network.lm_head.weight"


def pretraining():
    module = igpt.PretrainModule(NETWORK, "gray:4", optimizer="muon", seed=3, warmup_steps=2)
    return module, igpt.PretrainDataModule(SOURCE, batch_size=4, seed=5)


class Weights(Callback):
    """A weight after every step, and in the last validation."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, module, *rest):
        self.steps.append(module.state_dict()[WEIGHT].clone())

    def on_validation_batch_start(self, trainer, module, *rest):
        self.validated = module.state_dict()[WEIGHT].clone()


def test_training_is_as_without_it_and_a_resumed_run_as_its_twin(tmp_path):
    plain, *_ = fit(pretraining, ENDLESS)
    whole, weights, _ = fit(pretraining, ENDLESS, callbacks=[EMAWeightAveraging(decay=0.5), Recorder(tmp_path)])
    assert whole.losses == plain.losses and whole.validations.keys() == plain.validations.keys()
    assert whole.validations != plain.validations
    for place in ("step-2", "step-3", "validation-3"):
        path = tmp_path / f"{place}.ckpt"
        again, found, _ = fit(pretraining, ENDLESS, ckpt=path, callbacks=[EMAWeightAveraging(decay=0.5)])
        assert again.validations[6] == whole.validations[6]
        assert all(torch.equal(value, found[name]) for name, value in weights.items()), place


@pytest.mark.parametrize("start", [None, 3])
def test_the_average_is_that_of_the_weights_after_each_step(tmp_path, start):
    """From the first step on, or from a later one; until then it is the first weights."""
    spy, ema = Weights(), EMAWeightAveraging(decay=0.5, update_starting_at_step=start)
    torch.manual_seed(0)
    module = igpt.PretrainModule(TINY, "gray:8", lr=0.05, warmup_steps=0)
    first = module.state_dict()[WEIGHT].clone()
    trainer = quiet_trainer(
        tmp_path, max_steps=4, val_check_interval=3, check_val_every_n_epoch=None, callbacks=[ema, spy]
    )
    trainer.fit(module, loader(), loader())
    expected = spy.steps[start or 0]
    for weight in spy.steps[(start or 0) + 1 :]:
        expected = 0.5 * expected + 0.5 * weight
    assert torch.allclose(module.network.lm_head.weight, expected, rtol=1e-5)
    assert torch.equal(spy.validated, first) == (start is not None)
