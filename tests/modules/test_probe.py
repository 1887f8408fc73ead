import lightning
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lightning_igpt.features import fit_logistic
from lightning_igpt.modules import PretrainModule, ProbeModule
from lightning_igpt.objectives import draw_mask, majority_vote
from tests.modules.helpers import BERT, TINY, labelled_images, loader, quiet_trainer
from tests.modules.probing.helpers import accuracy, features_of, noisy_loader, probe


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
    trainer = quiet_trainer(tmp_path, max_epochs=1, precision="bf16-mixed")
    trainer.fit(module, loader(), loader())
    with torch.autocast("cpu", torch.bfloat16):
        features = torch.ones(2, 3, 16)
        expected = torch.stack([features[:, i] @ module.weight[i].T for i in range(3)], 1).dtype
        assert expected == torch.bfloat16 and module.logits(features).dtype == torch.float32


def test_a_probe_without_classifiers_is_not_evaluated(tmp_path):
    for run in (quiet_trainer(tmp_path).test, quiet_trainer(tmp_path).predict):
        with pytest.raises(ValueError, match="not fitted yet"):
            run(probe(), loader())


def test_forward_takes_images_without_labels():
    assert probe()(labelled_images(2)[0]).shape == (2, 3, 3)


def test_the_network_is_frozen_and_in_evaluation_mode(tmp_path):
    module = ProbeModule(network={**TINY.to_dict(), "dropout": 0.5}, palette="gray:8", num_classes=3)
    before = {name: value.clone() for name, value in module.network.state_dict().items()}
    quiet_trainer(tmp_path, max_epochs=1).fit(module, loader(), loader())
    assert all(torch.equal(before[name], value) for name, value in module.network.state_dict().items())
    module.train()
    assert not module.network.training
    assert not any(parameter.requires_grad for parameter in module.network.parameters())


def test_checkpoint_holds_the_classifiers(tmp_path):
    module = probe()
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader(), loader())
    again = ProbeModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert again.num_classes == 3 and again.best_layer == module.best_layer
    expected = torch.cat(quiet_trainer(tmp_path).predict(module, loader()))
    torch.testing.assert_close(torch.cat(quiet_trainer(tmp_path).predict(again, loader())), expected)
    torch.testing.assert_close(expected.sum(1), torch.ones(32))


def test_chain_from_a_pretraining_run_folder(tmp_path):
    torch.manual_seed(0)
    pretrain = PretrainModule(TINY, "gray:8")
    quiet_trainer(tmp_path / "run", max_steps=1).fit(pretrain, loader())
    module = ProbeModule(str(tmp_path / "run"), num_classes=3)
    assert torch.equal(module.network.wte.weight, pretrain.network.wte.weight)
    assert module.palette == pretrain.palette


def test_bert_features_come_from_masked_inputs(tmp_path):
    module = ProbeModule(network=BERT, palette="gray:8", num_classes=3)
    masks = []
    original = module.network.features
    module.network.features = lambda tokens, layers, masked: (
        masks.append(masked) or original(tokens, layers, masked=masked)
    )
    quiet_trainer(tmp_path, max_epochs=1).fit(module, loader(), loader())
    assert 0.05 < torch.cat(masks).float().mean() < 0.25


def test_wrong_use_says_so(tmp_path):
    with pytest.raises(ValueError, match="one or more from 0 to 2"):
        probe(layers=[3])
    module = ProbeModule(network=TINY, palette="gray:8")
    with pytest.raises(ValueError, match="num_classes is unknown"):
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
        ({"solver": "adam"}, "solver is 'adam'; it must be 'lbfgs' or 'sgd'"),
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"max_feature_bytes": -1}, "max_feature_bytes is -1; it must be 0 or more"),
        ({"n_masks": 0}, "n_masks is 0; it must be above 0"),
        ({"concat": 2}, "concat is 2; it must be an odd number"),
        ({"concat": 5}, "concat is 5, but only 3 layers are probed"),
        ({"concat": 3, "solver": "sgd"}, "concat=3 needs the features that solver='sgd' does not keep"),
        ({"layers": "al"}, "'all' or a list"),
        ({"layers": 1}, "'all' or a list"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        probe(**options)


def test_voting_without_masks_is_refused():
    with pytest.raises(ValueError, match=r"mask_inputs=False uses no mask, but n_masks is 5"):
        ProbeModule(network=BERT, palette="gray:8", num_classes=3, mask_inputs=False, n_masks=5)


# --- masks ----------------------------------------------------------------------------------------------------------


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
        torch.testing.assert_close(module.weight[layer], weight)
        logits = [features_of(module, val, [layer], mask)[0][:, 0] @ weight.T + bias for mask in masks]
        votes = majority_vote(torch.stack([one.argmax(1) for one in logits]), torch.arange(1000, 1090), 3, seed=5)
        expected[layer] = (votes == torch.arange(90) % 3).float().mean().item()
        probabilities[layer] = torch.stack([one.softmax(1) for one in logits]).mean(0)
    assert module.accuracy_by_layer == pytest.approx(expected)
    assert module.results[-1]["val_accuracy"] == pytest.approx(expected[module.best_layer])  # concat of one layer
    test = quiet_trainer(tmp_path).test(module, val, verbose=False)[0]
    assert test["test/concat_accuracy"] == pytest.approx(expected[module.best_layer])
    found = torch.cat(quiet_trainer(tmp_path).predict(module, val))
    torch.testing.assert_close(found, probabilities[module.best_layer], rtol=1e-4, atol=1e-5)


def test_whole_images_where_inputs_are_not_masked(tmp_path):
    module = bert_probe(mask_inputs=False)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, noisy_loader(300), noisy_loader(90, seed=1))
    nothing = lambda samples: torch.zeros(len(samples), 16, dtype=torch.bool)  # noqa: E731
    x, y = features_of(module, noisy_loader(300), [0, 1, 2], nothing)
    x_val, y_val = features_of(module, noisy_loader(90, seed=1), [0, 1, 2], nothing)
    for layer in range(3):
        classifier = fit_logistic(x[:, layer], y, 3, c=0.1)
        assert module.accuracy_by_layer[layer] == pytest.approx(accuracy(classifier, x_val[:, layer], y_val))


# --- results and checkpoints ----------------------------------------------------------------------------------------


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
    assert again.results == [
        {
            "layer": layer,
            "c": 1.0,
            "val_accuracy": val[layer],
            "test_accuracy": pytest.approx(test[f"test/layer_{layer}/accuracy"]),
        }
        for layer in (2, 0)
    ]
    assert again.accuracy_by_layer == {row["layer"]: row["test_accuracy"] for row in again.results}


def test_a_second_fit_begins_anew(tmp_path):
    module = probe(c=1.0, concat=1)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, noisy_loader(90), noisy_loader(30, seed=1))
    quiet_trainer(tmp_path).test(module, noisy_loader(30, seed=2), verbose=False)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, noisy_loader(120, seed=3))
    assert (
        [row["val_accuracy"] for row in module.results]
        == [row["test_accuracy"] for row in module.results]
        == [None] * 3
    )
    with pytest.raises(ValueError, match="no layer was picked"):
        _ = module.best_layer
    fresh = probe(c=1.0)
    quiet_trainer(tmp_path, max_epochs=1).fit(fresh, noisy_loader(120, seed=3))
    assert torch.equal(module.weight, fresh.weight)


def test_the_classes_said_are_there_for_callbacks(tmp_path):
    outputs = []

    class Keep(lightning.Callback):
        def on_test_batch_end(self, trainer, module, output, batch, batch_idx):
            outputs.append(output)

    module = probe(c=1.0)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, loader(), loader())
    test = quiet_trainer(tmp_path, callbacks=[Keep()]).test(module, loader(), verbose=False)[0]
    said, labels, likely = (
        torch.cat([out[name] for out in outputs]) for name in ("prediction", "label", "probabilities")
    )
    assert (said == labels).float().mean().item() == pytest.approx(test["test/accuracy"])
    assert torch.equal(said, likely.argmax(1)) and likely.shape == (32, 3)


def test_a_checkpoint_without_the_newer_settings_opens(tmp_path):
    module = probe(c=1.0)
    trainer = quiet_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, loader(), loader())
    path = trainer.checkpoint_callback.best_model_path
    checkpoint = torch.load(path)
    assert {name for name in checkpoint["state_dict"] if not name.startswith("network.")} == {
        "palette_colors",
        "weight",
        "bias",
        "best",
    }
    del checkpoint["probe_results"]
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


def test_a_float64_network_is_probed_in_float32(tmp_path):
    module = probe(c=1.0)
    module.network.double()
    quiet_trainer(tmp_path, max_epochs=1).fit(module, loader(), loader())
    assert module.weight.dtype == torch.float32 and module.best_layer in (0, 1, 2)
