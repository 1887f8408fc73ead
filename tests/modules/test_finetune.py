from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from lightning_igpt.data import FineTuneDataModule
from lightning_igpt.modules import FineTuneModule, PretrainModule
from lightning_igpt.objectives import draw_mask, next_pixel_loss
from tests.modules.helpers import BERT, TINY, labelled_images, loader, quiet_trainer


def finetune(config=TINY, **options):
    torch.manual_seed(0)
    return FineTuneModule(num_classes=3, network=config, palette="gray:8", **options)


def randomized(config=TINY, **options):
    """With heads that are not zero, so that images and masks matter."""
    module = finetune(config, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval()


def numbered(n=24):
    """Batches whose images carry their numbers, as this package's data modules give them."""
    images, labels = labelled_images(n)
    return [{"image": images[i : i + 5], "label": labels[i : i + 5], "sample": torch.arange(i, min(n, i + 5)) + 100}
            for i in range(0, n, 5)]  # fmt: skip


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


def test_each_layer_trains_at_its_own_rate():
    module = finetune(lr=0.01, weight_decay=0.1, layer_decay=0.5)
    optimizer = module.configure_optimizers()["optimizer"]
    found = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    assert len(found) == len(list(module.parameters()))
    depth = {"head": 0, "network.lm_head": 0, "network.ln_f": 0, "network.h.1": 1, "network.h.0": 2,
             "network.wte": 3, "network.wpe": 3, "network.sos": 3}  # fmt: skip
    for name, parameter in module.named_parameters():
        (k,) = (k for prefix, k in depth.items() if name.startswith(prefix))
        group = found[id(parameter)]
        assert group["lr"] == pytest.approx(0.01 * 0.5**k), name
        assert group["weight_decay"] == (0.1 if parameter.ndim == 2 else 0.0), name


def run_and_resume(tmp_path, changes, **options):
    """A module whose run continues one of one epoch, with changed options."""
    trainer = quiet_trainer(tmp_path, max_epochs=1, enable_checkpointing=False)
    trainer.fit(finetune(**options), loader())
    trainer.save_checkpoint(tmp_path / "epoch=0.ckpt")
    resumed = finetune(**options | changes)
    trainer = quiet_trainer(tmp_path, max_epochs=2, enable_checkpointing=False)
    trainer.fit(resumed, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
    return resumed


def test_a_resumed_run_follows_new_settings_layer_by_layer(tmp_path):
    changes = {"lr": 0.03, "weight_decay": 0.2, "betas": (0.8, 0.9)}
    resumed = run_and_resume(tmp_path, changes=changes, lr=0.01, weight_decay=0.1, layer_decay=0.5)
    fresh = finetune(layer_decay=0.5, **changes).configure_optimizers()["optimizer"].param_groups
    for mine, other in zip(resumed.optimizers().param_groups, fresh, strict=True):
        assert all(mine[key] == other[key] for key in ("lr", "weight_decay", "betas", "lr_scale"))


def test_another_layer_decay_is_refused_when_resuming_and_no_matter_when_testing(tmp_path):
    with pytest.raises(ValueError, match=r"layer_decay is 0\.5, but the run to continue has 1\.0"):
        run_and_resume(tmp_path, changes={"layer_decay": 0.5})
    trainer = quiet_trainer(tmp_path)
    trainer.test(finetune(layer_decay=0.5), loader(), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)


class Outputs(Callback):
    """Keeps what the steps of a test return."""

    def __init__(self):
        self.parts = []

    def on_test_batch_end(self, trainer, module, outputs, *rest):
        self.parts.append(outputs)

    def joined(self):
        return {key: torch.cat([part[key] for part in self.parts]) for key in self.parts[0]}


def one_by_one(module, n_masks, n=24):
    """Logits (N, M, C), image by image and mask by mask."""
    rows = []
    for batch in numbered(n):
        for image, sample in zip(batch["image"], batch["sample"], strict=True):
            tokens = module.palette.quantize(image[None])
            for number in range(n_masks):
                masked = draw_mask(sample[None], 16, seed=module.seed + 1_000_003 * number)
                rows.append(module.network.hidden(tokens, masked=masked).mean(1) @ module.head.weight.T)
    return torch.cat(rows).view(n, n_masks, 3)


@torch.no_grad()
@pytest.mark.parametrize("n_masks", [1, 2, 5])
def test_the_vote_of_several_masks_equals_brute_force(tmp_path, n_masks):
    module, outputs = randomized(BERT, n_masks=n_masks, seed=3), Outputs()
    batches = DataLoader(numbered(), batch_size=None)
    metrics = quiet_trainer(tmp_path, callbacks=[outputs]).test(module, batches, verbose=False)[0]
    found, labels = outputs.joined(), labelled_images(24)[1]
    logits = one_by_one(module, n_masks)
    votes = logits.argmax(-1)  # (N, M)
    assert bool((votes != votes[:, :1]).any()) == (n_masks > 1), "masks must matter, or this shows nothing"
    for ballot, said in zip(votes.tolist(), found["prediction"].tolist(), strict=True):
        counts = Counter(ballot)
        assert counts[said] == max(counts.values())
    probabilities = logits.softmax(-1).mean(1)
    torch.testing.assert_close(found["probabilities"], probabilities)
    assert found["probabilities"].dtype == torch.float32
    assert torch.equal(found["label"], labels) and found["label"].dtype == found["prediction"].dtype == torch.int64
    assert metrics["test/accuracy"] == pytest.approx((found["prediction"] == labels).float().mean().item())
    assert metrics["test/cross_entropy"] == pytest.approx(F.nll_loss(probabilities.log(), labels).item(), rel=1e-5)
    torch.testing.assert_close(torch.cat(quiet_trainer(tmp_path).predict(module, batches)), probabilities)
    first = numbered()[0]
    torch.testing.assert_close(module(first).softmax(-1), probabilities[:5])


@torch.no_grad()
def test_without_masked_inputs_whole_images_are_classified(tmp_path):
    module = randomized(BERT, mask_inputs=False, generative_weight=0.0)
    (images, labels), module.log = labelled_images(6), lambda *args, **kwargs: None
    tokens = module.palette.quantize(images)
    hidden = module.network.hidden(tokens, masked=torch.zeros_like(tokens, dtype=torch.bool))
    logits = hidden.mean(1) @ module.head.weight.T
    torch.testing.assert_close(module(images), logits)
    torch.testing.assert_close(module.train().training_step((images, labels), 0), F.cross_entropy(logits, labels))


@pytest.mark.parametrize(
    "options", [{}, {"generative_weight": 0.0}, {"generative_weight": 0.0, "mask_inputs": False}, {"layer_decay": 0.5}]
)
@pytest.mark.parametrize("config", [TINY, BERT])
def test_every_trained_parameter_gets_a_gradient(config, options):
    """Distributed training refuses a parameter that a loss does not reach."""
    module = randomized(config, **options).train()
    module.log = lambda *args, **kwargs: None
    frozen = module.network.lm_head.weight.clone()
    optimizer = module.configure_optimizers()["optimizer"]
    module.training_step(labelled_images(6), 0).backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    assert module.network.lm_head.weight.requires_grad == (module.generative_weight > 0)
    optimizer.step()
    assert torch.equal(module.network.lm_head.weight, frozen) == (module.generative_weight == 0)


@pytest.mark.parametrize("given", [None, list("klmnopqrst")])
def test_classes_are_named_as_in_training_unless_the_user_names_them(tmp_path, caplog, given):
    options = {"num_classes": 10, "network": {**TINY.to_dict(), "image_size": 8}, "palette": "gray:8"}
    trainer, trained = quiet_trainer(tmp_path), FineTuneModule(class_names=list("abcdefghij"), **options)
    trainer.strategy.connect(trained)
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    module = FineTuneModule(class_names=given, **options)
    trainer.test(module, FineTuneDataModule("digits"), ckpt_path=tmp_path / "some.ckpt", verbose=False)
    assert module.class_names == (given or trained.class_names)
    assert ("using the checkpoint's" in caplog.text) == (given is None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_decay": 0.0}, "layer_decay is 0.0; it must be above 0"),
        ({"layer_decay": 1.5}, "layer_decay is 1.5"),
        ({"n_masks": 0}, "n_masks is 0; it must be above 0"),
        ({"mask_inputs": False}, "mask_inputs=False .* generative_weight is 1.0"),
        ({"mask_inputs": False, "generative_weight": 0, "n_masks": 5}, "mask_inputs=False .* n_masks is 5"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"generative_weight": -1.0}, "generative_weight is -1.0"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        finetune(BERT, **options)


@pytest.mark.parametrize("names", [["a"], ["a", "a", "b"], [0, 1, 2], "abc"])
def test_class_names_are_checked_before_training(names):
    with pytest.raises(ValueError, match="class_names"):
        finetune(class_names=names)
