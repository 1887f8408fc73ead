import math

import lightning
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_igpt.data import FineTuneDataModule
from lightning_igpt.modules import ProbeModule
from lightning_igpt.modules.probing.sgd import RunningScale
from tests.modules.helpers import BERT, TINY, loader, quiet_trainer


def probe(**options):
    torch.manual_seed(0)
    options = {"network": TINY, "solver": "sgd", "num_classes": 3} | options
    return ProbeModule(palette="gray:8", **options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_it_reaches_what_l_bfgs_finds(tmp_path, precision):
    found = {}
    for solver in ("lbfgs", "sgd"):
        module = probe(solver=solver)
        trainer = quiet_trainer(tmp_path, max_epochs=8, precision=precision)
        torch.manual_seed(1)
        trainer.fit(module, loader(96, shuffle=True), loader(48))
        assert trainer.current_epoch == (8 if solver == "sgd" else 1)
        found[solver] = module.accuracy_by_layer
        test = quiet_trainer(tmp_path).test(module, loader(48), verbose=False)[0]
        assert test["test/accuracy"] == pytest.approx(max(found[solver].values()))
    assert found["sgd"] == pytest.approx(found["lbfgs"], abs=0.03) and min(found["lbfgs"].values()) > 0.9
    assert module.c_by_layer == {} and [row["c"] for row in module.results] == [None] * 3
    assert "train/cross_entropy" in trainer.callback_metrics


def test_steps_equal_separate_classifiers_with_batch_normalisation(tmp_path):
    """Each layer as torch would train it alone: BatchNorm1d without affine, Linear, SGD with momentum, cosine."""
    module = probe(lr=0.3, weight_decay=0.01)
    data = loader(24)
    quiet_trainer(tmp_path, max_epochs=2).fit(module, data)
    for layer in range(3):
        norm, linear = torch.nn.BatchNorm1d(16, affine=False, eps=1e-6, momentum=None), torch.nn.Linear(16, 3)
        for parameter in linear.parameters():
            torch.nn.init.zeros_(parameter)
        groups = [{"params": [linear.weight], "weight_decay": 0.01}, {"params": [linear.bias]}]
        optimizer = torch.optim.SGD(groups, lr=0.3, momentum=0.9)
        for step, batch in enumerate([*data, *data]):
            for group in optimizer.param_groups:
                group["lr"] = 0.3 * 0.5 * (1 + math.cos(math.pi * step / 6))
            features = module.network.features(module.palette.quantize(batch["image"]), [layer])[:, 0].detach()
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(linear(norm(features)), batch["label"]).backward()
            optimizer.step()
        torch.testing.assert_close(module.weight[layer].data, linear.weight.data, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(module.bias[layer].data, linear.bias.data, rtol=1e-4, atol=1e-5)
        expected = linear(norm.eval()(features))
        logits = module.eval()(batch["image"])[:, layer]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_the_learning_rate_ends_at_zero(tmp_path):
    for options, steps in (({"max_epochs": 3}, 12), ({"max_steps": 5, "max_epochs": -1}, 5)):
        module = probe()
        trainer = quiet_trainer(tmp_path, **options)
        trainer.fit(module, loader(shuffle=True))
        assert trainer.global_step == steps
        assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-8)
    with pytest.raises(ValueError, match="where the run ends"):
        quiet_trainer(tmp_path, max_epochs=-1).fit(probe(), loader())


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_continues_exactly(tmp_path, stop):

    def run(folder, callbacks=(), **fit):
        data = FineTuneDataModule("digits", batch_size=320, image_size=4, pad=1)
        module = probe(network=BERT, mask_ratio=0.5, num_classes=None)
        trainer = quiet_trainer(folder, max_steps=7, max_epochs=-1, limit_val_batches=1, callbacks=[*callbacks])
        trainer.fit(module, data, **fit)
        return module, trainer

    whole, _ = run(tmp_path / "whole")

    class CutOff(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == stop:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")
                trainer.should_stop = True

    run(tmp_path / "cut", [CutOff()])
    resumed, trainer = run(tmp_path / "resumed", ckpt_path=tmp_path / "cut.ckpt")
    assert trainer.global_step == 7
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name


def test_a_resumed_run_takes_its_own_rate_and_decay(tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(probe(), loader(shuffle=True))
    module = probe(lr=0.5, weight_decay=0.25)
    trainer_two = quiet_trainer(tmp_path, max_epochs=2)
    rates = []
    module.on_train_batch_start = lambda *_: rates.append(trainer_two.optimizers[0].param_groups[0]["lr"])
    trainer_two.fit(module, loader(shuffle=True), ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert rates[0] == pytest.approx(0.25)  # half way down the cosine of 8 steps
    assert [group["weight_decay"] for group in trainer_two.optimizers[0].param_groups] == [0.25, 0.0]


def test_no_features_are_kept_and_the_network_is_frozen(tmp_path):
    module = probe()
    before = module.network.state_dict()["wte.weight"].clone()
    quiet_trainer(tmp_path, max_epochs=1).fit(module, loader(33, shuffle=True), loader())  # the last batch is one image
    assert torch.equal(before, module.network.wte.weight)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {"weight", "bias"} and not module._solver.waits
    assert module.weight.isfinite().all() and module.scale.variance.isfinite().all()


def test_without_standardisation_raw_features_are_classified(tmp_path):
    module = probe(standardize=False, lr=1.0)
    trainer = quiet_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, loader(shuffle=True), loader())
    features = torch.randn(4, 3, 16)
    expected = torch.einsum("bld,lcd->blc", features, module.weight) + module.bias
    torch.testing.assert_close(module.logits(features), expected)
    again = ProbeModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert torch.equal(again.bias, module.bias) and again.results == module.results


def test_images_in_order_are_warned_of(tmp_path, caplog):
    quiet_trainer(tmp_path, max_epochs=1).fit(probe(), loader(shuffle=True))
    assert "SGD needs a loader that shuffles" not in caplog.text
    quiet_trainer(tmp_path, max_epochs=1).fit(probe(), DataLoader(loader().dataset, 8))
    assert "SGD needs a loader that shuffles" in caplog.text


def test_running_statistics_are_means_over_batches():
    scale, batches = RunningScale(2, 3), torch.randn(5, 4, 2, 3, generator=torch.manual_seed(0)) * 3 + 1
    for number, batch in enumerate(batches, 1):
        flat = batch.flatten(1)
        expected = (flat - flat.mean(0)) / (flat.var(0, correction=0) + 1e-6).sqrt()
        torch.testing.assert_close(scale(batch, number), expected.view_as(batch))
    flat = batches.flatten(2)
    mean, variance = flat.mean((0, 1)), flat.var(1).mean(0)
    torch.testing.assert_close(scale.mean, mean)
    torch.testing.assert_close(scale.variance, variance)
    one = batches[0, :1]
    torch.testing.assert_close(scale(one, 6), ((one.flatten(1) - mean) / (variance + 1e-6).sqrt()).view_as(one))
    assert torch.equal(scale(one), scale(one, 6))
