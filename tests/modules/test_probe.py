import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from lightning_igpt.modules import PretrainModule, ProbeModule
from tests.modules.helpers import BERT, TINY, labelled_images, loader, quiet_trainer


def probe(**options):
    torch.manual_seed(0)
    return ProbeModule(network=TINY, palette="gray:8", num_classes=3, **options)


def test_accuracy_by_layer_equals_scikit_learn_on_the_same_features(tmp_path):
    module = probe()
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
        expected = theirs.score(scaler.transform(x_test), test_labels)
        assert module.accuracy_by_layer[layer] == pytest.approx(expected, abs=1e-6)
        ours = module._logits(torch.from_numpy(np.stack([x_test] * 3, 1)))[:, layer].softmax(-1)
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
        features, _ = module._features(next(iter(loader())), 0)
        assert features.dtype == torch.float32
        expected = torch.stack([features[:, i] @ module.weight[i].T for i in range(3)], 1).dtype
        assert expected == torch.bfloat16 and module._logits(features).dtype == torch.float32


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
        ({"layers": "al"}, "'all' or a list"),
        ({"layers": 1}, "'all' or a list"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        probe(**options)
