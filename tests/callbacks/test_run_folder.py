"""Each run has its own folder, pictures reach it and the logger, and a failing disk does not end the run."""

import csv
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from lightning_igpt.callbacks import CompletionGrid, Preempt, RunRecord
from lightning_igpt.modules import PretrainModule
from lightning_igpt.report import read_runs, write_runs
from lightning_igpt.trainer import make_trainer
from tests.modules.helpers import TINY, loader, quiet_trainer


class Images(Logger):
    """Takes images as Weights & Biases, MLflow or Comet do; raises an error where ``metrics`` is one."""

    name, version, save_dir, metrics = "project", None, None, None

    def __init__(self, kind, version):
        super().__init__()
        self.version, self.run_id, self.seen, self.experiment = version, version, [], self
        if kind == "wandb":
            self.log_image = lambda key, images, step=None: self.seen.append((key, images[0].size, step))
        else:
            self.experiment = type("Client", (), {"log_image": staticmethod(getattr(self, kind))})()
        if kind == "comet":
            del self.run_id

    def mlflow(self, run_id, image, artifact_file=None, *, key=None, step=None):
        self.seen.append((key, image.size, step))

    def comet(self, image_data, name=None, *, step=None):
        self.seen.append((name, image_data.size, step))

    def log_hyperparams(self, *args, **kwargs): ...

    def log_metrics(self, metrics, step=None):
        if self.metrics:
            raise self.metrics


@pytest.mark.parametrize("kind", [None, TensorBoardLogger, CSVLogger, "wandb", "mlflow", "comet"])
@pytest.mark.parametrize("version", ["a3f", 0])
def test_pictures_reach_a_folder_of_their_run_and_the_logger(tmp_path, kind, version):
    for _ in range(2):
        logger = Images(kind, version) if isinstance(kind, str) else kind and kind(tmp_path)
        options = {"max_steps": 1, "limit_val_batches": 1, "log_every_n_steps": 1, "val_check_interval": 1}
        trainer = quiet_trainer(tmp_path, logger=logger, callbacks=[CompletionGrid(2, 1), RunRecord()], **options)
        trainer.fit(PretrainModule(TINY, "gray:8"), loader(), loader())
        if isinstance(logger, Images):
            assert [(key, step) for key, _, step in logger.seen] == [("completions", 1)] and logger.seen[0][1][0] > 128
    folders = [path.parents[1] for path in tmp_path.rglob("completions/step-0000001.png")]
    assert len(folders) == 2
    if isinstance(kind, str):
        run = tmp_path / "project" / (version or "version_0")
        assert sorted(folders) == [run / "pictures", run / "pictures_1"]
        write_runs(tmp_path / "page.html", read_runs(tmp_path))
        assert "Completions at step 0000001" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("kind", [None, TensorBoardLogger, CSVLogger])
def test_runs_that_start_together_have_a_folder_each(tmp_path, kind):
    def logger(**options):
        given = {"logger": kind(tmp_path, **options)} if kind else {}
        return make_trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path, **given).logger

    runs = [logger() for _ in range(4)]
    assert [run.version for run in runs] == [0] * 4 and not list(tmp_path.iterdir())  # none has begun
    folders = [run.experiment and run.log_dir for run in runs]
    assert folders == [str(tmp_path / f"{'lightning_logs/' * bool(kind)}version_{number}") for number in range(4)]
    for version in (2, "mine", 9) if kind else ():
        again = logger(version=version)
        assert again.experiment and again.version == version and Path(again.log_dir).is_dir()


class Outage(Callback):
    """The folder is no folder from step 4 to step 8."""

    def on_train_batch_end(self, trainer, *_):
        folder = Path(trainer.log_dir)
        if trainer.global_step == 4:
            shutil.rmtree(folder)
            folder.write_text("")
        elif trainer.global_step == 8:
            folder.unlink()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_a_disk_that_fails_costs_logs_and_a_warning(tmp_path, kind):
    options = {"flush_logs_every_n_steps": 1} if kind is CSVLogger else {"max_queue": 1, "flush_secs": 0}
    trainer = make_trainer(
        max_steps=12, accelerator="cpu", default_root_dir=tmp_path, enable_progress_bar=False, log_every_n_steps=1,
        logger=kind(tmp_path, **options), callbacks=[ModelCheckpoint(tmp_path), CompletionGrid(2, 1), Outage()],
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(PretrainModule(TINY, "gray:8"), loader(), loader(8))
    lost = [str(one.message) for one in caught if "continues without" in str(one.message)]
    expected = ["", "/completions/step-0000004.png"] + ["/metrics.csv"] * (kind is TensorBoardLogger)
    assert sorted(message.split(" c")[0] for message in lost) == [trainer.log_dir + name for name in expected]
    assert trainer.global_step == 12 and (Path(trainer.log_dir) / "completions" / "step-0000012.png").exists()
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/nats_per_pixel"]]
    assert steps[-4:] == [8, 9, 10, 11] and len(steps) == len(set(steps))


def test_what_was_trained_is_saved_where_a_logger_ends_the_run(tmp_path):
    class Break(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.logger.metrics = ConnectionRefusedError(111, "no server") if trainer.global_step == 3 else None

    module, logger = PretrainModule(TINY, "gray:8"), Images("comet", "a3f")
    trainer = quiet_trainer(tmp_path, max_steps=9, log_every_n_steps=1, logger=logger, callbacks=[Break(), Preempt()])
    with pytest.raises(ConnectionRefusedError):
        trainer.fit(module, loader())
    (path,) = tmp_path.rglob("preempted.ckpt")
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] == 3
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in module.state_dict().items())
