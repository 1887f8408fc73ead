"""What run.json and metrics.csv hold, and what a resumed run is warned of."""

import csv
import json
import subprocess
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from lightning_igpt.callbacks import LearningRate, RunRecord
from lightning_igpt.callbacks.run_record import RECORD
from lightning_igpt.data import PretrainDataModule
from lightning_igpt.modules import FineTuneModule, PretrainModule
from lightning_igpt.palette import Palette
from tests.image_files import tiny
from tests.modules.helpers import quiet_trainer

TINY = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 4, "image_size": 4}


class Plain(LightningModule):
    """A user's module, with hyperparameters that are no JSON."""

    def __init__(self, place=Path("x"), dtype=torch.float32):
        super().__init__()
        self.save_hyperparameters()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, module=None, *, source=26, seed=0, ckpt_path=None, record=True, verb="fit", **options):
    """Five steps, each with a checkpoint; the trainer, and its warnings of differences."""
    torch.manual_seed(0)
    if module is None:
        module = PretrainModule({**TINY, "dropout": 0.5}, "gray:4", warmup_steps=0, seed=seed)
    data = PretrainDataModule(tiny(source), batch_size=4, image_size=4)
    saved = ModelCheckpoint(folder / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_steps": 5, "max_epochs": -1, "limit_val_batches": 1, "log_every_n_steps": 2} | options
    options |= {"val_check_interval": 3, "check_val_every_n_epoch": None}
    trainer = quiet_trainer(folder, callbacks=[RunRecord(), saved] if record else [saved], **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(trainer, verb)(module, data, ckpt_path=ckpt_path)
    return trainer, [str(one.message) for one in caught if "the resumed run differs" in str(one.message)]


def entries(folder):
    return json.loads((folder / "run.json").read_text())["runs"]


def rows(path):
    """Values by (step, metric)."""
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    return {(row["step"], name): float(value) for row in table for name, value in row.items() if value}, table


def test_the_record_holds_what_made_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    fit(tmp_path / "run", seed=3, accumulate_grad_batches=2)
    fit(tmp_path / "run", seed=4)
    first, second = entries(tmp_path / "run")
    assert first["versions"]["torch"] == metadata.version("torch") and first["commit"] == commit
    assert first["module"]["class"] == "PretrainModule" and first["module"]["hparams"]["network"]["n_embd"] == 8
    assert first["data"]["hparams"]["batch_size"] == 4 and first["trainer"]["accumulate_grad_batches"] == 2
    assert first["images"] == {"train_images": 23, "val_images": 3}
    assert first["palette_sha256"] == Palette.load("gray:4").sha256
    assert (first["module_seed"], second["module_seed"], second["data"]["hparams"]["seed"]) == (3, 4, 0)


def test_metrics_are_those_of_lightnings_csv_logger_with_one_row_per_step(tmp_path):
    trainer, _ = fit(tmp_path / "a", logger=TensorBoardLogger(tmp_path / "a", version=""))
    other, _ = fit(tmp_path / "b", logger=CSVLogger(tmp_path / "b", version=""))
    assert [type(logger) for logger in trainer.loggers] == [TensorBoardLogger]
    mine, table = rows(Path(trainer.log_dir) / "metrics.csv")
    assert mine == rows(Path(other.log_dir) / "metrics.csv")[0] and ("1", "train/nats_per_pixel") in mine
    assert len(table) == len({row["step"] for row in table})
    fit(tmp_path / "a", logger=TensorBoardLogger(tmp_path / "a", version=""), verb="validate")
    more, _ = rows(Path(trainer.log_dir) / "metrics.csv")
    assert mine.items() <= more.items() and ("0", "val/nats_per_pixel") in more


def test_rows_of_a_resumed_run_take_the_place_of_those_after_its_checkpoint(tmp_path):
    def run(**options):
        trainer, _ = fit(tmp_path, logger=TensorBoardLogger(tmp_path, version=""), **options)
        return rows(Path(trainer.log_dir) / "metrics.csv")

    whole, table = run()
    again, longer = run(ckpt_path=tmp_path / "ckpt" / "step=3.ckpt")
    assert again == whole and len(longer) == len(table)


def test_a_resumed_run_is_warned_of_what_changed(tmp_path, monkeypatch):
    fit(tmp_path)
    ckpt = tmp_path / "ckpt" / "step=3.ckpt"
    assert fit(tmp_path, ckpt_path=ckpt)[1] == []
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "0.1" if name == "numpy" else version(name))
    _, (warning,) = fit(tmp_path, ckpt_path=ckpt, seed=9)
    assert f"module_seed 0 -> 9, numpy {version('numpy')!r} -> '0.1'" in warning
    monkeypatch.undo()
    _, (warning,) = fit(tmp_path, ckpt_path=ckpt, source=25, precision="bf16-mixed")
    assert "precision '32-true' -> 'bf16-mixed', val_images 3 -> 2" in warning and "seed" not in warning
    kept = torch.load(ckpt, weights_only=True)
    assert str(tmp_path) not in str(kept[RECORD])
    kept[RECORD] |= {"data_source": "\x1b[2J%s{0}"}  # a name is shown, and nothing else
    torch.save(kept, ckpt)
    assert "data_source '\\x1b[2J%s{0}' -> " in fit(tmp_path, ckpt_path=ckpt)[1][0]
    for record in ({}, []):  # of another program
        torch.save(kept | {RECORD: record}, ckpt)
        assert fit(tmp_path, ckpt_path=ckpt, seed=9)[1] == []


def test_training_is_the_same_bit_for_bit(tmp_path):
    states = []
    for record in (True, False):
        trainer, _ = fit(tmp_path / str(record), record=record, logger=TensorBoardLogger(tmp_path / str(record)))
        states.append([*trainer.lightning_module.state_dict().values(), torch.get_rng_state()])
    assert all(map(torch.equal, *states))


@pytest.mark.parametrize("options", [{}, {"fast_dev_run": True}, {"enable_checkpointing": False}])
def test_any_hyperparameter_is_recorded_unless_a_run_keeps_nothing(tmp_path, options):
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[RunRecord()], **options)
    trainer.fit(Plain(), DataLoader(torch.zeros(4)))
    expected = {"class": "Plain", "hparams": {"place": "x", "dtype": "torch.float32"}}
    assert not list(tmp_path.rglob("*.*")) if options else entries(tmp_path)[0]["module"] == expected


@pytest.mark.parametrize(("optimizer", "names"), [("muon", {"lr"}), ("adam", {"lr"}), (None, {"lr/1", "lr/2", "lr/3"})])
def test_a_learning_rate_is_logged_once(optimizer, names, tmp_path):
    if optimizer:
        module = PretrainModule(TINY, "gray:4", optimizer=optimizer)
    else:
        module = FineTuneModule(network=TINY, palette="gray:4", num_classes=2, layer_decay=0.5)
    logger = CSVLogger(tmp_path, version="")
    options = {"max_steps": 3, "log_every_n_steps": 1, "limit_val_batches": 0, "logger": logger}
    trainer = quiet_trainer(tmp_path, callbacks=[LearningRate()], **options)
    batch = {"image": torch.zeros(4, 3, 4, 4, dtype=torch.uint8), "label": torch.zeros(4, dtype=torch.int64)}
    trainer.fit(module, DataLoader([batch] * 3, batch_size=None))
    _, table = rows(Path(trainer.log_dir) / "metrics.csv")
    assert {name for name in table[0] if name.startswith("lr")} == names
