import json
import os
import re
import subprocess
import sys
import warnings
from datetime import datetime, timezone
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_igpt.callbacks import RunRecord, provenance
from lightning_igpt.callbacks.run_record import RECORD, differences, told
from lightning_igpt.data import PretrainDataModule
from lightning_igpt.modules import PretrainModule
from lightning_igpt.palette import Palette
from tests.callbacks.test_provenance import commit
from tests.image_files import save_images, tiny
from tests.modules.helpers import quiet_trainer

TINY = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 4, "image_size": 4}
ALIKE = "not all is as it was"


@pytest.fixture(autouse=True)
def no_repository(tmp_path_factory, monkeypatch):
    """Nothing outside of a test changes what it sees."""
    folder = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(provenance, "PACKAGE", folder)
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)


class Plain(lightning.LightningModule):
    """A user's module, with a palette and no check of it."""

    def __init__(self, palette="gray:4", **hparams):
        super().__init__()
        self.save_hyperparameters(hparams)
        self.palette, self.weight = Palette.load(palette), torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return self.weight * 2

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def pretraining(seed=0, **options):
    torch.manual_seed(0)
    return PretrainModule(TINY, "gray:4", warmup_steps=0, seed=seed, **options)


def fit(folder, module=None, data=None, *, ckpt_path=None, record=True, sought=ALIKE, **options):
    """Three steps, each with a checkpoint; the trainer and its warnings of what is sought."""
    data = PretrainDataModule(tiny(26), batch_size=4, image_size=4) if data is None else data
    saved = ModelCheckpoint(filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {"max_steps": 3, "max_epochs": -1, "limit_val_batches": 0} | options
    own = [RunRecord()] if record else []
    trainer = quiet_trainer(folder, callbacks=[*own, saved], **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(pretraining() if module is None else module, data, ckpt_path=ckpt_path)
    return trainer, [str(one.message) for one in caught if sought in str(one.message)]


def first(folder):
    return str(folder / "checkpoints" / "step=1.ckpt")


def runs(folder):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads((folder / "run.json").read_text(), parse_constant=refuse)["runs"]


def test_the_record_tells_what_made_the_run(tmp_path, monkeypatch):
    repository = commit(tmp_path / "code", a="1")
    monkeypatch.chdir(repository)
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    monkeypatch.setattr(sys, "argv", ["lightning-igpt", "fit", "--hub.token", "abc", "--api_key=def"])
    before = datetime.now(timezone.utc)
    trainer, _ = fit(tmp_path / "run", pretraining(lr=0.5, seed=3), accumulate_grad_batches=2)
    (found,) = runs(tmp_path / "run")
    assert found == trainer.callbacks[0].record
    assert before <= datetime.fromisoformat(found["started"]) <= datetime.now(timezone.utc)
    assert found["command"] == ["lightning-igpt", "fit", "--hub.token", "***", "--api_key=***"]
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]["cores"] == os.cpu_count()
    assert found["hardware"] == {
        "devices": ["cpu"], "world_size": 1, "nodes": 1, "strategy": "SingleDeviceStrategy", "precision": "32-true"
    }  # fmt: skip
    assert found["code"]["working_directory"]["branch"] == "trunk" and found["code"]["package"] is None
    assert found["module"]["class"] == "lightning_igpt.modules.pretrain.PretrainModule"
    assert found["module"]["hparams"]["lr"] == 0.5 and found["module"]["hparams"]["network"]["n_embd"] == 8
    assert found["data"]["hparams"]["batch_size"] == 4 and found["data"]["hparams"]["source"] == "Dataset"
    assert found["data_fingerprint"] == PretrainDataModule(tiny(26)).fingerprint
    assert found["palette_sha256"] == Palette.load("gray:4").sha256
    assert found["seeds"] == {"global": 7, "model": 3, "data": 0}
    assert found["trainer"]["max_steps"] == 3 and found["trainer"]["accumulate_grad_batches"] == 2
    assert found["callbacks"][:2] == ["RunRecord", "ModelCheckpoint"]
    assert found["pretrained"] is None and found["resumed"] is None


def test_where_pretrained_weights_came_from_is_told(tmp_path):
    fit(tmp_path / "one")
    source = tmp_path / "one" / "checkpoints" / "step=3.ckpt"
    fit(tmp_path / "two", PretrainModule(pretrained=str(source)))
    (found,) = runs(tmp_path / "two")
    assert found["pretrained"] == {"origin": "step=3.ckpt (3 steps on Dataset)", **provenance.file_identity(source)}


def test_runs_in_one_folder_are_all_kept(tmp_path):
    fit(tmp_path)
    _, warned = fit(tmp_path, pretraining(lr=0.5), ckpt_path=first(tmp_path))
    one, two = runs(tmp_path)
    assert one["started"] < two["started"] and one["resumed"] is None and len(warned) == 1
    assert two["resumed"]["checkpoint"] == first(tmp_path)
    assert two["resumed"]["differences"] == {"settings": {"model.lr": [0.003, 0.5]}}
    trainer, _ = fit(tmp_path)
    trainer.fit_loop.epoch_loop.max_steps = 4
    trainer.fit(pretraining(), PretrainDataModule(tiny(26), batch_size=4, image_size=4))
    assert len(runs(tmp_path)) == 4


def test_with_a_logger_it_lies_beside_the_logs(tmp_path):
    trainer, _ = fit(tmp_path, logger=lightning.pytorch.loggers.CSVLogger(tmp_path))
    assert list(tmp_path.rglob("run.json")) == [Path(trainer.log_dir) / "run.json"]


def test_without_logs_it_lies_beside_checkpoints_that_have_a_place_of_their_own(tmp_path):
    module, place = Plain(), ModelCheckpoint(tmp_path / "weights")
    trainer = quiet_trainer(".", max_steps=1, callbacks=[RunRecord(), place])
    trainer.fit(module, DataLoader(torch.zeros(4)))
    assert list(tmp_path.rglob("run.json")) == [tmp_path / "weights" / "run.json"] and not list(Path().iterdir())


@pytest.mark.parametrize("options", [{"fast_dev_run": True}, {"enable_checkpointing": False}])
def test_runs_that_keep_nothing_leave_nothing(tmp_path, options):
    quiet_trainer(tmp_path, max_steps=1, callbacks=[RunRecord()], **options).fit(Plain(), DataLoader(torch.zeros(4)))
    assert not list(tmp_path.rglob("*"))


# What differs


def test_nothing_is_told_where_nothing_changed(tmp_path):
    fit(tmp_path)
    _, warned = fit(tmp_path, ckpt_path=first(tmp_path))
    assert not warned and runs(tmp_path)[1]["resumed"]["differences"] == {}


def test_what_changes_no_result_is_not_told(tmp_path):
    folder = save_images(tmp_path / "set", [f"{i}.png" for i in range(26)])
    fit(tmp_path, data=PretrainDataModule(str(folder), batch_size=4, image_size=4, cache_dir="a"))
    folder.rename(tmp_path / "moved")
    data = PretrainDataModule(str(tmp_path / "moved"), batch_size=4, image_size=4, num_workers=1, cache_dir="b")
    _, warned = fit(tmp_path, data=data, ckpt_path=first(tmp_path), log_every_n_steps=1)
    assert not warned


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("version", r"Other code: lightning_igpt: .* -> 9\.9"),
        ("library", r"Results may differ in the last bits: numpy: .* -> None"),
        ("precision", "Results may differ in the last bits: precision: 32-true -> bf16-mixed"),
        ("products", "Results may differ in the last bits: float32_matmul_precision: highest -> high"),
        ("image", r"Other data: fingerprint: \w{12} -> \w{12}"),
        ("commit", r"Other code: commit: \w{12} -> \w{12}"),
        ("uncommitted", r"Other code: uncommitted changes: None -> \w{12}"),
        ("rates", r"Other settings: model.lr: 0.003 -> 0.5, model.betas: \[0.9, 0.95\] -> \[0.5, 0.5\]"),
        ("steps", "Other settings: trainer.max_steps: 3 -> 4"),
        ("seeds", "Other settings: global seed: None -> 5, model seed: 0 -> 8"),
        ("clipping", "Other settings: trainer.gradient_clip_val: None -> 1.0"),
    ],
)
def test_each_change_is_told_by_name(tmp_path, monkeypatch, change, line):
    images = save_images(tmp_path / "images", [f"{i}.png" for i in range(26)])
    repository = commit(tmp_path / "code", a="1")
    monkeypatch.chdir(repository)

    def data():
        return PretrainDataModule(str(images), batch_size=4, image_size=4)

    fit(tmp_path / "run", data=data())
    options, settings = {}, {}
    if change == "version":
        monkeypatch.setattr(provenance, "__version__", "9.9")
    elif change == "library":
        versions = provenance.versions()
        monkeypatch.setattr(provenance, "versions", lambda: versions | {"numpy": None})
    elif change == "precision":
        options["precision"] = "bf16-mixed"
    elif change == "products":
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    elif change == "image":
        (images / "3.png").write_bytes((images / "3.png").read_bytes() + b"\0")
    elif change == "commit":
        commit(repository, a="2")
    elif change == "uncommitted":
        (repository / "a").write_text("2")
    elif change == "rates":
        settings = {"lr": 0.5, "betas": (0.5, 0.5)}
    elif change == "steps":
        options["max_steps"] = 4
    elif change == "seeds":
        monkeypatch.setenv("PL_GLOBAL_SEED", "5")
        settings = {"seed": 8}
    elif change == "clipping":
        options["gradient_clip_val"] = 1.0
    _, (warning,) = fit(tmp_path / "run", pretraining(**settings), data(), ckpt_path=first(tmp_path / "run"), **options)
    head, *lines = warning.split("\n")
    assert "step=1.ckpt" in head and len(lines) == 1
    assert re.fullmatch(line, lines[0]), lines[0]


def test_several_changes_are_one_warning_by_what_they_mean(tmp_path):
    fit(tmp_path, Plain("gray:4", width=3, nested={"depth": 1}))
    module = Plain("gray:5", width=4, nested={"depth": 2})
    _, (warning,) = fit(tmp_path, module, ckpt_path=first(tmp_path), precision="bf16-mixed")
    assert warning.split("\n")[1:] == [
        "Results may differ in the last bits: precision: 32-true -> bf16-mixed",
        f"Other data: palette: {Palette.load('gray:4').sha256[:12]} -> {Palette.load('gray:5').sha256[:12]}",
        "Other settings: model.width: 3 -> 4, model.nested.depth: 1 -> 2",
    ]


def test_only_what_both_tell_is_compared_and_one_repository_told_of_once():
    code = {"commit": "a", "package commit": "a"}
    was = {"bits": {"world_size": 2, "gone": 1}, "code": code, "settings": None, "unknown": {"x": 1}}
    now = {"bits": {"world_size": 1, "new": 1}, "code": dict.fromkeys(code, "b"), "settings": {"x": 1}}
    found = differences(was, now)
    assert found == {"bits": {"world_size": [2, 1]}, "code": {"commit": ["a", "b"]}}
    assert differences(was, now | {"code": {"commit": "a", "package commit": "c"}})["code"] == {
        "package commit": ["a", "c"]
    }
    assert told({"settings": {"names": [["x" * 90], "y"]}}) == f"Other settings: names: ['{'x' * 55}... -> y"


def test_the_checkpoint_holds_plain_values_and_no_path(tmp_path):
    folder = save_images(tmp_path / "set", [f"{i}.png" for i in range(26)])
    fit(tmp_path, Plain(place=str(tmp_path)), PretrainDataModule(str(folder), batch_size=4, image_size=4))
    kept = torch.load(first(tmp_path), weights_only=True)[RECORD]
    assert json.loads(json.dumps(kept, allow_nan=False)) == kept and str(tmp_path) not in json.dumps(kept)
    assert set(kept) == {"bits", "data", "code", "settings"} and kept["bits"]["torch"] == torch.__version__


@pytest.mark.parametrize("damage", [None, "text", [1], {"bits": 3}])
def test_checkpoints_without_a_record_are_no_matter(tmp_path, damage, caplog):
    fit(tmp_path)
    checkpoint = torch.load(first(tmp_path), weights_only=True)
    checkpoint[RECORD] = damage
    torch.save({name: value for name, value in checkpoint.items() if value is not None}, first(tmp_path))
    with caplog.at_level("INFO"):
        _, warned = fit(tmp_path, pretraining(lr=0.5), ckpt_path=first(tmp_path))
    assert not warned
    assert ("nothing is compared" in caplog.text) == (not isinstance(damage, dict))


# What it must not do


def test_training_is_the_same_bit_for_bit(tmp_path):
    def trained(name, record):
        torch.manual_seed(0)
        module = PretrainModule({**TINY, "dropout": 0.5}, "gray:4", lr=0.1, warmup_steps=0)
        data = PretrainDataModule(tiny(26), batch_size=4, image_size=4)
        fit(tmp_path / name, module, data, record=record, limit_val_batches=1.0)
        return module.state_dict(), torch.get_rng_state()

    (weights, numbers), (others, other_numbers) = trained("with", True), trained("without", False)
    assert torch.equal(numbers, other_numbers)
    assert all(torch.equal(weights[name], others[name]) for name in weights | others)


def test_it_rests_outside_of_fit(tmp_path):
    fit(tmp_path / "run")
    data = PretrainDataModule(tiny(26), batch_size=4, image_size=4)
    trainer = quiet_trainer(tmp_path / "other", callbacks=[RunRecord(), ModelCheckpoint()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for verb in (trainer.validate, trainer.predict):
            verb(pretraining(lr=0.5), data, ckpt_path=first(tmp_path / "run"))
    assert not [one for one in caught if ALIKE in str(one.message)] and not list(tmp_path.rglob("other/**/run.json"))
    assert len(runs(tmp_path / "run")) == 1


def test_checkpoints_open_without_it_and_nobody_is_told_to_add_it(tmp_path):
    fit(tmp_path)
    trainer, warned = fit(tmp_path, ckpt_path=first(tmp_path), record=False, sought="RunRecord")
    assert trainer.global_step == 3 and not warned


@pytest.mark.parametrize("content", ["[]", "{", '{"runs": 3}'])
def test_a_file_of_somebody_else_stays(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.warns(UserWarning, match=r"this run is not recorded: .*run.json is there already"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[RunRecord()]).fit(Plain(), DataLoader(torch.zeros(4)))
    assert (tmp_path / "run.json").read_text() == content


def test_a_folder_that_cannot_be_written_is_told_once_and_the_run_goes_on(tmp_path):
    (tmp_path / "run.json").mkdir()
    module = Plain()
    with pytest.warns(UserWarning, match="this run is not recorded"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[RunRecord()]).fit(module, DataLoader(torch.zeros(4)))
    assert module.weight != 0


def test_what_cannot_be_found_out_is_null(tmp_path, monkeypatch):
    def fail():
        raise OSError("no such thing here")

    with monkeypatch.context() as patch:
        for name in ("versions", "machine", "arithmetic", "code"):
            patch.setattr(provenance, name, fail)
        patch.setattr(PretrainDataModule, "fingerprint", property(lambda self: fail()))
        fit(tmp_path)
    (found,) = runs(tmp_path)
    assert found["versions"] is found["machine"] is found["code"] is found["data_fingerprint"] is None
    assert found["module"]["hparams"]["lr"] == 0.003
    _, warned = fit(tmp_path, pretraining(lr=0.5), ckpt_path=first(tmp_path))
    assert warned[0].split("\n")[1:] == ["Other settings: model.lr: 0.003 -> 0.5"]


def test_plain_loaders_have_no_fingerprint(tmp_path):
    quiet_trainer(tmp_path, max_steps=1, callbacks=[RunRecord()]).fit(Plain(), DataLoader(torch.zeros(4)))
    (found,) = runs(tmp_path)
    assert found["data"] is found["data_fingerprint"] is None


SCRIPT = """
import sys
import lightning
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_igpt.callbacks import RunRecord
from lightning_igpt.data import PretrainDataModule
from lightning_igpt.modules import PretrainModule

if __name__ == "__main__":
    devices, steps, ckpt_path = int(sys.argv[1]), int(sys.argv[2]), (sys.argv[3:] or [None])[0]
    network = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 4, "image_size": 8}
    saved = ModelCheckpoint(filename="last", every_n_train_steps=1, enable_version_counter=False)
    trainer = lightning.Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=steps, max_epochs=-1,
        default_root_dir=".", enable_progress_bar=False, enable_model_summary=False, logger=False,
        callbacks=[RunRecord(), saved], limit_val_batches=0,
    )
    trainer.fit(PretrainModule(network, "gray:4"), PretrainDataModule("digits", batch_size=8 // devices),
                ckpt_path=ckpt_path)
"""


@pytest.mark.marathon
@pytest.mark.slow
def test_two_processes_write_once_and_tell_once_that_it_was_one_before(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}

    def run(*words):
        command = [sys.executable, "script.py", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    run("1", "2")
    said = run("2", "4", str(tmp_path / "checkpoints" / "last.ckpt"))
    assert said.count(ALIKE) == 1 and "world_size: 1 -> 2" in said and "Strategy -> DDPStrategy" in said
    assert [found["hardware"]["world_size"] for found in runs(tmp_path)] == [1, 2]
