import pytest
import torch
import torch.nn.functional as F

from lightning_igpt.modules import FineTuneModule, PretrainModule
from lightning_igpt.objectives import next_pixel_loss
from tests.modules.helpers import BERT, TINY, labelled_images, loader, quiet_trainer


def finetune(config=TINY, **options):
    torch.manual_seed(0)
    return FineTuneModule(num_classes=3, network=config, palette="gray:8", **options)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_the_loss_is_joint(weight):
    module = finetune(generative_weight=weight).train()
    module.log = lambda *args, **kwargs: None
    for parameter in (module.head.weight, module.network.lm_head.weight):
        torch.nn.init.normal_(parameter)
    images, labels = labelled_images(6)
    loss = module.training_step((images, labels), 0)
    tokens = module.palette.quantize(images)
    hidden = module.network.hidden(tokens)
    classification = F.cross_entropy(hidden.mean(1) @ module.head.weight.T, labels)
    expected = classification + weight * next_pixel_loss(module.network.lm_head(hidden), tokens)
    torch.testing.assert_close(loss, expected)


def test_the_head_starts_at_zero_without_bias():
    module = finetune()
    assert module.head.weight.count_nonzero() == 0 and module.head.bias is None
    assert module(labelled_images(2)).abs().max() == 0


@pytest.mark.parametrize("config", [TINY, BERT])
def test_it_learns_and_reports(tmp_path, config):
    module = finetune(config, lr=0.01)
    trainer = quiet_trainer(tmp_path, max_epochs=25)
    trainer.fit(module, loader(shuffle=True), loader())
    assert trainer.callback_metrics["val/accuracy"] > 0.9  # three levels of brightness
    assert {"train/cross_entropy", "train/nats_per_pixel", "val/cross_entropy"} <= set(trainer.callback_metrics)
    probability = torch.cat(trainer.predict(module, loader()))
    assert ((probability.argmax(1) == labelled_images()[1]).float().mean()) > 0.9
    again = FineTuneModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    torch.testing.assert_close(torch.cat(quiet_trainer(tmp_path).predict(again, loader())), probability)


def test_chain_from_a_checkpoint_and_constant_rate(tmp_path):
    pretrain = PretrainModule(TINY, "gray:8")
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(pretrain, loader())
    module = FineTuneModule(trainer.checkpoint_callback.best_model_path, 3, lr=0.5, warmup_steps=2)
    assert torch.equal(module.network.wte.weight, pretrain.network.wte.weight)
    rates = []
    module.on_train_batch_start = lambda *args: rates.append(module.optimizers().param_groups[0]["lr"])
    quiet_trainer(tmp_path, max_epochs=1).fit(module, loader())
    assert rates == pytest.approx([0.25, 0.5, 0.5, 0.5])


def test_cosine_falls_to_zero_at_the_end_of_the_run(tmp_path):
    module, rates = finetune(lr=1.0, schedule="cosine"), []
    module.on_train_batch_end = lambda *args: rates.append(module.optimizers().param_groups[0]["lr"])
    quiet_trainer(tmp_path, max_epochs=2).fit(module, loader(16))
    assert rates == pytest.approx([0.85355, 0.5, 0.14645, 0.0], abs=1e-4)


def test_evaluation_does_not_depend_on_batching(tmp_path):
    module = finetune()
    torch.nn.init.normal_(module.head.weight)
    found = [quiet_trainer(tmp_path).test(module, loader(20, batch_size), verbose=False)[0] for batch_size in (20, 3)]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_wrong_use_says_so(tmp_path):
    with pytest.raises(ValueError, match="at least 2"):
        FineTuneModule(num_classes=1, network=TINY, palette="gray:8")
    with pytest.raises(ValueError, match="num_classes is 3: 0 to 2"):
        quiet_trainer(tmp_path, max_epochs=1).fit(finetune(), loader(classes=4))
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.fit(PretrainModule(TINY, "gray:8"), loader())
    with pytest.raises(ValueError, match=r"PretrainModule's and the model is a FineTuneModule.*pretrained="):
        quiet_trainer(tmp_path, max_epochs=1).fit(
            finetune(), loader(), ckpt_path=trainer.checkpoint_callback.best_model_path
        )
