"""Checkpoints cross strategies: what one wrote, another goes on from, as if the run had never been interrupted.

In one process all strategies do the same sums, so everything is compared bit for bit; between one process and two, with
a tolerance for the order of sums.
"""

import io
import os
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard, register_fsdp_forward_method

import lightning_igpt as igpt
from lightning_igpt.checkpointing import (
    AtomicCheckpointIO,
    AtomicFSDPStrategy,
    AtomicModelParallelStrategy,
    check_resumable,
    consolidate_checkpoint,
    find_checkpoint,
    finish_swaps,
    is_complete,
)
from lightning_igpt.checkpointing.index import read_index
from tests import fresh
from tests.image_files import tiny
from tests.sharding import process_group  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]
NETWORK = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 4, "image_size": 4, "dropout": 0.1}
STRATEGIES = {
    "single": lambda devices: "auto",
    "ddp": lambda devices: "ddp",
    "shards": lambda devices: AtomicModelParallelStrategy(devices, 1, save_distributed_checkpoint=True),
    "whole": lambda devices: AtomicModelParallelStrategy(devices, 1, save_distributed_checkpoint=False),
    "fsdp1 shards": lambda devices: AtomicFSDPStrategy(state_dict_type="sharded"),
    "fsdp1 whole": lambda devices: AtomicFSDPStrategy(state_dict_type="full"),
}
FOLDERS = ("shards", "fsdp1 shards")


class Sharding:
    """Shards itself where the strategy asks for that, under the same class name everywhere."""

    def configure_model(self):
        strategy = self.trainer.strategy
        if isinstance(strategy, ModelParallelStrategy) and not isinstance(self.network, FSDPModule):
            for part in [self.network, *([self.head] if hasattr(self, "head") else [])]:
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
            if hasattr(self, "head"):
                register_fsdp_forward_method(self.network, "hidden")
        if isinstance(strategy, FSDPStrategy) and not isinstance(self.network, FullyShardedDataParallel):
            wrap = {"device_id": torch.device("cpu"), "use_orig_params": True}
            self.network = FullyShardedDataParallel(self.network, **wrap)


class Pretrain(Sharding, igpt.PretrainModule): ...


class FineTune(Sharding, igpt.FineTuneModule): ...


class Recorder(Callback):
    def __init__(self):
        self.losses = {}

    def on_before_backward(self, trainer, module, loss):
        self.losses[trainer.fit_loop.epoch_loop.batch_progress.total.ready - 1] = loss.item()


def pretraining(**options):
    return Pretrain(NETWORK, "gray:4", **{"seed": 3, "warmup_steps": 2, "weight_decay": 0.1} | options)


def finetuning():
    return FineTune(network=NETWORK, palette="gray:4", num_classes=2, warmup_steps=2, layer_decay=0.7)


def frozen():
    module = pretraining()
    module.network.wte.requires_grad_(False)
    module.network.h[0].ln_1.requires_grad_(False)
    return module


MODULES = {"pretraining": pretraining, "fine-tuning": finetuning, "frozen": frozen}


def run(folder, kind, steps=6, ckpt=None, make=pretraining, devices=1, **options):
    """What there is after so many steps: losses by batch, state, moments by position, settings, schedule."""
    torch.manual_seed(0 if ckpt is None else 99)  # a resumed process does not start with the same random numbers
    module, recorder = make(), Recorder()
    options_of_data = {"batch_size": 4 // devices, "seed": 5}
    if isinstance(module, FineTune):
        data = igpt.FineTuneDataModule(tiny(26), pad=1, **options_of_data)
    else:
        data = igpt.PretrainDataModule(tiny(26), **options_of_data)
    strategy = STRATEGIES.get(kind, kind)(devices)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, logger=False, callbacks=[recorder],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        max_steps=steps, limit_val_batches=0, plugins=[AtomicCheckpointIO()], **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt)
    return trainer, {"losses": recorder.losses, **state_of(trainer)}


def state_of(trainer):
    optimizer, schedule = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        "state": {
            name.replace("_fsdp_wrapped_module.", ""): whole(value)
            for name, value in trainer.lightning_module.named_parameters()
        },
        "moments": [{name: whole(value) for name, value in optimizer.state[one].items()} for one in parameters],
        "settings": [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups],
        "schedule": {name: value for name, value in schedule.state_dict().items() if name != "lr_lambdas"},
        "steps": trainer.global_step,
    }


def whole(value):
    value = value.full_tensor() if hasattr(value, "full_tensor") else value
    return value.detach().flatten().clone()  # FSDP of the first kind flattens


def assert_equal(mine, other, tolerance=0.0):
    if isinstance(mine, dict):
        assert mine.keys() == other.keys()
        for key in mine:
            assert_equal(mine[key], other[key], tolerance)
    elif isinstance(mine, (list, tuple)):
        for one, two in zip(mine, other, strict=True):
            assert_equal(one, two, tolerance)
    elif isinstance(mine, (torch.Tensor, float)):
        torch.testing.assert_close(torch.as_tensor(mine), torch.as_tensor(other), rtol=tolerance, atol=tolerance)
    else:
        assert mine == other


def resumed(twin, step=3):
    """What a run that resumes at a step shall come to."""
    return twin | {"losses": {batch: loss for batch, loss in twin["losses"].items() if batch >= step}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, process_group):  # noqa: F811
    """For each module: the uninterrupted run on one device, and a folder with a checkpoint by every strategy."""
    made = {}
    for name, make in MODULES.items():
        folder = tmp_path_factory.mktemp("runs")
        for kind in STRATEGIES:
            if name == "pretraining" or not kind.startswith("fsdp1"):
                run(folder, kind, 3, make=make)[0].save_checkpoint(folder / f"{kind}.ckpt")
        made[name] = run(folder, "single", make=make)[1], folder
    return made


class TestOneProcess:
    @pytest.mark.parametrize("target", ["single", "ddp", "shards", "fsdp1 shards"])  # the other two load as these do
    @pytest.mark.parametrize("source", STRATEGIES)
    def test_every_strategy_goes_on_from_every_checkpoint(self, runs, tmp_path, source, target):
        twin, folder = runs["pretraining"]
        path = folder / f"{source}.ckpt"
        assert path.is_dir() == (source in FOLDERS)
        if source == "shards" and target.startswith("fsdp1"):
            with pytest.raises(ValueError, match="was not saved by FSDPStrategy, which cannot load it; make one file"):
                run(tmp_path, target, ckpt=path)
            return
        assert_equal(resumed(twin), run(tmp_path, target, ckpt=path)[1])

    @pytest.mark.parametrize("name", ["fine-tuning", "frozen"])
    @pytest.mark.parametrize(
        ("source", "target"),
        [("single", "shards"), ("shards", "single"), ("shards", "shards"), ("whole", "single"), ("ddp", "whole")],
    )
    def test_many_groups_and_frozen_parameters(self, runs, tmp_path, name, source, target):
        twin, folder = runs[name]
        found = run(tmp_path, target, ckpt=folder / f"{source}.ckpt", make=MODULES[name])[1]
        assert_equal(resumed(twin), found)
        assert len(found["settings"]) == (8 if name == "fine-tuning" else 2)

    @pytest.mark.parametrize("source", ["shards", "whole", "fsdp1 shards"])
    @pytest.mark.parametrize("target", ["single", "shards"])
    def test_what_the_run_says_now_wins(self, runs, tmp_path, source, target):
        """As it does where one device goes on from one device's file."""
        folder = runs["pretraining"][1]

        def changed():
            return pretraining(lr=0.02, betas=(0.8, 0.9), weight_decay=0.3)

        expected = run(tmp_path, "single", ckpt=folder / "single.ckpt", make=changed)[1]
        assert expected["settings"][0]["betas"] == (0.8, 0.9) and expected["schedule"]["base_lrs"] == [0.02, 0.02]
        found = run(tmp_path, target, ckpt=folder / f"{source}.ckpt", make=changed)[1]
        assert_equal(expected, found)

    @pytest.mark.parametrize("source", FOLDERS)
    def test_one_file_of_a_folder(self, runs, tmp_path, source):
        twin, folder = runs["pretraining"]
        consolidate_checkpoint(folder / f"{source}.ckpt", tmp_path / "one.ckpt")
        assert [path.name for path in tmp_path.iterdir()] == ["one.ckpt"]
        one, other = (torch.load(path, weights_only=True) for path in (tmp_path / "one.ckpt", folder / "single.ckpt"))
        assert one.keys() == other.keys()
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step"):
            assert_equal(other[key], one[key])
        assert_equal(resumed(twin), run(tmp_path, "single", ckpt=tmp_path / "one.ckpt")[1])
        for wrong, message in [(tmp_path, "no folder of shards"), (tmp_path / "one.ckpt", "no folder of shards")]:
            with pytest.raises(ValueError, match=message):
                consolidate_checkpoint(wrong, tmp_path / "other.ckpt")
        for name, message in [("other.pt", r"ends in \.ckpt"), (".", r"ends in \.ckpt")]:
            with pytest.raises(ValueError, match=message):
                consolidate_checkpoint(folder / f"{source}.ckpt", tmp_path / name)

    def test_the_newest_is_found_whatever_its_kind(self, runs, tmp_path):
        folder = runs["pretraining"][1]
        shutil.copy(folder / "single.ckpt", tmp_path / "a.ckpt")
        newest = shutil.copytree(folder / "shards.ckpt", tmp_path / "b.ckpt")
        os.utime(tmp_path / "a.ckpt", (1, 1))
        assert find_checkpoint(tmp_path, pretraining()) == newest
        damage(newest, "optimizer_0")
        assert find_checkpoint(tmp_path, pretraining()) == tmp_path / "a.ckpt"

    def test_evaluation_reads_a_folder(self, runs, tmp_path, caplog):
        folder, data = runs["pretraining"][1], igpt.PretrainDataModule(tiny(26), batch_size=4)
        found = []
        for source, target in [("single", "single"), ("shards", "single"), ("shards", "shards"), ("single", "shards")]:
            options = {"strategy": STRATEGIES[target](1), "plugins": [AtomicCheckpointIO()], "logger": False}
            trainer = Trainer(accelerator="cpu", devices=1, enable_progress_bar=False, **options)
            path = folder / f"{source}.ckpt"
            found += trainer.validate(pretraining(), data, ckpt_path=path, weights_only=True, verbose=False)
        assert found[0] == found[1] == found[2] == found[3]
        assert "random weights" not in caplog.text


def damage(folder, prefix):
    """Flip a bit in a tensor of a shard whose name begins so."""
    entry = next(one for one in read_index(folder) if one.name.startswith(prefix) and len(one.shape) == 2)
    content = bytearray((folder / entry.file).read_bytes())
    stored = torch.load(io.BytesIO(content[entry.offset : entry.offset + entry.length]), weights_only=True)
    content[content.index(stored.numpy().tobytes(), entry.offset)] ^= 1
    (folder / entry.file).write_bytes(content)


class TestRefusals:
    @pytest.mark.parametrize("prefix", ["state_dict.network.wte", "optimizer_0.state.network.wpe"])
    def test_a_flipped_bit_in_a_shard(self, runs, tmp_path, prefix):
        path = shutil.copytree(runs["pretraining"][1] / "shards.ckpt", tmp_path / "x.ckpt")
        damage(path, prefix)
        assert is_complete(path)  # sizes and small files are what they were
        for kind in ("single", "ddp", "shards"):
            with pytest.raises(ValueError, match=rf"__0_0\.distcp.* {prefix}.* damaged"):
                run(tmp_path, kind, ckpt=path)
        with pytest.raises(ValueError, match="damaged"):
            check_resumable(path)
        with pytest.raises(ValueError, match="damaged"):
            consolidate_checkpoint(path, tmp_path / "one.ckpt")
        assert not (tmp_path / "one.ckpt").exists()

    @pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
    def test_a_part_is_missing(self, runs, tmp_path, name):
        path = shutil.copytree(runs["pretraining"][1] / "shards.ckpt", tmp_path / "x.ckpt")
        (path / name).unlink()
        for kind in ("single", "shards"):
            with pytest.raises(ValueError, match=f"no whole sharded checkpoint: it holds no {name}|joins? a folder"):
                run(tmp_path, kind, ckpt=path)

    @pytest.mark.parametrize("source", ["shards", "whole"])
    def test_weights_alone_do_not_continue_a_run(self, runs, tmp_path, source):
        trainer, _ = run(tmp_path, source, 2)
        trainer.save_checkpoint(tmp_path / "x.ckpt", weights_only=True)
        with pytest.raises(ValueError, match="holds weights, but not the optimiser"):
            check_resumable(tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match="holds the states of 0 optimisers, but the run has 1"):
            run(tmp_path, "shards", ckpt=tmp_path / "x.ckpt")
        with pytest.raises(KeyError, match="contains only the model"):
            run(tmp_path, "single", ckpt=tmp_path / "x.ckpt")

    def test_a_whole_file_that_is_trusted_is_spread_alike(self, runs, tmp_path):
        """weights_only=False does not bring Lightning's own reading back, which mixes the moments up."""
        twin, folder = runs["pretraining"]
        trusting = AtomicModelParallelStrategy(1, 1)
        trusting.weights_only = False
        torch.save(torch.load(folder / "single.ckpt", weights_only=True) | {"own": Path()}, tmp_path / "x.ckpt")
        with pytest.raises(ValueError, match="could run code"):
            run(tmp_path, "shards", ckpt=tmp_path / "x.ckpt")
        assert_equal(resumed(twin), run(tmp_path, lambda devices: trusting, ckpt=tmp_path / "x.ckpt")[1])

    def test_trainers_that_cannot_join_say_so(self, runs, tmp_path):
        path = runs["pretraining"][1] / "shards.ckpt"
        plain = Trainer(accelerator="cpu", logger=False, max_steps=4, enable_checkpointing=False)
        with pytest.raises(ValueError, match=r"SingleDeviceStrategy cannot join .* plugins=AtomicCheckpointIO\(\)"):
            plain.fit(pretraining(), igpt.PretrainDataModule(tiny(26), batch_size=4), ckpt_path=path)
        with pytest.raises(ValueError, match="load_from_checkpoint takes files: use pretrained="):
            Pretrain.load_from_checkpoint(path)


class TestSaving:
    """A run that goes on under another strategy saves over what it came from."""

    @pytest.mark.parametrize("kind", ["single", "whole"])
    def test_a_file_takes_the_place_of_a_folder(self, runs, tmp_path, kind):
        path = shutil.copytree(runs["pretraining"][1] / "shards.ckpt", tmp_path / "x.ckpt")
        trainer, _ = run(tmp_path, kind, ckpt=path)
        trainer.save_checkpoint(path)
        assert path.is_file() and [one.name for one in tmp_path.iterdir()] == ["x.ckpt"]
        assert torch.load(path, weights_only=True)["global_step"] == 6

    @pytest.mark.parametrize("kind", ["whole", "fsdp1 whole"])
    def test_the_folder_stays_until_the_file_is_whole(self, runs, tmp_path, monkeypatch, kind):
        def full(*args, **options):
            raise OSError(28, "No space left on device")

        path = shutil.copytree(runs["pretraining"][1] / "fsdp1 shards.ckpt", tmp_path / "x.ckpt")
        trainer, _ = run(tmp_path, kind, ckpt=path) if kind == "whole" else run(tmp_path, kind)
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(torch, "save", full)
            trainer.save_checkpoint(path)
        assert [one.name for one in tmp_path.iterdir()] == ["x.ckpt"]
        assert AtomicCheckpointIO().load_checkpoint(path)["global_step"] == 3

    @pytest.mark.parametrize("moment", ["rename", "replace", "rmtree"])
    def test_a_kill_on_the_way(self, runs, tmp_path, monkeypatch, moment):
        class Killed(BaseException):
            """Nothing may tidy up after it, as after a kill."""

        def killed(*args, **options):
            raise Killed

        path = shutil.copytree(runs["pretraining"][1] / "shards.ckpt", tmp_path / "x.ckpt")
        io = AtomicCheckpointIO()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(shutil if moment == "rmtree" else Path, moment, killed)
            io.save_checkpoint({"global_step": 9}, path)
        assert io.load_checkpoint(path)["global_step"] == (9 if moment == "rmtree" else 3)
        finish_swaps(tmp_path)
        assert [one.name for one in tmp_path.iterdir()] == ["x.ckpt"]
        assert io.load_checkpoint(path)["global_step"] == (9 if moment == "rmtree" else 3)


SCRIPT = """
    import os, sys, logging
    from pathlib import Path

    import torch
    from tests.checkpointing.test_across import assert_equal, resumed, run

    logging.disable(logging.WARNING)
    port = 20_000 + os.getpid() % 20_000

    def together(processes, work):
        # Real processes, forked so that torch is imported once.
        global port
        port += 1
        children = []
        for rank in range(processes):
            child = os.fork()
            if child == 0:
                os.environ |= dict(
                    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes),
                    MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="x", GROUP_RANK="0",
                )
                try:
                    work()
                except BaseException:
                    import traceback
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            children.append(child)
        assert not any([os.waitpid(child, 0)[1] for child in children])

    def without_dropout():
        from tests.checkpointing.test_across import NETWORK, Pretrain
        return Pretrain(NETWORK | {"dropout": 0.0}, "gray:4", seed=3, warmup_steps=2, weight_decay=0.1)

    def save(kind, devices, name):
        trainer, _ = run("x", kind, 3, make=without_dropout, devices=devices)
        trainer.save_checkpoint(name)

    def twin(kind, devices):
        found = run("x", kind, make=without_dropout, devices=devices)[1]
        if os.environ["RANK"] == "0":
            torch.save(found, "twin.pt")
        torch.distributed.barrier()

    def resume(kind, devices, name, tolerance):
        found = run("x", kind, ckpt=name, make=without_dropout, devices=devices)[1]
        expected = resumed(torch.load("twin.pt"))
        found.pop("losses"), expected.pop("losses")  # other processes have other images
        assert_equal(expected, found, tolerance)
"""


def in_a_new_process(steps, folder):
    (folder / "script.py").write_text(textwrap.dedent(SCRIPT) + textwrap.dedent(steps))
    assert "DONE" in fresh.finished(fresh.script, "script.py", folder=folder)


TOLERANCE = 2e-6  # float32 sums over four images, over two and two, or over four halves


@pytest.mark.slow
def test_shards_of_two_processes(tmp_path):
    """The same processes, DDP, one process that shards, and one device go on from them, or from their whole file."""
    steps = f"""
        def two():
            twin("shards", 2)
            save("shards", 2, "shards.ckpt")
            resume("shards", 2, "shards.ckpt", 0.0)
            resume("ddp", 2, "shards.ckpt", {TOLERANCE})
            save("whole", 2, "whole.ckpt")

        def one():
            resume("shards", 1, "shards.ckpt", {TOLERANCE})
            resume("single", 1, "shards.ckpt", {TOLERANCE})
            resume("single", 1, "whole.ckpt", {TOLERANCE})

        together(2, two)
        assert len(list(Path("shards.ckpt").glob("*.distcp"))) == 2
        together(1, one)
        print("DONE")
    """
    in_a_new_process(steps, tmp_path)


@pytest.mark.slow
def test_shards_for_two_processes(tmp_path):
    """Two processes that shard go on from what one device, DDP, and one process that shards saved."""
    steps = f"""
        def one():
            twin("shards", 1)
            save("shards", 1, "shards.ckpt")
            save("single", 1, "single.ckpt")

        def two():
            resume("shards", 2, "shards.ckpt", {TOLERANCE})
            resume("shards", 2, "single.ckpt", {TOLERANCE})
            save("ddp", 2, "ddp.ckpt")
            resume("shards", 2, "ddp.ckpt", {TOLERANCE})

        together(1, one)
        together(2, two)
        print("DONE")
    """
    in_a_new_process(steps, tmp_path)
