"""Runs over streams that stop and resume see exactly the images that an uninterrupted twin sees."""

import warnings
from itertools import chain

import datasets
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_igpt.data import FineTuneDataModule, PretrainDataModule
from tests.data.streams import damaged, generator, iterable, mapped, mix, parquet, pictures, single, webdataset
from tests.data.test_resume import Recorder, SaveEverywhere, checkpoints
from tests.image_files import tiny


def fit(source, options, ckpt=None, save_to=None, cls=PretrainDataModule, module=None, **data):
    module = module or Recorder()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[SaveEverywhere(save_to)] if save_to else [], **options,
    )  # fmt: skip
    data = cls(source, **{"batch_size": 4, "image_size": 4, "shuffle_buffer": 5, "streaming": True, **data})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not resumable")
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True if ckpt else None)
    return module.seen


def samples(seen):
    return [sample for sample, _ in chain(*seen)]


RUNS = {
    "endless": {"max_steps": 9, "val_check_interval": 4, "check_val_every_n_epoch": None},
    "accumulating": {
        "max_steps": 3, "accumulate_grad_batches": 3, "val_check_interval": 6, "check_val_every_n_epoch": None,
    },
    "cut short": {"max_steps": 8, "limit_train_batches": 3},
    "epochs": {"max_epochs": 2, "val_check_interval": 2},
    "epochs, accumulating": {"max_epochs": 2, "accumulate_grad_batches": 3},
    "epochs, cut short": {"max_epochs": 3, "limit_train_batches": 3},
    "epochs, loaders made anew": {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 1},
}  # fmt: skip
WITH_WORKERS = ["accumulating", "epochs", "epochs, cut short", "epochs, loaders made anew"]  # of each trait one


@pytest.mark.parametrize("kind", [generator, single, mapped, webdataset, mix], ids=lambda kind: kind.__name__)
def test_resume_from_every_checkpoint(kind, tmp_path):
    stream, options = kind(tmp_path / "set", 26, 3), RUNS["endless"]
    whole = fit(stream, options, save_to=tmp_path / "runs")
    assert len(set(samples(whole))) == 36
    for path, done in checkpoints(tmp_path / "runs")[:: 3 if kind is mix else 1]:
        assert fit(stream, options, ckpt=path) == whole[done:], path.stem


@pytest.mark.parametrize("name, workers", [(name, 0) for name in RUNS] + [(name, 2) for name in WITH_WORKERS])
def test_however_the_run_is_cut_into_epochs(name, workers, tmp_path):
    """Epochs of 5 batches, an odd number, hand readers from one worker to another."""
    options = RUNS[name]
    stream = parquet(tmp_path / "set", 23, 3) if "max_epochs" in options else generator(None, 23, 3)
    whole = fit(stream, options, save_to=tmp_path / "runs", num_workers=workers)
    assert len(set(samples(whole))) == 4 * len(whole)
    for k, batch in enumerate(whole):
        assert workers == 0 or {sample % 2 for sample, _ in batch} == {k % 2}
    found = [(path, done) for path, done in checkpoints(tmp_path / "runs") if resumable(path, options)]
    for path, done in found[::2] if workers == 0 else [found[len(found) // 2]]:
        assert fit(stream, options, ckpt=path, num_workers=workers) == whole[done:], path.stem


def resumable(path, options):
    """Lightning miscounts epochs at the end of one where ``max_steps`` is set, see ``epoch_length``."""
    return path.stem.startswith("step") or "max_epochs" in options or "limit_train_batches" not in options


def test_a_worker_of_its_own_reads_what_the_main_process_reads(tmp_path):
    options, stream = {"max_steps": 9}, generator(None, 26, 3)
    assert fit(stream, options, num_workers=1) == fit(stream, options, save_to=tmp_path)
    assert fit(stream, options, ckpt=tmp_path / "step-4.ckpt", num_workers=1) == fit(stream, options)[4:]


def test_resume_after_an_exception(tmp_path):
    options, stream = {"max_steps": 12}, generator(None, 26, 3)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(stream, options, save_to=tmp_path, module=Recorder(fail_at=6))
    assert fit(stream, options, ckpt=tmp_path / "exception-6.ckpt") == fit(stream, options)[6:]


def test_a_finished_run_can_be_made_longer(tmp_path):
    stream = generator(None, 26, 3)
    fit(stream, {"max_steps": 4}, save_to=tmp_path)
    whole = fit(stream, {"max_steps": 9})
    for path, done in checkpoints(tmp_path):
        assert fit(stream, {"max_steps": 9}, ckpt=path) == whole[done:], path.stem


def test_augmentation_and_bad_images_resume_too(tmp_path):
    options, stream = {"max_steps": 12}, damaged(26, {3, 4, 17})
    options["default_root_dir"] = tmp_path / "logs"
    more = {"cls": FineTuneDataModule, "pad": 2, "on_bad_image": "skip", "max_bad_share": 0.3}
    whole = fit(stream, options, save_to=tmp_path, **more)
    assert len(set(samples(whole))) == 48
    for k in (2, 7, 11):
        assert fit(stream, options, ckpt=tmp_path / f"step-{k}.ckpt", **more) == whole[k:]


def test_what_a_checkpoint_holds(tmp_path):
    fit(generator(None, 26, 3), {"max_steps": 6}, save_to=tmp_path)
    state = torch.load(tmp_path / "step-5.ckpt", weights_only=True)["PretrainDataModule"]
    (((place,),)) = (state.pop("stream"),)
    assert state == {"batches_done": 5, "seed": 0, "shuffle_buffer": 5, "val_fraction": 0.1, "shards": 3}
    assert [set(reader) for reader in place] == [{"number_of_pass", "block", "state", "offset", "n_rows"}]
    assert place[0]["n_rows"] == 20


def test_other_readers_begin_the_next_pass(tmp_path):
    """With other workers; from none to two, and back."""
    stream, options = generator(None, 26, 4), {"max_steps": 9}
    before = {workers: fit(stream, options, save_to=tmp_path / str(workers), num_workers=workers) for workers in (0, 2)}
    for old, new in ((0, 2), (2, 0)):
        with pytest.warns(UserWarning, match=r"this run has 1 with [12]: the stream begins its next pass"):
            seen = fit(stream, options, ckpt=tmp_path / str(old) / "step-5.ckpt", num_workers=new)
        assert len(seen) == 4 and not set(samples(seen)) & set(samples(before[old][:5]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "seed=0, this run has seed=1: after 2 batches .* Set it as it was, or start a new run"),
        ({"shuffle_buffer": 9}, "shuffle_buffer=5, this run has shuffle_buffer=9"),
        ({"val_fraction": 0.2}, "val_fraction=0.1, this run has val_fraction=0.2"),
        ({"source": generator(None, 26, 4)}, "shards=3, this run has shards=4"),
    ],
)
def test_another_order_is_refused(change, message, tmp_path):
    stream = generator(None, 26, 3)
    fit(stream, {"max_steps": 3}, save_to=tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(**{"source": stream, "options": {"max_steps": 3}, "ckpt": tmp_path / "step-2.ckpt", **change})


def test_a_checkpoint_of_another_kind_of_data_is_refused(tmp_path):
    fit(tiny(26), {"max_steps": 3}, save_to=tmp_path, streaming=False)
    with pytest.raises(ValueError, match="made without streaming, this run streams"):
        fit(tiny(26), {"max_steps": 3}, ckpt=tmp_path / "step-2.ckpt")


def test_another_batch_size_goes_on_where_the_readers_are(tmp_path):
    """Unlike a stored data set, where places are counted in batches."""
    stream = generator(None, 26, 3)
    whole = fit(stream, {"max_steps": 6}, save_to=tmp_path)
    half = fit(stream, {"max_steps": 6}, ckpt=tmp_path / "step-2.ckpt", batch_size=2)
    assert list(chain(*half)) == list(chain(*whole[2:4]))


def test_evaluation_does_not_mind_another_order(tmp_path):
    splits = datasets.IterableDatasetDict(
        train=iterable(None, 26, 3), validation=pictures([1, 2]).to_iterable_dataset()
    )
    fit(splits, {"max_steps": 3}, save_to=tmp_path)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    data = PretrainDataModule(splits, batch_size=2, image_size=4, seed=7)
    trainer.validate(Recorder(), data, ckpt_path=tmp_path / "step-2.ckpt", verbose=False, weights_only=True)
