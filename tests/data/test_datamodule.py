from itertools import chain, islice

import datasets
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from lightning.pytorch.tuner import Tuner

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.data import FineTuneDataModule, PretrainDataModule, ProbeDataModule
from lightning_igpt.data.datamodule import ImageDataModule
from lightning_igpt.data.folders import DamagedDataError
from lightning_igpt.data.order import EndlessOrder
from lightning_igpt.modules import PretrainModule
from tests.image_files import noise, picture, rows, tiny

ALL = [PretrainDataModule, ProbeDataModule, FineTuneDataModule]


def ready(cls, source="digits", **options):
    data = cls(source, **options)
    data.prepare_data()
    data.setup("fit")
    return data


def column(loader, key="sample"):
    return torch.cat([batch[key] for batch in loader])


class Looker(LightningModule):
    """Trains on nothing and remembers what it is given."""

    def __init__(self, image_size=8):
        super().__init__()
        self.config = ImageGPTConfig(n_layer=1, n_head=1, n_embd=8, image_size=image_size)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        return batch["sample"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options):
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, **options,
    )  # fmt: skip


@pytest.mark.parametrize("cls", ALL)
def test_batches_of_every_protocol(cls):
    data = ready(cls, batch_size=100, image_size=8)
    assert (data.num_classes, data.class_names[3], data.batches_per_epoch) == (10, "3", 12)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        batch = next(iter(loader))
        assert batch["image"].dtype == torch.uint8 and batch["image"].shape[1:] == (3, 8, 8)
        assert batch["label"].dtype == batch["sample"].dtype == torch.int64
        assert len(batch["image"]) == len(batch["label"]) == len(batch["sample"]) <= 100
    for loader, n in ((data.val_dataloader(), 144), (data.test_dataloader(), 360)):
        assert column(loader).tolist() == list(range(n))


def test_training_and_validation_share_no_image_and_labels_follow():
    for cls in ALL:
        data = ready(cls, tiny(30), batch_size=3, image_size=8)
        for loader in (data.train_dataloader(), data.val_dataloader()):
            for batch in loader:
                assert torch.equal(batch["image"][:, 0, 0, 0] % 2, batch["label"])
        train = set(column(data.train_dataloader(), "image")[:, 0, 0, 0].tolist())
        val = set(column(data.val_dataloader(), "image")[:, 0, 0, 0].tolist())
        assert len(train) == 27 and len(val) == 3 and not train & val


def test_augmentation_of_fine_tuning():
    images = rows([noise((8, 8), 1)] * 20, [0, 1] * 10)
    for options, kinds in (({}, range(6, 19)), ({"pad": 0, "flip": False}, [1]), ({"pad": 0}, [2])):
        data = ready(FineTuneDataModule, images, batch_size=6, image_size=8, **options)
        assert len(column(data.train_dataloader(), "image").unique(dim=0)) in kinds
        assert len(column(data.val_dataloader(), "image").unique(dim=0)) == 1
    with pytest.raises(ValueError, match=r"pad is 8, but .*\(8\)"):
        ready(FineTuneDataModule, images, batch_size=6, image_size=8, pad=8).train_dataloader()


def test_a_partial_batch_of_evaluation_and_the_size_of_a_loader():
    data = PretrainDataModule(tiny(30), batch_size=8, image_size=4, val_fraction=0.3, cache="auto")
    module = Looker()
    trainer(max_steps=2, accumulate_grad_batches=2).fit(module, data)
    assert [len(batch["image"]) for batch in module.seen["train"]] == [4] * 4
    assert data.batches_per_epoch == 4 and data.trainer.train_dataloader.batch_size == 4
    assert sorted(column(data.val_dataloader()).tolist()) == list(range(9))
    assert max(len(batch["sample"]) for batch in data.val_dataloader()) <= 4


def test_image_size_is_the_networks():
    module, data = Looker(image_size=6), PretrainDataModule(tiny(30), batch_size=9)
    trainer(max_steps=2).fit(module, data)
    assert {batch["image"].shape for batch in module.seen["train"]} == {(9, 3, 6, 6)}
    assert {batch["image"].shape for batch in module.seen["val"]} == {(3, 3, 6, 6)}
    assert next(iter(ready(PretrainDataModule, tiny(30), batch_size=9).train_dataloader()))["image"].shape[-1] == 32


def test_pretraining_needs_no_labels():
    bare = ready(PretrainDataModule, rows([picture(i) for i in range(9)]), batch_size=2, image_size=4)
    assert "label" not in next(iter(bare.train_dataloader())) and bare.num_classes is None
    hidden = ready(PretrainDataModule, rows([picture()] * 4, [0, 1, -1, 0]), batch_size=2, image_size=4)
    assert "label" not in next(iter(hidden.train_dataloader()))


@pytest.mark.parametrize("cls", [ProbeDataModule, FineTuneDataModule])
def test_bad_labels_stop_before_training(cls):
    images = [picture(i) for i in range(9)]
    for source, message in (
        (rows(images), "has no labels"),
        (rows(images, [0] * 9), "a single class"),
        (rows(images, [0, 1, -1] * 3), "hidden"),
        (rows(images, [0, 1, None] * 3), "has no 'label'"),
    ):
        with pytest.raises(ValueError, match=message):
            ready(cls, source)


def test_hidden_test_labels_do_not_stop_training():
    splits = datasets.DatasetDict(train=tiny(9), test=rows([picture()] * 3, [-1] * 3))
    data = ready(FineTuneDataModule, splits, batch_size=2, image_size=4, pad=1)
    assert "label" in next(iter(data.train_dataloader()))
    assert "label" not in next(iter(data.predict_dataloader()))
    with pytest.raises(ValueError, match=r"split 'test' .*hidden"):
        data.test_dataloader()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"image_size": 0}, "image_size is 0"),
        ({"cache": "dsik"}, "cache is 'dsik'"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"val_fraction": -0.1}, "val_fraction is -0.1"),
        ({"max_bad_share": 1.5}, "max_bad_share is 1.5"),
        ({"on_bad_image": "drop"}, "on_bad_image is 'drop'"),
        ({"shuffle_buffer": 0}, "shuffle_buffer is 0"),
        ({"n_crops": 0}, "n_crops is 0"),
        ({"n_crops": 3}, "n_crops is 3, .* cache is 'none'"),
        ({"n_crops": 2, "cache": "disk", "random_crop": False}, "n_crops is 2, but random_crop is False"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        PretrainDataModule(**options)
    if "image_size" in options:
        with pytest.raises(ValueError, match=r"pad is -1"):
            FineTuneDataModule(pad=-1)


class Lines(Callback):
    """Sizes of the batches and learning rates of a run."""

    def __init__(self):
        self.sizes, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.sizes.append(len(batch["image"]))
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


@pytest.mark.parametrize("how", ["attribute", "tuner", "finder"])
def test_a_batch_size_set_later_is_that_of_loader_and_schedule(how, tmp_path):
    config = ImageGPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=4, image_size=4)
    module = PretrainModule(network=config, palette="gray:4", warmup_steps=0)
    data, lines, wanted = PretrainDataModule(tiny(30), batch_size=2, val_fraction=0), Lines(), 10
    finder = [BatchSizeFinder(init_val=2)] if how == "finder" else []
    options = {"max_epochs": 4, "accumulate_grad_batches": 2, "default_root_dir": tmp_path}
    run = trainer(**options, callbacks=[*finder, lines])
    if how == "attribute":
        data.batch_size = torch.tensor(wanted).numpy()[()]
    else:  # doubles until all images are in a batch
        wanted = 30
        if how == "tuner":
            assert Tuner(run).scale_batch_size(module, datamodule=data) == wanted
    run.fit(module, data)
    assert lines.sizes == [wanted // 2] * (4 * 30 // wanted * 2)
    assert data.batch_size == data.hparams["batch_size"] == wanted
    assert run.global_step == 4 * 30 // wanted and lines.rates[-1] == 0 < lines.rates[-3]


def test_options_that_divide_the_rows_need_another_setup():
    data = ready(PretrainDataModule, tiny(30), batch_size=4, image_size=4)
    before = column(data.val_dataloader(), "image")
    for value, message in ((0, "at least 1"), ("16", "an integer"), (None, "an integer")):
        with pytest.raises(ValueError, match=f"batch_size is {value!r}; it must be {message}"):
            data.batch_size = value
            data.train_dataloader()
    data.batch_size, data.seed, data.val_fraction = 5, 1, 0.5
    with pytest.raises(RuntimeError, match=r"call setup\(\) before .*, and again after changing source or splits"):
        data.train_dataloader()
    data.setup()
    other = ready(PretrainDataModule, tiny(30), batch_size=5, image_size=4, seed=1, val_fraction=0.5)
    for name in ("train_dataloader", "val_dataloader"):
        images = [column(getattr(each, name)(), "image") for each in (data, other)]
        assert torch.equal(*images)
    assert len(images[0]) == 15 != len(before) and data.hparams == other.hparams


def test_what_cannot_be_opened_is_damaged_or_missing(tmp_path):
    tiny(9).to_parquet(tmp_path / "train.parquet")
    content = (tmp_path / "train.parquet").read_bytes()
    (tmp_path / "train.parquet").write_bytes(content[:4] + bytes(96) + content[100:])
    with pytest.raises(DamagedDataError, match=r"is damaged; .* again\. Couldn't deserialize"):
        PretrainDataModule(tmp_path).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"there is no file or folder .*no$"):
        PretrainDataModule(tmp_path / "no").prepare_data()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("how", ["loader", "loaders", "set_epoch", "fit", "after a fit"])
def test_loaders_without_their_trainer(how, workers):
    """Every epoch has another order and augmentation, the same for everyone, and all rows come."""
    data = FineTuneDataModule(tiny(26), batch_size=5, image_size=8, pad=2, val_fraction=0, num_workers=workers)
    if how == "after a fit":
        trainer(max_steps=3).fit(Looker(), data)
    data.setup("fit")
    steps = EndlessOrder(26, batch_size=5, n_steps=40)
    wanted = [list(chain(*(steps.draws(k) for k in range(e * 5, e * 5 + 5)))) for e in range(8)]
    loader = data.train_dataloader()
    if "fit" in how:
        module = Looker()
        trainer(max_epochs=8).fit(module, loader)
        epochs = [module.seen["train"][i : i + 5] for i in range(0, 40, 5)]
    else:
        epochs = [list(loader if how != "loaders" else data.train_dataloader()) for _ in range(8)]
    assert [[n for batch in e for n in batch["sample"].tolist()] for e in epochs] == [[n for _, n in e] for e in wanted]
    pixels = [torch.cat([batch["image"] for batch in e])[:, 0, 4, 4].tolist() for e in epochs]
    assert len({tuple(e) for e in pixels}) == 8 and pixels == [[row for row, _ in e] for e in wanted]
    assert len(set(chain(*pixels))) == 26
    if how == "set_epoch":
        loader.sampler.set_epoch(3)
        assert [n for batch in loader for n in batch["sample"].tolist()] == [n for _, n in wanted[3]]


def test_a_default_device_changes_nothing():
    def batch():
        data = ready(FineTuneDataModule, "digits", batch_size=4, image_size=8, pad=2)
        return data.train_dataloader().dataset[list(islice(data.train_dataloader().sampler, 4))]

    here = batch()
    with torch.device("meta"):
        there = batch()
    assert all(torch.equal(here[key], there[key]) for key in here)


def test_overfit_batches_is_refused():
    with pytest.raises(TypeError, match=r"overfit_batches"):
        trainer(max_steps=2, overfit_batches=1).fit(Looker(), PretrainDataModule(tiny(30), batch_size=9))


def test_hyperparameters_are_plain_values(tmp_path):
    data = FineTuneDataModule(tiny(30), batch_size=9, pad=2)
    run = trainer(max_steps=2)
    run.fit(Looker(), data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    found = torch.load(tmp_path / "a.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert (found["source"], found["batch_size"], found["pad"]) == ("Dataset", 9, 2)
    again = FineTuneDataModule.load_from_checkpoint(tmp_path / "a.ckpt", source=tiny(30), weights_only=True)
    assert (again.batch_size, again.pad) == (9, 2)


def test_a_source_in_a_recipe_is_text():
    """A class there would let a file import any module."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data")
    name = ["--data=lightning_igpt.data.PretrainDataModule"]
    assert parser.parse_args([*name, "--data.init_args.source=owner/name"]).data.init_args.source == "owner/name"
    with pytest.raises(Exception, match=r"source"):
        parser.parse_args([*name, '--data.init_args.source={"class_path": "pdb.Pdb"}'])
