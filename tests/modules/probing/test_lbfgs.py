import tempfile

import lightning
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader

from lightning_igpt.features import choose_c, fit_logistic
from lightning_igpt.modules import ProbeModule
from lightning_igpt.modules.probing import lbfgs
from tests.modules.helpers import loader, quiet_trainer
from tests.modules.probing.helpers import deep_probe, features_of, noisy_loader, probe

# --- the strength ---------------------------------------------------------------------------------------------------


def test_each_layer_chooses_its_c_on_training_images_alone(tmp_path):
    module = probe(c=[1.0, 0.001, 0.03], seed=1)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, noisy_loader(300), noisy_loader(90, seed=1))
    features, labels = features_of(module, noisy_loader(300), [0, 1, 2])
    for layer in range(3):
        c = choose_c(features[:, layer], labels, 3, grid=[0.001, 0.03, 1.0], seed=1)
        weight, bias = fit_logistic(features[:, layer], labels, 3, c=c)
        assert module.c_by_layer[layer] == c
        assert trainer.callback_metrics[f"probe/layer_{layer}/c"].item() == pytest.approx(c)
        torch.testing.assert_close(module.weight[layer], weight)
        torch.testing.assert_close(module.bias[layer], bias)
    assert len(set(module.c_by_layer.values())) > 1
    other = probe(c=[1.0, 0.001, 0.03], seed=1)
    quiet_trainer(tmp_path, max_epochs=1).fit(other, noisy_loader(300), noisy_loader(30, seed=9))
    assert other.c_by_layer == module.c_by_layer  # whatever the validation images


def test_a_number_is_no_choice(tmp_path):
    module = probe(c=0.03)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, loader(), loader())
    assert module.c_by_layer == dict.fromkeys(range(3), 0.03)
    assert not len(module._solver.training)  # the memory is given back


# --- several layers together ----------------------------------------------------------------------------------------


def test_concat_equals_scikit_learn_on_the_layers_around_the_best(tmp_path):
    module = deep_probe(c=0.1, concat=3)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, noisy_loader(300), noisy_loader(90, seed=1))
    found = {"val": trainer.callback_metrics["val/concat_accuracy"].item()}
    found["test"] = trainer.test(module, noisy_loader(80, seed=2), verbose=False)[0]["test/concat_accuracy"]
    middle = min(max(module.best_layer, 1), 4)
    layers = [middle - 1, middle, middle + 1]
    x, y = features_of(module, noisy_loader(300), layers)
    scaler = StandardScaler().fit(x.flatten(1))
    theirs = LogisticRegression(C=0.1, max_iter=5000, tol=1e-7).fit(scaler.transform(x.flatten(1)), y)
    for stage, data in (("val", noisy_loader(90, seed=1)), ("test", noisy_loader(80, seed=2))):
        x_new, y_new = features_of(module, data, layers)
        assert found[stage] == pytest.approx(theirs.score(scaler.transform(x_new.flatten(1)), y_new.numpy()), abs=1e-6)
    assert module.results[-1] == {
        "layer": f"{layers[0]}-{layers[2]}",
        "c": 0.1,
        "val_accuracy": pytest.approx(found["val"]),
        "test_accuracy": pytest.approx(found["test"]),
    }
    again = quiet_trainer(tmp_path).validate(module, noisy_loader(90, seed=1), verbose=False)[0]
    assert again["val/concat_accuracy"] == pytest.approx(found["val"])
    assert not len(module._solver.training) and not len(module._solver.validation)


def test_concat_survives_a_checkpoint(tmp_path):
    module = deep_probe(c=[0.1, 0.01], concat=3)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, noisy_loader(300), noisy_loader(90, seed=1))
    again = ProbeModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert again.results == module.results and again.c_by_layer == module.c_by_layer
    assert again.results[-1]["val_accuracy"] == trainer.callback_metrics["val/concat_accuracy"].item()
    expected = trainer.test(module, noisy_loader(80, seed=2), verbose=False)
    assert quiet_trainer(tmp_path).test(again, noisy_loader(80, seed=2), verbose=False) == expected
    assert "test/concat_accuracy" in expected[0]


def test_concat_without_validation_is_left_out_with_a_warning(tmp_path, caplog):
    module = deep_probe(c=0.1, concat=3)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader())
    assert "concat=3 was not fitted" in caplog.text and not len(module._solver.training)
    assert "test/concat_accuracy" not in trainer.test(module, loader(), verbose=False)[0]
    assert len(module.results) == 6


# --- what a run costs and keeps -------------------------------------------------------------------------------------


def test_one_pass_serves_all_layers_and_goes_no_deeper(tmp_path):
    module = deep_probe(layers=[0, 3], c=1.0)
    calls = []
    for number, block in enumerate(module.network.h):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    quiet_trainer(tmp_path, max_epochs=1, num_sanity_val_steps=0).fit(module, loader(32), loader(16))
    assert calls == [0, 1, 2] * 6  # 4 batches of training, 2 of validation


def test_files_change_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "features"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    probes = [
        deep_probe(layers=[0, 2, 5], c=[0.01, 0.1], concat=3, max_feature_bytes=limit)
        for limit in (2**20, 3 * 3 * 16 * 4 * 50, 0)
    ]
    for module in probes:
        quiet_trainer(tmp_path, max_epochs=1).fit(module, noisy_loader(300), noisy_loader(90, seed=1))
        assert module.results == probes[0].results
        for name, value in module.state_dict().items():
            assert torch.equal(value, probes[0].state_dict()[name]), name
    assert not list(folder.iterdir())


@pytest.mark.parametrize("fails_at", [1, 2])
def test_an_error_frees_the_features(tmp_path, monkeypatch, fails_at):
    """In the fit of the layers, or in that of the layers together."""
    original, calls = lbfgs.fit_heads, []

    def fit_heads(store, *args, **options):
        calls.append(store.on_disk)
        if len(calls) == fails_at:
            raise MemoryError("no room")
        return original(store, *args, **options)

    monkeypatch.setattr(lbfgs, "fit_heads", fit_heads)
    module = probe(concat=3, c=1.0, max_feature_bytes=0)
    with pytest.raises(MemoryError):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, loader(), loader())
    assert calls == [True] * fails_at
    assert not module._solver.training.on_disk and not len(module._solver.validation)


def test_an_image_that_comes_twice_counts_once(tmp_path, caplog):
    rows = list(noisy_loader(90).dataset)
    once, twice = probe(c=1.0), probe(c=1.0)
    for module, data in ((once, rows), (twice, rows + rows[:30])):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, DataLoader(data, 16), noisy_loader(30))
    assert torch.equal(once.weight, twice.weight)
    assert "30 of 120 training images came before" in caplog.text


def test_bad_validation_labels_are_found_before_the_pass(tmp_path):
    module = probe()
    with pytest.raises(ValueError, match="labels run from 0 to 3"):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, loader(), loader(classes=4))
    assert not module.weight.any() and not len(module._solver.training)


def test_a_pass_that_was_cut_off_is_not_continued(tmp_path):
    class CutOff(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    quiet_trainer(tmp_path, max_epochs=1, callbacks=[CutOff()]).fit(probe(), loader())
    with pytest.raises(ValueError, match="cut off after 2 batches, before the fit"):
        quiet_trainer(tmp_path, max_epochs=1).fit(probe(), loader(), ckpt_path=tmp_path / "cut.ckpt")
