"""Parts of other libraries: each is tested with ours in a separate process, and the verdicts make a table.

``python docs/other_parts.py [WORD ...] [--write docs/how-to/other-peoples-parts.md]`` tries all parts, or those whose
names have one of the words; what is not installed is skipped.
"""

import argparse
import importlib.metadata
import importlib.util
import io
import logging
import multiprocessing
import os
import tempfile
import warnings
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path

import datasets
import lightning
import numpy as np
import torch
from lightning.pytorch import callbacks, loggers, tuner
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset, default_collate

import lightning_igpt as igpt
from lightning_igpt.callbacks import CompletionGrid

NETWORK = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 16, "image_size": 8}
OURS = {"network": NETWORK, "palette": "gray:16"}
SECONDS = 300
IMAGES = torch.randint(0, 256, (32, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
PAIRS = [(image, number % 10) for number, image in enumerate(IMAGES)]
PICTURES = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in IMAGES]
BATCH = {"image": IMAGES, "label": torch.arange(32) % 10}


def classifier(kind=igpt.FineTuneModule, **options):
    return kind(**OURS, num_classes=10, **options)


def digits(kind=igpt.PretrainDataModule, **options):
    return kind("digits", **{"batch_size": 32, "image_size": 8} | options)


def loader(rows, **options):
    return DataLoader(rows, batch_size=8, **options)


def quiet(folder, maker=igpt.make_trainer, **options):
    silent = {"enable_model_summary": False, "enable_progress_bar": False, "accelerator": "cpu", "devices": 1}
    length = {} if "max_epochs" in options else {"max_steps": 4}
    return maker(**silent | length | {"default_root_dir": folder, "log_every_n_steps": 1} | options)


def fit(folder, module=None, data=None, trainer=None, ckpt_path=None, **options):
    """Train, and check that the weights changed and the loss is finite."""
    module, trainer = module or igpt.PretrainModule(**OURS), trainer or quiet(folder, **options)
    before = module.network.wte.weight.detach().clone()
    trainer.fit(module, digits() if data is None else data, ckpt_path=ckpt_path)
    assert not torch.equal(before, module.network.wte.weight), "the weights did not change"
    assert torch.isfinite(trainer.callback_metrics["train/nats_per_pixel"]), "the loss is not finite"
    return trainer, module


def ends_at_zero(trainer):
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    assert rate < 1e-4, f"the cosine ends at a rate of {rate:.2g}"


def train_on_mixed(name, folder):
    """Train on batches whose labels are probabilities."""
    module, _, kind = name.rpartition(".")
    mix = getattr(importlib.import_module(module), kind)(num_classes=10)
    rows = [(image / 255, label) for image, label in PAIRS]
    fit(folder, classifier(), loader(rows, collate_fn=lambda some: mix(*default_collate(some))))


def log_pictures(logger, folder):
    """Train twice with a logger: the pictures of both runs are files, and the second leaves the first's alone."""
    runs = []
    for _ in range(2):
        grid = CompletionGrid(n_images=1)
        trainer, _ = fit(folder, logger=logger(folder), callbacks=grid, val_check_interval=2, max_steps=2)
        for end in ("finish", "end"):  # of wandb's and of Comet's runs
            getattr(getattr(trainer.logger, "experiment", None), end, lambda: None)()
        runs.append({path: path.stat().st_mtime_ns for path in folder.rglob("*.png")})
    assert runs[0], "no picture is written"
    assert runs[0].items() < runs[1].items(), "the second run overwrites the pictures of the first"


class Methods:
    """A method ``package__what`` raises where the part does not do what it promises, and may return a verdict."""

    def torch__export(folder):
        module = igpt.PretrainModule(**OURS).eval()
        torch.export.export(module, (IMAGES[:2],))
        fit(folder, module)

    def torch__FakeTensorMode(folder):
        module = igpt.PretrainModule(**OURS)
        with suppress(RuntimeError), torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            module(IMAGES)
        fit(folder, module)

    def pytorch_lightning__Trainer(folder):
        from pytorch_lightning import Trainer

        fit(folder, trainer=quiet(folder, Trainer))

    def lightning__LightningCLI(folder):
        from lightning.pytorch.cli import LightningCLI

        words = ["--model=PretrainModule", "--data=PretrainDataModule", "--model.palette=gray:16"]
        words += [f"--model.network.{name}={value}" for name, value in NETWORK.items()]
        cli = LightningCLI(run=False, args=[*words, "--trainer.accelerator=cpu", "--trainer.max_steps=2"])
        fit(folder, cli.model, cli.datamodule, cli.trainer)

    def lightning__EarlyStopping_and_averages(folder):
        stop = callbacks.EarlyStopping("val/nats_per_pixel", patience=1, min_delta=100)
        assert fit(folder, max_epochs=5, callbacks=stop)[0].current_epoch < 5, "training did not stop"
        fit(folder, max_epochs=4, callbacks=callbacks.StochasticWeightAveraging(1e-3))
        fit(folder, callbacks=callbacks.EMAWeightAveraging())

    def lightning__GradientAccumulationScheduler(folder):
        schedule = callbacks.GradientAccumulationScheduler({0: 1, 1: 4})
        ends_at_zero(fit(folder, max_epochs=2, callbacks=schedule)[0])

    def torch__several_validation_loaders(folder):
        module, both = igpt.PretrainModule(**OURS), [loader(TensorDataset(x)) for x in (IMAGES, IMAGES // 2)]
        trainer = quiet(folder, logger=False)
        nats = [trainer.validate(module, one, verbose=False)[0]["val/nats_per_pixel"] for one in both]
        results = trainer.validate(module, both, verbose=False)[0]
        together = [results[f"val/nats_per_pixel/dataloader_idx_{number}"] for number in (0, 1)]
        assert together == nats, "metrics are mixed"

    def onnxruntime__ONNX_export(folder):
        import onnxruntime

        module = igpt.PretrainModule(**OURS).eval()
        module.to_onnx(folder / "x.onnx", (IMAGES,), dynamo=True)
        session = onnxruntime.InferenceSession(folder / "x.onnx")
        (logits,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
        assert np.allclose(logits, module(IMAGES).detach().numpy(), atol=1e-4), "the logits differ from the network's"

    def lightning__LearningRateFinder(folder):
        module = igpt.PretrainModule(**OURS)
        found = tuner.Tuner(quiet(folder, max_epochs=1)).lr_find(module, digits(), num_training=20).suggestion()
        assert module.lr == found, f"lr is {module.lr}, and the suggestion {found}"
        fit(folder, callbacks=callbacks.LearningRateFinder(num_training_steps=20), max_epochs=1)

    def lightning__BatchSizeFinder(folder):
        data = digits(batch_size=8)
        finder = callbacks.BatchSizeFinder(init_val=8, max_trials=3)
        trainer, _ = fit(folder, data=data, max_epochs=1, callbacks=finder)
        at_once = len(next(iter(data.train_dataloader()))["image"])
        assert at_once == data.batch_size, f"batch_size is {data.batch_size}, and a batch has {at_once} images"
        ends_at_zero(trainer)

    def lightning__BackboneFinetuning(folder):
        class Mine(igpt.FineTuneModule):
            backbone = property(lambda self: self.network)

        unfreeze = callbacks.BackboneFinetuning(unfreeze_backbone_at_epoch=1)
        fit(folder, classifier(Mine), digits(igpt.FineTuneDataModule), max_epochs=3, callbacks=unfreeze)

    def lightning__ModelPruning(folder):
        prune = callbacks.ModelPruning("l1_unstructured", amount=0.5, make_pruning_permanent=False)
        _, module = fit(folder, max_epochs=1, callbacks=prune)
        module(IMAGES)
        for name, part in module.named_modules():
            if hasattr(part, "weight_orig"):
                assert torch.equal(part.weight, part.weight_orig * part.weight_mask), f"{name} is not pruned"

    def lightning__RichModelSummary_DeviceStatsMonitor_Timer(folder):
        shown = {"enable_progress_bar": True, "enable_model_summary": True, "profiler": "simple"}
        watchers = [callbacks.RichProgressBar(), callbacks.RichModelSummary(), callbacks.Timer("00:01:00:00")]
        with redirect_stdout(io.StringIO()) as text:
            fit(folder, callbacks=[*watchers, callbacks.DeviceStatsMonitor(True)], **shown)
        totals = [line.split()[-1] for line in text.getvalue().splitlines() if "Total FLOPs" in line]
        assert totals and totals != ["0"], "the summary counts no FLOPs"

    def lightning__Fabric(folder):
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        for module in (igpt.PretrainModule(**OURS), classifier(), classifier(igpt.ProbeModule, solver="sgd")):
            module.total_steps = 1  # without a Trainer, the length of the schedule
            made = module.configure_optimizers()
            model, optimizer = fabric.setup(module, made["optimizer"] if isinstance(made, dict) else made)
            for name in ("training_step", "validation_step"):
                model.mark_forward_method(name)
            loss = model.training_step(BATCH, 0)
            fabric.backward(loss["loss"] if isinstance(loss, dict) else loss)
            optimizer.step()
            model.validation_step(BATCH, 0)

    def lightning__ddp_spawn_and_notebook(folder):
        for strategy in ("ddp_spawn", "ddp_notebook"):
            two = {"strategy": strategy, "devices": 2}
            fit(folder, **two)
            probe, data = classifier(igpt.ProbeModule, layers=[1]), digits(igpt.ProbeDataModule, batch_size=200)
            quiet(folder, max_epochs=1, **two).fit(probe, data)
            assert probe.accuracy_by_layer, f"the probe's results stay in the processes of {strategy}"

    def torchvision__datasets_and_transforms(folder):
        from torchvision.datasets import FakeData
        from torchvision.transforms import v2

        floats = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
        fit(folder, data=loader(FakeData(64, (3, 8, 8), transform=floats)))
        fit(folder, classifier(), loader(FakeData(64, (3, 8, 8), transform=v2.PILToTensor())))

    def kornia__augmentation_on_the_device(folder):
        from kornia.augmentation import AugmentationSequential, ColorJitter, RandomHorizontalFlip

        class Mine(igpt.PretrainModule):
            def on_after_batch_transfer(self, batch, dataloader_idx):
                return augment(batch[0] / 255), batch[1]

        augment = AugmentationSequential(RandomHorizontalFlip(), ColorJitter(0.1, 0.1), data_keys=["input"])
        fit(folder, Mine(**OURS), loader(PAIRS))

    def webdataset__WebLoader(folder):
        import webdataset

        with webdataset.TarWriter(str(folder / "x.tar")) as tar:
            for number, picture in enumerate(PICTURES):
                tar.write({"__key__": f"{number:03}", "png": picture, "cls": number % 10})
        rows = webdataset.WebDataset(str(folder / "x.tar"), shardshuffle=False).decode("torchrgb8")
        for batches in (rows.to_tuple("png", "cls"), rows):
            fit(folder, classifier(), webdataset.WebLoader(batches, batch_size=8))

    def datasets__with_transform_and_with_format(folder):
        rows = datasets.Dataset.from_dict({"image": PICTURES, "label": [label for _, label in PAIRS]})

        def transform(some):
            arrays = [np.moveaxis(np.array(picture), 2, 0) for picture in some["image"]]
            return {"pixel_values": arrays, "labels": some["label"]}

        fit(folder, classifier(), loader(rows.with_transform(transform)))
        features = datasets.Features({"image": datasets.Array3D((3, 8, 8), "uint8")})
        arrays = datasets.Dataset.from_dict({"image": list(IMAGES.numpy())}, features)
        fit(folder, data=loader(arrays.with_format("torch")))

    def datasets__save_to_disk(folder):
        rows = datasets.Dataset.from_dict({"image": PICTURES, "label": [label for _, label in PAIRS]})
        datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "all")
        for split in ("train", "val"):
            rows.save_to_disk(folder / "splits" / split)
        for name in ("all", "splits"):
            fit(folder, classifier(), igpt.FineTuneDataModule(str(folder / name), batch_size=8, image_size=8))

    def datasets__streams(folder):
        rows = datasets.Dataset.from_dict({"image": PICTURES}).to_iterable_dataset(num_shards=2)
        fit(folder, data=igpt.PretrainDataModule(rows, batch_size=8, val_fraction=0.3))
        tensors = rows.map(lambda row: {"image": torch.tensor(np.array(row["image"])).permute(2, 0, 1)})
        try:
            fit(folder, data=loader(tensors.with_format("torch")), max_epochs=1)
        except ValueError as error:
            assert "max_steps" in str(error), f"max_epochs without a length: {error}"

    def torchdata__StatefulDataLoader(folder):
        from torchdata.stateful_dataloader import StatefulDataLoader

        rows = StatefulDataLoader(TensorDataset(IMAGES), batch_size=8)
        fit(folder, data=rows, max_steps=3)
        assert fit(folder, data=rows, max_steps=6, ckpt_path=igpt.find_checkpoint(folder))[0].global_step == 6

    def torchmetrics__MetricCollection(folder):
        from torchmetrics import MetricCollection
        from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

        class Mine(igpt.FineTuneModule):
            def validation_step(self, batch, batch_idx):
                super().validation_step(batch, batch_idx)
                self.more.update(self(batch).softmax(-1), batch["label"])
                self.log_dict(self.more, on_epoch=True)

        module = classifier(Mine)
        module.more = MetricCollection({"val/f1": MulticlassF1Score(10), "val/auroc": MulticlassAUROC(10)})
        fit(folder, module, digits(igpt.FineTuneDataModule), max_epochs=2)

    def transformers__schedule(folder):
        from transformers import get_cosine_schedule_with_warmup

        class Mine(igpt.PretrainModule):
            def configure_optimizers(self):
                optimizer = torch.optim.AdamW(self.parameters(), 5e-4, (0.8, 0.9), weight_decay=0.1)
                schedule = get_cosine_schedule_with_warmup(optimizer, 1, 100)
                return [optimizer], [{"scheduler": schedule, "interval": "step"}]

        fit(folder, Mine(**OURS), max_steps=3)
        resumed, _ = fit(folder, Mine(**OURS), max_steps=5, ckpt_path=igpt.find_checkpoint(folder))
        group = resumed.optimizers[0].param_groups[0]
        kept = group["initial_lr"], *group["betas"], group["weight_decay"]
        assert kept == (5e-4, 0.8, 0.9, 0.1), f"a resumed run has other rates: {kept}"

    def transformers__pipeline(folder):
        from transformers import pipeline

        data = digits(igpt.FineTuneDataModule)
        _, module = fit(folder, classifier(lr=0.01), data, max_steps=60)
        classes = {"head": module.head.weight, "class_names": [str(number) for number in range(10)]}
        igpt.save_pretrained(folder / "x", module.network, module.palette, **classes)
        images = next(iter(data.val_dataloader()))["image"]
        pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
        with suppress(ValueError):
            pipeline("image-classification", str(folder / "x"))(pictures)
            return "fails: it classifies without sos"
        card = (folder / "x" / "README.md").read_text(encoding="utf-8")
        hook = next(code for code in card.split("```python")[1:] if "pre_hook" in code).partition("```")[0]
        exec(hook.replace("path/or/hub-id", str(folder / "x")), names := {"images": pictures})
        theirs = np.array([scores[0]["label"] for scores in names["scores"]])
        share = np.mean(theirs == module.eval()(images).argmax(1).numpy().astype(str))
        assert share == 1, f"only {share:.0%} of the classes are ours"
        return "works with the hook on the model card; stops without it"

    def hydra__OmegaConf_nodes(folder):
        from hydra.utils import instantiate
        from omegaconf import OmegaConf

        node = OURS | {"_target_": "lightning_igpt.PretrainModule", "betas": [0.9, 0.99]}
        fit(folder, instantiate(OmegaConf.create(node)))
        igpt.load_pretrained(igpt.find_checkpoint(folder))
        lists = OmegaConf.create({"layers": [1, 2], "palette": igpt.Palette.load("gray:16").to_list()})
        igpt.ProbeModule(network=OmegaConf.create(NETWORK), num_classes=10, **lists)

    def optuna_integration__pruning(folder):
        import optuna
        from optuna_integration import PyTorchLightningPruningCallback

        def objective(trial):
            prune = PyTorchLightningPruningCallback(trial, monitor="val/nats_per_pixel")
            fit(folder, callbacks=prune, val_check_interval=2, logger=False)

        study = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(upper=0.1))
        study.optimize(objective, n_trials=1)
        assert study.trials[0].state.name == "PRUNED"


LOGGERS = {  # the first word of a name is the package
    "lightning: no logger": lambda folder: False,
    "lightning: CSVLogger": lambda folder: loggers.CSVLogger(folder),
    "tensorboard: TensorBoardLogger": lambda folder: loggers.TensorBoardLogger(folder),
    "mlflow: MLFlowLogger": lambda folder: loggers.MLFlowLogger(tracking_uri=f"sqlite:///{folder}/mlflow.db"),
    "wandb: WandbLogger, offline": lambda folder: loggers.WandbLogger(offline=True, save_dir=folder),
    "comet_ml: CometLogger, offline": lambda folder: loggers.CometLogger(online=False, offline_directory=str(folder)),
}
MIXES = ("torchvision.transforms.v2.MixUp", "torchvision.transforms.v2.CutMix", "timm.data.Mixup")
PARTS = {name: partial(log_pictures, make) for name, make in LOGGERS.items()}
PARTS |= {f"{name.partition('.')[0]}: {name.rpartition('.')[2]}": partial(train_on_mixed, name) for name in MIXES}
PARTS |= {
    name.replace("__", ": ").replace("_", " "): part for name, part in vars(Methods).items() if "__" in name[1:-2]
}


def try_part(name):
    """(version, verdict) of a part, tried in a process of its own."""
    module = name.partition(":")[0].replace(" ", "_")
    if importlib.util.find_spec(module) is None:
        return "", "not installed"
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=child, args=(PARTS[name], queue))
    process.start()
    process.join(SECONDS)
    verdict = "fails: the process died" if queue.empty() else queue.get()
    if process.is_alive():
        process.kill()
        verdict = f"fails: not finished after {SECONDS} s"
    return importlib.metadata.version(importlib.metadata.packages_distributions()[module][0]), verdict


def child(part, queue):
    """Put the verdict of a part into a queue."""
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        os.chdir(folder)
        try:
            verdict = part(Path(folder))
        except BaseException as error:
            first = str(error).strip().partition("\n")[0].replace("|", "/").replace(folder, "FOLDER")
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            verdict = f"fails: {kind}{first[:160]}"
        os.chdir("/")
    queue.put(verdict if isinstance(verdict, str) else "works")


def main(words=None):
    """Print the table, and write it into a page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--write", type=Path, help="the page whose table is replaced")
    options = parser.parse_args(words)
    names = [name for name in PARTS if not options.words or any(word in name for word in options.words)]
    rows = ["| part | version | verdict |", "|---|---|---|"]
    for name in names:
        rows.append(f"| {' | '.join((name, *try_part(name)))} |")
        print(rows[-1], flush=True)
    if options.write:
        head, _, rest = options.write.read_text(encoding="utf-8").partition("| part |")
        options.write.write_text(head + "\n".join(rows) + "\n" + rest.rpartition("|\n")[2], encoding="utf-8")


if __name__ == "__main__":
    main()
