"""A sharded checkpoint is the old one or the new one, whatever ends a save, and loading finds it."""

import json
import logging
import os
import re
import shutil
import textwrap
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.api import CheckpointException

from lightning_igpt.checkpointing import (
    AtomicCheckpointIO,
    AtomicFSDPStrategy,
    AtomicModelParallelStrategy,
    check_complete,
    finish_swaps,
    is_complete,
    with_whole_shards,
)
from lightning_igpt.checkpointing.sharded import standing
from tests import fresh
from tests.modules.helpers import loader
from tests.payload import Payload, was_run, watched  # noqa: F401
from tests.sharding import StockFSDPStrategy, fit, module, process_group, trainer  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]
SHARD = "__0_0.distcp"


def save(path, number, made=AtomicFSDPStrategy, **extra):
    """Save a checkpoint in which everything is ``number``, as one process alone does."""
    values = {"state_dict": {"a": torch.full((4, 3), float(number))}, "optimizer_states": [{"lr": float(number)}]}
    strategy = made(state_dict_type="sharded", parallel_devices=[torch.device("cpu")])
    strategy.save_checkpoint(values | {"epoch": number} | extra, path)


def read(path):
    """The number in all parts of a checkpoint."""
    check_complete(path)
    state = {"model": {"a": torch.zeros(4, 3)}, "optimizer_0": {"lr": 0.0}}
    dcp.load(state, checkpoint_id=path)
    found = {*state["model"]["a"].flatten().tolist(), state["optimizer_0"]["lr"]}
    assert found == {float(torch.load(Path(path) / "meta.pt")["epoch"])}
    return int(found.pop())


class Killed(BaseException):
    """Nothing may tidy up after it, as after a kill."""


def killed_at(step, monkeypatch, path):
    """Save number 2 and die just before the given change to the disk; whether it got that far."""
    left = step

    def dying(real):
        def wrapper(*args, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return real(*args, **options)

        return wrapper

    with monkeypatch.context() as patch:
        for where, name in [(Path, "rename"), (Path, "write_text"), (os, "fsync"), (shutil, "rmtree"), (os, "unlink")]:
            patch.setattr(where, name, dying(getattr(where, name)))
        try:
            save(path, 2)
        except (Killed, CheckpointException):  # torch turns what happens while it writes into its own
            return True
    return False


class TestSaving:
    def test_what_is_saved_is_marked_and_nothing_else_stays(self, tmp_path):
        path = tmp_path / "runs" / "x.ckpt"
        for number in (1, 2):
            save(path, number)
            assert read(path) == number
            assert [file.name for file in path.parent.iterdir()] == ["x.ckpt"]
        mark = json.loads((path / "COMPLETE.json").read_text())
        assert mark["files"] == {name: (path / name).stat().st_size for name in (".metadata", SHARD, "meta.pt")}
        assert set(mark["sha256"]) == {".metadata", "meta.pt"}

    @pytest.mark.parametrize("before", ["nothing", "marked", "lightning"])
    def test_a_kill_at_any_change_to_the_disk(self, tmp_path, monkeypatch, before):
        """Unlike a real kill this one can be put anywhere; the slow test below has real ones."""
        for step in range(100):
            path = tmp_path / str(step) / "x.ckpt"
            if before != "nothing":
                save(path, 1, AtomicFSDPStrategy if before == "marked" else StockFSDPStrategy)
            if not killed_at(step, monkeypatch, path):
                break
            found = standing(path)
            if before != "nothing":
                assert read(found) in (1, 2)
            finish_swaps(path.parent)
            assert not path.exists() or read(path) in (1, 2)
            assert path.exists() or before == "nothing"
            assert {file.name for file in path.parent.iterdir()} <= {"x.ckpt"}
            save(path, 3)
            assert read(path) == 3
        assert 6 < step < 40
        assert read(path) == 2

    def test_a_writer_that_fails_leaves_the_old_one(self, tmp_path, monkeypatch):
        path = tmp_path / "x.ckpt"
        save(path, 1)
        real, left = filesystem._write_item, 1

        def fail(*args, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError("No space left on device")
            return real(*args, **options)

        monkeypatch.setattr(filesystem, "_write_item", fail)
        with pytest.raises(CheckpointException, match="No space left"):
            save(path, 2)
        monkeypatch.undo()
        assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]
        assert read(path) == 1

    def test_what_could_not_be_loaded_is_not_saved(self, tmp_path):
        path = tmp_path / "x.ckpt"
        save(path, 1)
        with pytest.raises(ValueError, match=r"x\.ckpt is not saved.*meta\.pt cannot be opened"):
            save(path, 2, callbacks={"own": Path()})
        assert [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]
        assert read(path) == 1

    def test_folders_that_cannot_be_written_are_named(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="file"):
            save(tmp_path / "file" / "x.ckpt", 1)

    @pytest.mark.parametrize("before", ["file", "link"])
    def test_what_lay_there_before_is_replaced(self, tmp_path, before):
        path = tmp_path / "x.ckpt"
        if before == "file":
            path.write_text("a checkpoint in one file")
        else:
            save(tmp_path / "y.ckpt", 1)
            path.symlink_to("y.ckpt")
        save(path, 2)
        assert read(path) == 2
        assert before == "file" or read(tmp_path / "y.ckpt") == 1

    def test_leftovers_are_removed_and_nothing_else(self, tmp_path):
        save(tmp_path / "x.ckpt", 1)
        for name in (".x.ckpt.shards.tmp", ".x.ckpt.shards.old", ".gone.ckpt.shards.tmp", ".mine.tmp", "y.ckpt"):
            (tmp_path / name).mkdir()
            (tmp_path / name / SHARD).touch()
        save(tmp_path / "x.ckpt", 2)
        kept = {"x.ckpt", ".mine.tmp", "y.ckpt"}
        assert {file.name for file in tmp_path.iterdir()} == kept | {".gone.ckpt.shards.tmp"}
        finish_swaps(tmp_path)
        assert {file.name for file in tmp_path.iterdir()} == kept
        assert read(tmp_path / "x.ckpt") == 2
        finish_swaps(tmp_path / "no such folder")


class TestComplete:
    @pytest.mark.parametrize("name", [".metadata", "meta.pt", SHARD])
    @pytest.mark.parametrize("marked", [True, False])
    def test_missing_and_short_files_are_named(self, tmp_path, name, marked):
        path = tmp_path / "x.ckpt"
        save(path, 1, AtomicFSDPStrategy if marked else StockFSDPStrategy)
        assert is_complete(path)
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[:-400])
        assert not is_complete(path)
        (path / name).unlink()
        with pytest.raises(ValueError, match=rf"x\.ckpt is no whole .* it holds no {re.escape(name)}"):
            check_complete(path)

    @pytest.mark.parametrize("name", [".metadata", "meta.pt"])
    def test_changed_files_are_named(self, tmp_path, name):
        save(tmp_path / "x.ckpt", 1)
        content = bytearray((tmp_path / "x.ckpt" / name).read_bytes())
        content[-30] ^= 1
        (tmp_path / "x.ckpt" / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{re.escape(name)} is damaged: its SHA-256"):
            check_complete(tmp_path / "x.ckpt")

    def test_parts_of_two_steps_are_told_apart(self, tmp_path):
        """As Lightning's own strategy leaves them: the new shards with the old list and state."""
        for number in (1, 2):
            save(tmp_path / str(number), number)
        shutil.copy(tmp_path / "2" / "meta.pt", tmp_path / "1")
        assert not is_complete(tmp_path / "1")

    @pytest.mark.parametrize(
        ("mark", "message"),
        [
            ("", "no valid JSON"),
            ("{}", "does not say which files"),
            ('{"files": {".metadata": 1}, "sha256": {}}', "does not say which files"),
            ('{"files": [".metadata", "meta.pt"], "sha256": {}}', "does not say which files"),
            (
                '{"files": {".metadata": 1, "meta.pt": 1, "../y": 1}, "sha256": {".metadata": "", "meta.pt": ""}}',
                "bytes",
            ),
            (
                '{"files": {"../y": 1, ".metadata": 1, "meta.pt": 1}, "sha256": {".metadata": "", "meta.pt": ""}}',
                "out of",
            ),
        ],
    )
    def test_marks_are_not_trusted(self, tmp_path, mark, message):
        save(tmp_path / "x.ckpt", 1)
        (tmp_path / "x.ckpt" / "COMPLETE.json").write_text(mark)
        with pytest.raises(ValueError, match=message):
            check_complete(tmp_path / "x.ckpt")

    def test_lightnings_own_are_taken_with_a_warning(self, tmp_path, caplog):
        save(tmp_path / "x.ckpt", 1, StockFSDPStrategy)
        with caplog.at_level(logging.WARNING):
            check_complete(tmp_path / "x.ckpt")
        assert "x.ckpt has no COMPLETE.json" in caplog.text

    def test_other_things_are_not_complete(self, tmp_path):
        (tmp_path / "file").touch()
        assert not any(is_complete(tmp_path / name) for name in (".", "file", "nothing"))


class TestRuns:
    """Real runs of one process in a group."""

    @pytest.mark.parametrize("kind", ["fsdp", "model"])
    def test_a_run_goes_on_from_its_shards(self, tmp_path, process_group, kind):  # noqa: F811
        path = tmp_path / "x.ckpt"
        first, runner = fit(tmp_path, kind)
        runner.save_checkpoint(path)
        assert is_complete(path) and (path / "COMPLETE.json").is_file()
        again, resumed = fit(tmp_path, kind, ckpt_path=path)
        assert resumed.global_step == 2
        assert_equal(local(first.state_dict()), local(again.state_dict()))
        assert_equal(local(runner.optimizers[0].state_dict()), local(resumed.optimizers[0].state_dict()))

        path.rename(tmp_path / ".x.ckpt.shards.old")  # the moment between two renames
        again = module(kind)
        trainer(tmp_path, kind).validate(again, loader(), ckpt_path=path, verbose=False)
        assert_equal(local(first.state_dict()), local(again.state_dict()))
        finish_swaps(tmp_path)
        (path / SHARD).unlink()
        with pytest.raises(ValueError, match=f"it holds no {SHARD}"):
            fit(tmp_path, kind, ckpt_path=path)

    @pytest.mark.parametrize("kind", ["fsdp", "model"])
    def test_checkpoints_in_one_file_are_written_as_always(self, tmp_path, process_group, kind):  # noqa: F811
        path = tmp_path / "x.ckpt"
        first, runner = fit(tmp_path, kind, folders=False, plugins=[AtomicCheckpointIO()])
        runner.save_checkpoint(path)
        assert path.is_file() and [file.name for file in tmp_path.iterdir()] == ["x.ckpt"]
        again, _ = fit(tmp_path, kind, folders=False, ckpt_path=path)
        assert_equal(local(first.state_dict()), local(again.state_dict()))

    @pytest.mark.usefixtures("watched")
    def test_the_programs_own_word_is_respected(self, tmp_path, process_group):  # noqa: F811
        path = tmp_path / "x.ckpt"
        _, runner = fit(tmp_path, "model")
        runner.save_checkpoint(path)
        torch.save(torch.load(path / "meta.pt") | {"extra": Payload()}, path / "meta.pt")
        with pytest.raises(ValueError, match="could run code"):
            runner.strategy.load_checkpoint(path)
        assert not was_run()
        runner.strategy.load_checkpoint(path, weights_only=False)
        assert was_run()


def local(state):
    return torch.utils._pytree.tree_map(lambda value: getattr(value, "to_local", lambda: value)(), state)


def assert_equal(mine, other):
    assert type(mine) is type(other)
    if isinstance(mine, dict):
        assert mine.keys() == other.keys()
        for key in mine:
            assert_equal(mine[key], other[key])
    elif isinstance(mine, (list, tuple)):
        for one, two in zip(mine, other, strict=True):
            assert_equal(one, two)
    else:
        assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other


class TestChoice:
    def test_names_become_ours(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert type(with_whole_shards("fsdp")) is AtomicFSDPStrategy
        offload = with_whole_shards("FSDP_CPU_OFFLOAD", "cuda")
        assert type(offload) is AtomicFSDPStrategy and offload.cpu_offload.offload_params
        assert [with_whole_shards(name) for name in ("auto", "ddp", "nonsense")] == ["auto", "ddp", "nonsense"]
        assert with_whole_shards("fsdp", "cpu") == "fsdp"

    def test_without_a_gpu_lightning_says_what_is_wrong(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="requires a GPU accelerator"):
            lightning.Trainer(strategy=with_whole_shards("fsdp"), accelerator="cpu", logger=False)

    def test_what_the_user_made_stays(self, caplog):
        quiet = (
            FSDPStrategy(),
            AtomicFSDPStrategy(state_dict_type="sharded"),
            AtomicModelParallelStrategy(),
            ModelParallelStrategy(save_distributed_checkpoint=False),
            DDPStrategy(),
        )
        for made in quiet:
            assert with_whole_shards(made) is made
        assert not caplog.text
        for made in (FSDPStrategy(state_dict_type="sharded"), ModelParallelStrategy()):
            assert with_whole_shards(made) is made
            assert f"Atomic{type(made).__name__} of lightning_igpt.checkpointing" in caplog.text


def in_a_new_process(script, folder, *words):
    (folder / "script.py").write_text(textwrap.dedent(script))
    return fresh.finished(fresh.script, "script.py", *words, folder=folder)


@pytest.mark.marathon
@pytest.mark.slow
def test_two_processes(tmp_path):
    """Equal weights and moments after resuming, and a process that fails alone is waited for by none."""
    script = """
        import sys
        from pathlib import Path

        import torch
        from tests.checkpointing.test_sharded import assert_equal, local, is_complete
        from tests.sharding import fit

        if __name__ == "__main__":
            kind = sys.argv[1]
            first, runner = fit(Path(), kind, devices=2)
            for _ in range(2):
                runner.save_checkpoint("x.ckpt")
            assert is_complete("x.ckpt")
            again, resumed = fit(Path(), kind, ckpt_path="x.ckpt", devices=2)
            assert_equal(local(first.state_dict()), local(again.state_dict()))
            assert_equal(local(runner.optimizers[0].state_dict()), local(resumed.optimizers[0].state_dict()))

            real = torch.save
            def fail(value, path, *args, **options):
                if str(path).endswith("meta.pt"):
                    raise OSError("No space left on device")
                return real(value, path, *args, **options)
            torch.save = fail
            try:
                resumed.save_checkpoint("x.ckpt")
            except OSError as error:
                told = str(error)
            torch.save = real
            expected = "another process could not" if runner.global_rank else "No space left"
            assert expected in told, told
            assert is_complete("x.ckpt")
            Path(f"done-{runner.global_rank}").touch()
    """
    in_a_new_process(script, tmp_path, "model")
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}
    assert len(list((tmp_path / "x.ckpt").glob("*.distcp"))) == 2
    assert not list(tmp_path.glob(".x.ckpt*"))


@pytest.mark.slow
def test_real_kills(tmp_path):
    """Two processes save over the same folder again and again, until both are killed."""
    script = """
        import os, random, signal, sys, time
        from pathlib import Path

        import torch
        from lightning.fabric.plugins.environments import TorchElasticEnvironment
        from torch.distributed import checkpoint as dcp
        from torch.distributed.tensor import Shard, distribute_tensor
        from lightning_igpt.checkpointing import AtomicFSDPStrategy, check_complete, finish_swaps

        PATH = Path("runs/x.ckpt")

        def work(rank, port, first):
            os.environ |= dict(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                TORCHELASTIC_RUN_ID="x",
            )
            torch.distributed.init_process_group("gloo")
            mesh = torch.distributed.init_device_mesh("cpu", (2,))
            strategy = AtomicFSDPStrategy(
                state_dict_type="sharded", parallel_devices=[torch.device("cpu")] * 2,
                cluster_environment=TorchElasticEnvironment(),
            )
            for number in range(first, first + 10_000):
                values = {str(n): distribute_tensor(torch.full((64, 1024), float(number)), mesh, [Shard(0)])
                          for n in range(8)}
                strategy.save_checkpoint({"state_dict": values, "epoch": number}, PATH)

        def read():
            finish_swaps(PATH.parent)
            check_complete(PATH)
            state = {"model": {str(n): torch.zeros(64, 1024) for n in range(8)}}
            dcp.load(state, checkpoint_id=PATH)
            epoch = torch.load(PATH / "meta.pt")["epoch"]
            assert {float(epoch)} == {value for t in state["model"].values() for value in t.flatten().tolist()}
            assert [path.name for path in PATH.parent.iterdir()] == ["x.ckpt"]
            return epoch

        def epoch_now():
            try:
                return torch.load(PATH / "meta.pt")["epoch"]
            except Exception:  # between two renames
                return 0

        if __name__ == "__main__":
            chance, last, caught = random.Random(0), 0, 0
            for turn in range(12):
                children = []
                for rank in range(2):
                    child = os.fork()
                    if child == 0:
                        work(rank, 20_000 + os.getppid() % 20_000 + turn, last + 1)
                    children.append(child)
                while epoch_now() <= last:
                    time.sleep(0.01)
                time.sleep(chance.uniform(0, 0.2))
                for child in children:
                    os.kill(child, signal.SIGKILL)
                for child in children:
                    os.waitpid(child, 0)
                caught += len(list(PATH.parent.iterdir())) > 1
                epoch = read()
                assert epoch > last
                last = epoch
            print("DONE", last, caught)
    """
    out = in_a_new_process(script, tmp_path)
    assert int(out.split("DONE")[1].split()[1]) > 0  # some kills came in the middle of a save
