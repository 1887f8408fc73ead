"""Probes find what scikit-learn and torch find on the same features."""

import math
import tempfile

import lightning
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch.utils.data import DataLoader

from lightning_igpt.features import choose_c, fit_logistic
from lightning_igpt.modules import ProbeModule
from lightning_igpt.modules.heads import RunningScale
from lightning_igpt.objectives import draw_mask, majority_vote
from tests.modules.helpers import (
    BERT,
    TINY,
    deep_probe,
    features_of,
    labelled_images,
    loader,
    noisy_loader,
    probe,
    quiet_trainer,
)


def test_accuracy_by_layer_equals_scikit_learn_on_the_same_features(tmp_path):
    module = probe(c=1.0)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader(48, shuffle=True), loader(20))
    trainer.test(module, loader(20), verbose=False)
    images, labels = labelled_images(48)
    test_images, test_labels = labelled_images(20)
    for layer in range(3):
        x, x_test = (
            module.network.features(module.palette.quantize(part), [layer])[:, 0].detach().numpy()
            for part in (images, test_images)
        )
        scaler = StandardScaler().fit(x)
        theirs = LogisticRegression(max_iter=2000).fit(scaler.transform(x), labels)
        expected = theirs.score(scaler.transform(x_test), test_labels.numpy())
        assert module.accuracy_by_layer[layer] == pytest.approx(expected, abs=1e-6)
        ours = module.logits(torch.from_numpy(np.stack([x_test] * 3, 1)))[:, layer].softmax(-1)
        np.testing.assert_allclose(ours, theirs.predict_proba(scaler.transform(x_test)), atol=0.01)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (7, 0.02), (500, 0.5)])
def test_neighbors_vote_as_in_scikit_learn(tmp_path, k, temperature):
    module = probe(solver="knn", k=k, temperature=temperature)
    train, val, test = noisy_loader(200), noisy_loader(90, seed=1), noisy_loader(90, seed=2)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, train, val)
    trainer.save_checkpoint(tmp_path / "knn.ckpt")
    restored = probe(solver="knn", k=k, temperature=temperature)
    logged = quiet_trainer(tmp_path).test(restored, test, ckpt_path=tmp_path / "knn.ckpt", verbose=False)[0]
    (x, y), (x_val, y_val), (x_test, y_test) = (features_of(module, part, [0, 1, 2]) for part in (train, val, test))
    for layer in range(3):
        votes = {"weights": lambda distance: np.exp((1 - distance) / temperature), "metric": "cosine"}
        theirs = KNeighborsClassifier(min(k, 200), **votes).fit(x[:, layer], y)
        assert module.accuracy_by_layer[layer] == pytest.approx(theirs.score(x_val[:, layer], y_val), abs=1e-6)
        assert logged[f"test/layer_{layer}/accuracy"] == pytest.approx(theirs.score(x_test[:, layer], y_test), abs=1e-6)
        ours = module.logits(x_test)[:, layer].softmax(-1)
        np.testing.assert_allclose(ours, theirs.predict_proba(x_test[:, layer]), atol=1e-3)
    assert restored.best_layer == module.best_layer and not module.c_by_layer and "probe/layer_0/c" not in logged


def test_one_epoch_and_metrics_with_the_best_layer(tmp_path):
    module = probe(layers=[0, 2])
    trainer = quiet_trainer(tmp_path, max_epochs=5)
    trainer.fit(module, loader(), loader())
    assert trainer.current_epoch == 1  # one pass, whatever max_epochs says
    metrics = trainer.callback_metrics
    by_layer = {layer: metrics[f"probe/layer_{layer}/accuracy"].item() for layer in (0, 2)}
    assert by_layer == pytest.approx(module.accuracy_by_layer)
    assert metrics["val/accuracy"].item() == pytest.approx(max(by_layer.values()))
    assert module.best_layer == max(by_layer, key=by_layer.get)
    test = quiet_trainer(tmp_path).test(module, loader(), verbose=False)[0]
    assert test["test/accuracy"] == test[f"test/layer_{module.best_layer}/accuracy"]


def test_mixed_precision_touches_the_network_only(tmp_path):
    """Classifiers are fitted and applied in float32, whatever the trainer computes in."""
    module = probe()
    quiet_trainer(tmp_path, max_epochs=1, precision="bf16-mixed").fit(module, loader(), loader())
    with torch.autocast("cpu", torch.bfloat16):
        assert (torch.ones(2, 16) @ module.weight[0].T).dtype == torch.bfloat16
        assert module.logits(torch.ones(2, 3, 16)).dtype == torch.float32


def test_the_network_is_frozen_and_in_evaluation_mode(tmp_path):
    module = ProbeModule(network={**TINY.to_dict(), "dropout": 0.5}, palette="gray:8", num_classes=3)
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    quiet_trainer(tmp_path, max_epochs=1).fit(module, loader(), loader())
    assert all(torch.equal(before[name], value) for name, value in module.network.state_dict().items())
    module.train()
    assert not module.network.training
    assert not any(parameter.requires_grad for parameter in module.network.parameters())


def test_wrong_use_says_so(tmp_path):
    with pytest.raises(ValueError, match="one or more from 0 to 2"):
        probe(layers=[3])
    module = ProbeModule(network=TINY, palette="gray:8")
    with pytest.raises(ValueError, match="cannot infer num_classes"):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, loader())
    with pytest.raises(ValueError, match="has no labels"):
        quiet_trainer(tmp_path, max_epochs=1).fit(probe(), torch.utils.data.DataLoader(labelled_images()[0], 8))
    with pytest.raises(ValueError, match="a probe needs two classes"):
        quiet_trainer(tmp_path, max_epochs=1).fit(probe(), loader(classes=1))


def test_without_validation_no_layer_is_picked(tmp_path):
    module = probe()
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader())
    test = trainer.test(module, loader(), verbose=False)[0]
    assert "test/layer_2/accuracy" in test and "test/accuracy" not in test
    for picked in (lambda: module.best_layer, lambda: trainer.predict(module, loader())):
        with pytest.raises(ValueError, match="no layer was picked"):
            picked()
    single = probe(layers=[1])
    quiet_trainer(tmp_path, max_epochs=1).fit(single, loader())
    assert single.best_layer == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"c": 0.0}, "c is 0.0; it must be above 0"),
        ({"c": [1.0, -1.0]}, "c is -1.0; it must be above 0"),
        ({"c": []}, "c is an empty list"),
        ({"solver": "adam"}, "solver is 'adam'; it must be 'lbfgs', 'sgd' or 'knn'"),
        ({"k": 0}, "k is 0; it must be above 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"max_feature_bytes": -1}, "max_feature_bytes is -1; it must be 0 or more"),
        ({"n_masks": 0}, "n_masks is 0; it must be above 0"),
        ({"concat": 2}, "concat is 2; it must be an odd number"),
        ({"concat": 5}, "concat is 5, but the probed layers are 3"),
        ({"concat": 3, "solver": "sgd"}, "concat=3 needs a fit to all features, which solver='sgd' has not"),
        ({"layers": "al"}, "'all', or a list"),
        ({"layers": 1}, "'all', or a list"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        probe(**options)


def bert_probe(**options):
    torch.manual_seed(0)
    return ProbeModule(network=BERT, palette="gray:8", num_classes=3, mask_ratio=0.5, seed=5, c=0.1, **options)


def test_votes_and_mean_probabilities_equal_one_mask_after_another(tmp_path):
    module = bert_probe(n_masks=4, concat=1)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    data, val = noisy_loader(300), noisy_loader(90, seed=1, start=1000)
    trainer.fit(module, data, val)
    masks = [
        lambda samples, number=number: draw_mask(samples, 16, seed=5 + 1_000_003 * number, ratio=0.5)
        for number in range(4)
    ]
    x, y = features_of(module, data, [0, 1, 2], masks[0])  # in training the first mask alone
    expected, probabilities = {}, {}
    for layer in range(3):
        weight, bias = fit_logistic(x[:, layer], y, 3, c=0.1)
        torch.testing.assert_close(module.weight[layer], weight, rtol=1e-3, atol=1e-3)
        logits = [features_of(module, val, [layer], mask)[0][:, 0] @ weight.T + bias for mask in masks]
        votes = majority_vote(torch.stack([one.argmax(1) for one in logits]), torch.arange(1000, 1090), 3, seed=5)
        expected[layer] = (votes == torch.arange(90) % 3).float().mean().item()
        probabilities[layer] = torch.stack([one.softmax(1) for one in logits]).mean(0)
    assert module.accuracy_by_layer == pytest.approx(expected)
    assert module.results[-1]["val_accuracy"] == pytest.approx(expected[module.best_layer])  # concat of one layer
    test = quiet_trainer(tmp_path).test(module, val, verbose=False)[0]
    assert test["test/concat_accuracy"] == pytest.approx(expected[module.best_layer])
    found = torch.cat(quiet_trainer(tmp_path).predict(module, val))
    torch.testing.assert_close(found, probabilities[module.best_layer], rtol=1e-3, atol=1e-3)


def test_results_have_a_row_per_layer(tmp_path):
    module = probe(layers=[2, 0], c=1.0)
    empty = {"c": None, "val_accuracy": None, "test_accuracy": None}
    assert module.results == [{"layer": 2, **empty}, {"layer": 0, **empty}]
    assert module.accuracy_by_layer == module.c_by_layer == {}
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, noisy_loader(300), noisy_loader(90, seed=1))
    val = module.accuracy_by_layer
    again = ProbeModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    test = quiet_trainer(tmp_path).test(again, noisy_loader(80, seed=2), verbose=False)[0]
    for row, layer in zip(again.results, (2, 0), strict=True):
        tested = pytest.approx(test[f"test/layer_{layer}/accuracy"])
        assert row == {"layer": layer, "c": 1.0, "val_accuracy": val[layer], "test_accuracy": tested}
    assert again.accuracy_by_layer == {row["layer"]: row["test_accuracy"] for row in again.results}


def test_a_second_fit_begins_anew(tmp_path):
    module = probe(c=1.0, concat=1)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, noisy_loader(90), noisy_loader(30, seed=1))
    quiet_trainer(tmp_path).test(module, noisy_loader(30, seed=2), verbose=False)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, noisy_loader(120, seed=3))
    assert all(row["val_accuracy"] is row["test_accuracy"] is None for row in module.results)
    with pytest.raises(ValueError, match="no layer was picked"):
        _ = module.best_layer
    fresh = probe(c=1.0)
    quiet_trainer(tmp_path, max_epochs=1).fit(fresh, noisy_loader(120, seed=3))
    assert torch.equal(module.weight, fresh.weight)


def test_a_checkpoint_without_the_newer_settings_opens(tmp_path):
    module = probe(c=1.0)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader(), loader())
    path = trainer.checkpoint_callback.best_model_path
    checkpoint = torch.load(path)
    del checkpoint["state_dict"]["scores.bits"], checkpoint["state_dict"]["scores.last"]
    for name in ("solver", "concat", "lr", "weight_decay", "mask_inputs", "n_masks", "max_feature_bytes"):
        del checkpoint["hyper_parameters"][name]
    torch.save(checkpoint, path)
    again = ProbeModule.load_from_checkpoint(path)
    assert torch.equal(again.weight, module.weight) and again.best_layer == module.best_layer
    for options, message in (
        ({"layers": [0, 1]}, r"the checkpoint's probe has layers=\[0, 1, 2\], this one layers=\[0, 1\]"),
        ({"solver": "sgd"}, "the checkpoint's probe has solver=lbfgs, this one solver=sgd"),
        ({"concat": 3}, "the checkpoint's probe has concat=None, this one concat=3"),
    ):
        with pytest.raises(ValueError, match=message):
            quiet_trainer(tmp_path).test(probe(**options), loader(), ckpt_path=path)


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
        for ours, expected in ((module.weight[layer], weight), (module.bias[layer], bias)):  # L-BFGS ends near it
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert len(set(module.c_by_layer.values())) > 1
    other = probe(c=[1.0, 0.001, 0.03], seed=1)
    quiet_trainer(tmp_path, max_epochs=1).fit(other, noisy_loader(300), noisy_loader(30, seed=9))
    assert other.c_by_layer == module.c_by_layer  # whatever the validation images


def test_concat_equals_scikit_learn_on_the_layers_around_the_best(tmp_path):
    module = deep_probe(c=0.1, concat=3)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, noisy_loader(300), noisy_loader(90, seed=1))
    found = {"val": trainer.callback_metrics["val/concat_accuracy"].item()}
    again = ProbeModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert again.results == module.results and again.c_by_layer == module.c_by_layer
    test = trainer.test(module, noisy_loader(80, seed=2), verbose=False)
    found["test"] = test[0]["test/concat_accuracy"]
    assert quiet_trainer(tmp_path).test(again, noisy_loader(80, seed=2), verbose=False) == test
    middle = min(max(module.best_layer, 1), 4)
    layers = [middle - 1, middle, middle + 1]
    x, y = features_of(module, noisy_loader(300), layers)
    scaler = StandardScaler().fit(x.flatten(1))
    theirs = LogisticRegression(C=0.1, max_iter=5000, tol=1e-7).fit(scaler.transform(x.flatten(1)), y)
    for stage, data in (("val", noisy_loader(90, seed=1)), ("test", noisy_loader(80, seed=2))):
        x_new, y_new = features_of(module, data, layers)
        assert found[stage] == pytest.approx(theirs.score(scaler.transform(x_new.flatten(1)), y_new.numpy()), abs=1e-6)
    accuracies = {f"{stage}_accuracy": pytest.approx(value) for stage, value in found.items()}
    assert module.results[-1] == {"layer": f"{layers[0]}-{layers[2]}", "c": 0.1} | accuracies
    again = quiet_trainer(tmp_path).validate(module, noisy_loader(90, seed=1), verbose=False)[0]
    assert again["val/concat_accuracy"] == pytest.approx(found["val"])
    assert not len(module._lbfgs.training) and not len(module._lbfgs.validation)


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


def test_an_image_that_comes_twice_counts_once(tmp_path, caplog):
    rows = list(noisy_loader(90).dataset)
    once, twice = probe(c=1.0), probe(c=1.0)
    for module, data in ((once, rows), (twice, rows + rows[:30])):
        quiet_trainer(tmp_path, max_epochs=1).fit(module, DataLoader(data, 16), noisy_loader(30))
    assert torch.equal(once.weight, twice.weight)
    assert "30 of 120 training images came before" in caplog.text


def test_a_pass_that_was_cut_off_is_not_continued(tmp_path):
    class CutOff(lightning.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    quiet_trainer(tmp_path, max_epochs=1, callbacks=[CutOff()]).fit(probe(), loader())
    with pytest.raises(ValueError, match="cut off after 2 batches, before the fit"):
        quiet_trainer(tmp_path, max_epochs=1).fit(probe(), loader(), ckpt_path=tmp_path / "cut.ckpt")


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
    module = probe(solver="sgd", lr=0.3, weight_decay=0.01)
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


def test_a_resumed_run_takes_its_own_rate_and_decay(tmp_path):
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(probe(solver="sgd"), loader(shuffle=True))
    module = probe(solver="sgd", lr=0.5, weight_decay=0.25)
    trainer_two = quiet_trainer(tmp_path, max_epochs=2)
    rates = []
    module.on_train_batch_start = lambda *_: rates.append(trainer_two.optimizers[0].param_groups[0]["lr"])
    trainer_two.fit(module, loader(shuffle=True), ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert rates[0] == pytest.approx(0.25)  # half way down the cosine of 8 steps
    assert [group["weight_decay"] for group in trainer_two.optimizers[0].param_groups] == [0.25, 0.0]


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
