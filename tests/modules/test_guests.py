"""Other people's loaders, data modules, subclasses, callbacks and launchers with our modules."""

import re
from functools import partial
from types import SimpleNamespace

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from lightning.pytorch.callbacks import BackboneFinetuning, GradientAccumulationScheduler, ModelPruning
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.model_summary import ModelSummary
from omegaconf import OmegaConf
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from lightning_igpt.data import FineTuneDataModule, PretrainDataModule, ProbeDataModule
from lightning_igpt.data.loaders import network_of
from lightning_igpt.modules import FineTuneModule, PretrainModule, ProbeModule
from lightning_igpt.optim import make_adam
from lightning_igpt.trainer import make_trainer
from lightning_igpt.weights.checkpoint import STAMP
from tests.image_files import rows as image_rows
from tests.image_files import tiny
from tests.modules.helpers import BERT, TINY, labelled_images, loader, noisy_loader, quiet_trainer

SMALL = {**TINY.to_dict(), "image_size": 8}


def pretrain(**options):
    torch.manual_seed(0)
    return PretrainModule(TINY, "gray:8", **options)


def finetune(**options):
    torch.manual_seed(0)
    return FineTuneModule(network=TINY, palette="gray:8", **({"num_classes": 3} | options))


def probe(**options):
    torch.manual_seed(0)
    return ProbeModule(network=TINY, palette="gray:8", **({"num_classes": 3, "c": 1.0} | options))


class Rates(Callback):
    """The learning rate of each optimizer step."""

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.all = [*getattr(self, "all", []), optimizer.param_groups[0]["lr"]]


def rates_of(folder, module, data, validate=None, **options):
    rates = Rates()
    trainer = quiet_trainer(folder, callbacks=[rates, *options.pop("callbacks", [])], limit_val_batches=0, **options)
    if validate is not None:
        trainer.limit_val_batches = 1
        trainer.validate(module, datamodule=validate, verbose=False)
        trainer.limit_val_batches = 0
    trainer.fit(module, data)
    return rates.all, trainer


class Foreign(LightningDataModule):
    batches_per_epoch, needs_labels, num_classes, class_names, flips = 3, True, 7, np.array(["a"]), False

    def __init__(self, seed=42, source="theirs", lr=1.0, num_classes=9):
        super().__init__()
        self.save_hyperparameters()

    def on_after_batch_transfer(self, batch, dataloader_idx):  # which summaries pass the example input through
        return {"image": batch["image"].flip(-1), "label": batch["label"]} if self.flips else batch

    def train_dataloader(self):
        return loader(32)

    val_dataloader = test_dataloader = train_dataloader


def test_only_the_data_that_is_trained_on_counts(tmp_path):
    old = PretrainDataModule("digits", batch_size=100, image_size=4)
    expected, _ = rates_of(tmp_path, pretrain(), loader(32), max_epochs=3)
    assert len(expected) == 12 and expected[-1] < 0.05 * max(expected)
    for data, validate in ((loader(32), old), (Foreign(), None)):
        found, trainer = rates_of(tmp_path, pretrain(), data, validate, max_epochs=3)
        assert found == expected
        trainer.limit_val_batches = 1
        trainer.validate(trainer.lightning_module, datamodule=old, verbose=False)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        assert torch.load(tmp_path / "x.ckpt", weights_only=True)[STAMP]["data"] is None
    other = SimpleNamespace(config=SimpleNamespace(image_size=224), palette="openai")  # not a network of ours
    assert network_of(SimpleNamespace(lightning_module=other)) == (None, None)
    module = finetune()
    rates_of(tmp_path, module, Foreign(), max_epochs=1)
    assert module.class_names is None
    with pytest.raises(ValueError, match="cannot infer num_classes"):
        rates_of(tmp_path, probe(num_classes=None), Foreign(), max_epochs=1)


def test_schedules_follow_accumulation_that_changes(tmp_path):
    changing = GradientAccumulationScheduler({0: 1, 1: 4, 2: 3})
    found, _ = rates_of(tmp_path, pretrain(warmup_steps=0), loader(32), max_epochs=3, callbacks=[changing])
    assert found == pytest.approx([0.0015 * (1 + np.cos(np.pi * step / 7)) for step in range(7)])


def test_a_rate_that_is_set_later_counts(tmp_path):
    finder = lightning.pytorch.callbacks.LearningRateFinder(1e-4, 0.9, 40, early_stop_threshold=None)
    found, _ = rates_of(tmp_path, module := pretrain(), loader(320), max_epochs=1, callbacks=[finder])
    assert max(found) == module.lr != 0.003
    module.lr = 0.01
    _, trainer = rates_of(tmp_path / "set", module, loader(8), max_steps=1)
    trainer.fit_loop.epoch_loop.max_steps = 2
    trainer.fit(pretrain(lr=0.02), loader(8), ckpt_path=trainer.checkpoint_callback.best_model_path)
    assert trainer.lr_scheduler_configs[0].scheduler.base_lrs == [0.02, 0.02]


class Endless(IterableDataset):
    def __iter__(self):
        yield from labelled_images(16)[0]


def test_a_loader_without_a_length_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"this loader has no length, .*set max_steps or limit_train_batches"):
        rates_of(tmp_path, pretrain(), DataLoader(Endless(), batch_size=4), max_epochs=2)
    with pytest.raises(ValueError, match="where the run ends"):
        rates_of(tmp_path, pretrain(), loader(8), max_epochs=-1)
    data = DataLoader(Endless(), batch_size=4)
    assert len(rates_of(tmp_path, pretrain(), data, max_epochs=2, limit_train_batches=3)[0]) == 6


class Own(PretrainModule):
    """A subclass with an optimizer and a schedule of its own."""

    make = None

    def __init__(self, note="mine", **options):
        super().__init__(**options)
        self.save_hyperparameters()

    def configure_optimizers(self):
        optimizer = type(self).make(self.network.parameters())
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))]


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.AdamW, lr=0.5, betas=(0.5, 0.6), weight_decay=0.3),
        partial(torch.optim.SGD, lr=0.5, momentum=0.4),
        partial(make_adam, lr=0.5, betas=(0.5, 0.6), weight_decay=0.3),
    ],
)
def test_a_users_optimizer_resumes_as_it_was(tmp_path, monkeypatch, make):
    monkeypatch.setattr(Own, "make", make)
    model = partial(Own, network=TINY, palette="gray:8")
    _, first = rates_of(tmp_path, model(), loader(32), max_steps=2)
    trainer = quiet_trainer(tmp_path, max_steps=4)
    trainer.fit(model(), loader(32), ckpt_path=first.checkpoint_callback.best_model_path)
    _, twin = rates_of(tmp_path, model(), loader(32), max_steps=4)
    for mine, other in zip(*(run.optimizers[0].param_groups for run in (trainer, twin)), strict=True):
        assert mine | {"params": None} == other | {"params": None}


class Stops(Callback):
    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 2:
            raise RuntimeError("broken off")


@pytest.mark.parametrize("make", [pretrain, finetune, probe])
def test_every_evaluation_starts_from_nothing(tmp_path, make):
    module, data, other = make(), noisy_loader(96, batch_size=8), noisy_loader(40, seed=3, batch_size=8)
    options = {"max_epochs": 1, "limit_val_batches": 0}
    quiet_trainer(tmp_path, **options).validate(module, data, verbose=False)
    quiet_trainer(tmp_path, max_epochs=1).fit(module, data, data)  # nothing of inference mode is left to be updated
    expected = quiet_trainer(tmp_path).validate(module, other, verbose=False)
    with pytest.raises(RuntimeError, match="broken off"):
        quiet_trainer(tmp_path, callbacks=[Stops()]).validate(module, data, verbose=False)
    assert quiet_trainer(tmp_path).validate(module, other, verbose=False) == expected
    tensors = [*module.state_dict().values(), *(value for value in vars(module).values() if torch.is_tensor(value))]
    assert not any(tensor.is_inference() for tensor in tensors) and not module.metrics
    both = quiet_trainer(tmp_path).validate(module, [other, data], verbose=False)[0]
    for number, part in enumerate([other, data]):
        for name, value in quiet_trainer(tmp_path).validate(module, part, verbose=False)[0].items():
            if "layer" not in name:
                assert both[f"{name}/dataloader_idx_{number}"] == value
    assert len(quiet_trainer(tmp_path).predict(module, [other, data])) == 2
    assert len(quiet_trainer(tmp_path).test(module, [other, data], verbose=False)) == 2


def test_what_a_launched_process_fitted_comes_back(tmp_path):
    module = ProbeModule(network=SMALL, palette="gray:8", c=1.0, concat=1)
    trainer = quiet_trainer(tmp_path, max_epochs=1, strategy="ddp_fork")
    trainer.fit(module, ProbeDataModule(tiny(40), batch_size=10, image_size=8, val_fraction=0.3))
    assert module.weight.any() and module.num_classes == 2 and module.accuracy_by_layer.keys() == {0, 1, 2}
    again = ProbeModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert again.results == module.results and len(module.results) == 4
    assert all(row["c"] == 1.0 and row["val_accuracy"] is not None for row in module.results)


def test_subclasses_exchange_checkpoints_with_their_base(tmp_path, monkeypatch):
    monkeypatch.setattr(Own, "make", partial(torch.optim.SGD, lr=0.1))
    base, theirs = tmp_path / "base", tmp_path / "theirs"
    rates_of(base, pretrain(), loader(8), max_steps=1)
    (path,) = base.rglob("*.ckpt")
    module = Own(pretrained=str(path))
    rates_of(theirs, module, loader(8), max_steps=1)
    weight, (other,) = module.network.wte.weight.clone(), theirs.rglob("*.ckpt")
    Own.load_from_checkpoint(path), Own(pretrained=str(other))
    quiet_trainer(tmp_path).validate(module, loader(8), ckpt_path=path, verbose=False)
    quiet_trainer(tmp_path).validate(pretrain(), loader(8), ckpt_path=other, verbose=False)
    path.unlink()
    again = Own.load_from_checkpoint(other)
    assert torch.equal(again.network.wte.weight, weight) and again.config == TINY
    with pytest.raises(ValueError, match="a PretrainModule's and the model is a FineTuneModule"):
        quiet_trainer(tmp_path).validate(finetune(), loader(8), ckpt_path=other)


@pytest.mark.parametrize("make", [pretrain, finetune, partial(probe, solver="sgd")])
def test_hyperparameters_of_a_users_data_are_logged_with_ours(tmp_path, make):
    subclass = type("Subclass", (ProbeDataModule,), {})(tiny(40), batch_size=8, seed=42)
    subclass.save_hyperparameters({"seed": 42, "lr": 5.0})
    for data in (Foreign(), subclass):
        logger = CSVLogger(tmp_path)
        quiet_trainer(tmp_path, max_steps=1, logger=logger).fit(make(), data)
        logged = logger.experiment.hparams
        assert logged["seed"] == 42 and logged["model/seed"] == 0 and logged["model/lr"] < logged["lr"]


def test_omegaconf_lists_and_dicts_are_plain(tmp_path):
    given = OmegaConf.create({"betas": [0.8, 0.9], "layers": [0, 2], "names": list("abc"), "keys": {"image": "photo"}})
    network, colors = OmegaConf.create(TINY.to_dict()), OmegaConf.create(pretrain().palette.to_list())
    made = [
        PretrainModule(network, colors, betas=given.betas, keys=given["keys"]),
        FineTuneModule(network=network, palette=colors, num_classes=3, betas=given.betas, class_names=given.names),
        ProbeModule(network=network, palette=colors, layers=given.layers, c=np.array([2, 1]), class_names=given.names),
    ]
    assert made[2].hparams["c"] == [2, 1] and made[2].layers == [0, 2] and made[0].batch_keys == {"image": "photo"}
    assert made[0].tokens_of({"photo": labelled_images(4)[0], "image": ["a.png"] * 4}).shape == (4, 16)
    for module in made:
        options = {"default_root_dir": tmp_path, "logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
        trainer = make_trainer(max_steps=1, callbacks=OmegaConf.create([]), **options)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(tmp_path / "x.ckpt")
        assert "omegaconf" not in repr(torch.load(tmp_path / "x.ckpt", weights_only=True)["hyper_parameters"])


def rows(n=16):
    images, labels = labelled_images(n)
    return {"image": images, "label": labels}


@pytest.mark.parametrize(
    "make", [pretrain, partial(PretrainModule, BERT, "gray:8"), finetune, partial(probe, solver="sgd")]
)
def test_fabric_trains_and_validates(make):
    fabric, module = lightning.Fabric(accelerator="cpu", devices=1), make()
    module.total_steps = 20
    made = module.configure_optimizers()
    wrapped, optimizer = fabric.setup(module, made["optimizer"])
    losses = []
    for step in range(20):
        loss = wrapped.training_step(rows(), step)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        made["lr_scheduler"]["scheduler"].step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})
    module.on_validation_start()
    with torch.no_grad():
        wrapped.validation_step(rows(), 0)
    module.on_validation_epoch_end()
    assert logged.keys() & {"val/nats_per_pixel", "val/accuracy"}


def test_without_a_trainer_modules_say_what_they_need():
    with pytest.raises(ValueError, match="set module"):
        pretrain().configure_optimizers()
    with pytest.raises(ValueError, match="use solver='sgd'"):
        probe().training_step(rows(), 0)
    with pytest.raises(ValueError, match="set num_classes="):
        probe(num_classes=None).training_step(rows(), 0)


class Unfreeze(BackboneFinetuning):
    def on_train_epoch_end(self, trainer, *_):
        self.rates = [group["lr"] for group in trainer.optimizers[0].param_groups]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_callbacks_that_change_parameters_and_groups(tmp_path, schedule):
    pruning = ModelPruning("l1_unstructured", amount=0.5, use_global_unstructured=True, make_pruning_permanent=False)
    quiet_trainer(tmp_path, max_epochs=2, callbacks=[pruning]).fit(module := pretrain(), loader(16))
    assert (module.network.wpe.weight == 0).any()
    unfreeze, module = Unfreeze(1, lambda epoch: 2.0, 0.1), finetune(schedule=schedule, lr=0.01)
    before = module.network.wte.weight.clone()
    quiet_trainer(tmp_path, max_epochs=3, callbacks=[unfreeze]).fit(module, loader(16))
    assert not torch.equal(before, module.network.wte.weight)
    assert unfreeze.rates == pytest.approx([0.01, 0.002] if schedule == "constant" else [0.0, 0.0], abs=2e-3)


def test_soft_labels_train_and_are_not_evaluated_on():
    module, (images, labels) = finetune(generative_weight=0.0), labelled_images(6)
    soft = torch.nn.functional.one_hot(labels, 3).float() * 0.7 + 0.1
    torch.nn.init.normal_(module.head.weight)
    module.log = lambda *args, **kwargs: None
    expected = -(soft * module(images).log_softmax(-1)).sum(1).mean()
    torch.testing.assert_close(module.training_step((images, soft), 0), expected)
    for step, batch, message in (
        (module.validation_step, (images, soft), "probabilities, as of MixUp, are for the training"),
        (probe().training_step, (images, soft), "probabilities, as of MixUp"),
        (module.training_step, (images, soft * 2), "each row adds up to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            step(batch, 0)


@pytest.mark.parametrize("make", [pretrain, finetune, probe])
def test_summaries_count_floating_point_operations(tmp_path, make):
    module = make()
    flops = ModelSummary(module).total_flops
    matrices = [part.weight.numel() for part in module.network.modules() if isinstance(part, torch.nn.Linear)]
    quiet_trainer(tmp_path, max_epochs=1, logger=TensorBoardLogger(tmp_path, log_graph=True)).fit(module, loader(8))
    with_hook = Foreign()
    with_hook.flips = True
    lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, default_root_dir=tmp_path).fit(make(), with_hook)
    head = 0 if make is pretrain else module.network.lm_head.weight.numel()
    assert flops >= 2 * 16 * (sum(matrices) - head)


NAMES = ["cat", "dog", "eel"]


def animals(kind, names, **options):
    """A data module with an image folder's classes; the picture of an animal is its own gray."""
    there = [names[number % len(names)] for number in range(60)]
    grays = {"cat": 20, "dog": 105, "eel": 220, "fox": 70}
    pictures = [Image.new("RGB", (4, 4), (grays[name] + number % 9,) * 3) for number, name in enumerate(there)]
    source = image_rows(pictures, [names.index(name) for name in there], names)
    options = {"pad": 0, "flip": False} | options if kind is FineTuneDataModule else options
    return kind(source, batch_size=15, image_size=4, val_fraction=0.25, **options)


@pytest.mark.parametrize(
    ("make", "kind", "options"),
    [
        (partial(finetune, lr=0.05, generative_weight=0.0), FineTuneDataModule, {"max_epochs": 20}),
        (partial(probe, num_classes=None), ProbeDataModule, {"max_epochs": 1}),
    ],
)
def test_classes_are_matched_by_name(tmp_path, make, kind, options):
    trainer = quiet_trainer(tmp_path, **options)
    trainer.fit(make(), animals(kind, NAMES))
    path = trainer.checkpoint_callback.best_model_path
    for names in (NAMES, ["dog", "eel"], ["eel", "dog", "cat"]):
        for module, ckpt in ((make(), path), (type(make()).load_from_checkpoint(path), None)):
            (found,) = quiet_trainer(tmp_path).validate(module, animals(kind, names), ckpt_path=ckpt, verbose=False)
            assert found["val/accuracy"] == 1.0 and module.class_names == NAMES
        assert len(quiet_trainer(tmp_path).predict(make(), animals(kind, names), ckpt_path=path))
    for names in (["cat", "dog", "fox"], ["fox", "dog"], [*NAMES, "fox"]):
        message = rf"trained on the classes {re.escape(str(NAMES))}, but the data has {re.escape(str(names))}"
        with pytest.raises(ValueError, match=message):
            quiet_trainer(tmp_path).validate(type(make()).load_from_checkpoint(path), animals(kind, names))


def test_a_resumed_run_and_the_users_order_of_classes(tmp_path):
    make, kind = partial(finetune, lr=0.01, generative_weight=0.0), FineTuneDataModule
    trainer = quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0)
    trainer.fit(make(), animals(kind, NAMES))
    path, seen = trainer.checkpoint_callback.best_model_path, []

    def resumed(names, **options):
        module = make(**options)
        module.backward = lambda loss: seen.append(loss.item())
        quiet_trainer(tmp_path, max_epochs=2, limit_val_batches=0).fit(module, animals(kind, names), ckpt_path=path)
        return module

    with pytest.raises(ValueError, match=r"but the data has .*'fox'"):
        resumed(["fox", "dog", "eel"])
    with pytest.raises(ValueError, match=r"num_classes is 4, but the checkpoint has 3 classes, \['cat'"):
        resumed(NAMES, num_classes=4)
    assert resumed(["eel", "dog"]).label_places.tolist() == [2, 1] and seen
    own = make(class_names=["eel", "cat", "dog"])
    quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(own, animals(kind, NAMES))
    assert own.label_places.tolist() == [1, 2, 0] and own.trained_classes == ["eel", "cat", "dog"]
    trained = finetune()  # names of data that was only validated on do not stay
    quiet_trainer(tmp_path).validate(trained, animals(kind, ["dog", "eel", "fox"]), verbose=False)
    quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(trained, animals(kind, NAMES))
    assert trained.class_names == trained.trained_classes == NAMES
    renamed = make(class_names=["x", "y", "z"])  # other names for the same classes
    quiet_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(renamed, animals(kind, NAMES))
    assert renamed.label_places is None and renamed.trained_classes == NAMES and renamed.class_names == ["x", "y", "z"]
