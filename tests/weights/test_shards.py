"""Weights out of folders of shards, one process alone reading them."""

import os
import pickle
import re
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from lightning_igpt.modules import FineTuneModule
from lightning_igpt.weights import load_pretrained
from lightning_igpt.weights.index import read_index
from lightning_igpt.weights.shards import ShardsFile, by_position, join_shards
from tests.modules.helpers import TINY, loader
from tests.payload import Payload, was_run, watched  # noqa: F401
from tests.sharding import fit, module, process_group, trainer  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory, process_group):  # noqa: F811
    """A trained module and the folder of its checkpoint, by each of Lightning's strategies."""
    made = {}
    for kind in ("model", "fsdp"):
        folder = tmp_path_factory.mktemp(kind) / "x.ckpt"
        trained, runner = fit(folder.parent, kind)
        runner.save_checkpoint(folder)
        state = {name: whole(value) for name, value in trained.state_dict().items()}
        made[kind] = {name.replace("_fsdp_wrapped_module.", ""): value for name, value in state.items()}, folder
    return made


def whole(value):
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run["model"][1], tmp_path / "x.ckpt")


def place_of(folder, prefix):
    return next(entry for entry in read_index(folder) if entry.name.startswith(prefix) and entry.is_tensor)


def flip(folder, prefix):
    """Flip bits all over the middle of a value, more than the padding in it."""
    entry = place_of(folder, prefix)
    content = bytearray((folder / entry.file).read_bytes())
    for place in range(entry.offset + entry.length // 4, entry.offset + 3 * entry.length // 4):
        content[place] ^= 4
    (folder / entry.file).write_bytes(content)


def change(folder, edit):
    """Change the list of tensors, without the mark that would tell."""
    (folder / "COMPLETE.json").unlink(missing_ok=True)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    edit(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


class TestLoading:
    @pytest.mark.parametrize("kind", ["model", "fsdp"])
    def test_the_network_comes_as_from_a_file(self, run, kind):
        state, folder = run[kind]
        for source in (folder, folder.parent, str(folder)):
            loaded = load_pretrained(source)
            for name, value in loaded.network.state_dict().items():
                assert torch.equal(value, state[f"network.{name}"].view(value.shape))
            assert loaded.palette.sha256 and loaded.card.steps == 2 and loaded.head is None
            assert f"checkpoint {folder}" in loaded.origin and loaded.path == folder
        assert "the newest in" in load_pretrained(folder.parent).origin

    def test_between_two_renames(self, run, copied):
        copied.rename(copied.with_name(".x.ckpt.shards.old"))
        for source in (copied, copied.parent):
            assert torch.equal(load_pretrained(source).network.wte.weight, run["model"][0]["network.wte.weight"])

    def test_a_class_head_and_its_names(self, tmp_path, process_group):  # noqa: F811
        runner = trainer(tmp_path, "model", max_steps=1)
        made = ShardedClassifier(network=TINY, palette="gray:8", num_classes=3, class_names=["a", "b", "c"])
        runner.fit(made, loader())
        runner.save_checkpoint(tmp_path / "x.ckpt")
        loaded = load_pretrained(tmp_path)
        assert torch.equal(loaded.head, whole(made.head.weight)) and loaded.class_names == ["a", "b", "c"]

    def test_the_best_of_a_run(self, tmp_path, process_group):  # noqa: F811
        saver = ModelCheckpoint(tmp_path / "run", monitor="val/nats_per_pixel", save_top_k=2, filename="{step}")
        runner = trainer(
            tmp_path, "model", callbacks=[saver], enable_checkpointing=True, val_check_interval=2, max_steps=6
        )
        runner.fit(module("model"), loader(), loader())
        shutil.move(tmp_path / "run", tmp_path / "moved")
        loaded = load_pretrained(tmp_path / "moved")
        assert loaded.path.name == os.path.basename(saver.best_model_path) and loaded.path.is_dir()
        assert "the best in val/nats_per_pixel" in loaded.origin

    def test_averaged_weights_are_called_so(self, copied):
        """As Lightning's WeightAveraging leaves them: the average in the module's place."""
        (copied / "COMPLETE.json").unlink()
        other = torch.load(copied / "meta.pt", weights_only=True)
        torch.save(other | {"averaging_state": {"n_averaged": torch.tensor(3)}}, copied / "meta.pt")
        assert load_pretrained(copied).origin.endswith("(averaged weights)")

    def test_nothing_is_read_but_the_network(self, run, copied):
        flip(copied, "optimizer_0.state.network.wte.weight.exp_avg")
        assert torch.equal(load_pretrained(copied).network.wte.weight, run["model"][0]["network.wte.weight"])
        with pytest.raises(ValueError, match=r"optimizer_0\.state\.network\.wte\.weight\.exp_avg in it is damaged"):
            join_shards(copied)
        flip(copied, "state_dict.network.wte")
        with pytest.raises(ValueError, match=r"state_dict\.network\.wte\.weight in it is damaged"):
            load_pretrained(copied)

    def test_another_palette_is_told(self, copied):
        (copied / "COMPLETE.json").unlink()
        other = torch.load(copied / "meta.pt", weights_only=True)
        other["lightning_igpt"]["palette_sha256"] = "0" * 64
        torch.save(other, copied / "meta.pt")
        with pytest.raises(ValueError, match="was written with 8 colours and the hash 000000000000"):
            load_pretrained(copied)

    def test_incomplete_folders_are_passed_over(self, run, tmp_path, caplog):
        shutil.copytree(run["model"][1], tmp_path / "old.ckpt")
        newest = shutil.copytree(run["model"][1], tmp_path / "new.ckpt")
        os.utime(tmp_path / "old.ckpt", (1, 1))
        (newest / "__0_0.distcp").write_bytes(b"half")
        assert load_pretrained(tmp_path).path.name == "old.ckpt"
        assert "new.ckpt is passed over" in caplog.text
        with pytest.raises(ValueError, match=r"__0_0\.distcp"):
            load_pretrained(newest)


class ShardedClassifier(FineTuneModule):
    def configure_model(self):
        from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

        if not isinstance(self.network, FSDPModule):
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.head, mesh=self.device_mesh["data_parallel"])
            register_fsdp_forward_method(self.network, "hidden")


class TestParts:
    """Tensors in several parts, as several processes write them."""

    def write(self, folder, **values):
        dcp.save({"state_dict": values}, checkpoint_id=folder)
        torch.save({"epoch": 1}, folder / "meta.pt")
        return folder

    def split(self, folder, name, size, parts):
        """Let a tensor of the given size be one of several parts, which lie in entries of their own."""

        def edit(metadata):
            kinds, places = metadata.state_dict_metadata, metadata.storage_data
            kind = kinds[f"state_dict.{name}"]
            kind.size, kind.chunks = torch.Size(size), []
            for number, (start, shape) in enumerate(parts):
                part = f"state_dict.{name}{number}"
                index = next(one for one in places if one.fqn == part)
                place = places.pop(index)
                kinds.pop(part)
                kind.chunks.append(ChunkStorageMetadata(torch.Size(start), torch.Size(shape)))
                places[dcp.metadata.MetadataIndex(f"state_dict.{name}", start)] = place
            for index in [one for one in places if one.fqn == f"state_dict.{name}" and places[one] is self.stub]:
                del places[index]

        metadata = pickle.loads((folder / ".metadata").read_bytes())
        index = next(one for one in metadata.storage_data if one.fqn == f"state_dict.{name}")
        self.stub = metadata.storage_data.pop(index)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        change(folder, edit)

    def test_parts_of_any_shape_make_the_tensor(self, tmp_path):
        value = torch.arange(24.0).view(4, 6)
        parts = {"a0": value[:3, :2].clone(), "a1": value[:3, 2:].clone(), "a2": value[3:].clone(), "a3": value[4:]}
        folder = self.write(tmp_path / "x.ckpt", a=torch.zeros(1, 1), **parts)
        self.split(folder, "a", (4, 6), [((0, 0), (3, 2)), ((0, 2), (3, 4)), ((3, 0), (1, 6)), ((4, 0), (0, 6))])
        assert torch.equal(ShardsFile(folder).read(["a"])["a"], value)

    @pytest.mark.parametrize(
        ("size", "parts", "message"),
        [
            ((4, 6), [((0, 0), (2, 6)), ((1, 0), (2, 6))], "parts of state_dict.a in it overlap"),
            ((4, 6), [((0, 0), (4, 3)), ((0, 2), (4, 3))], "parts of state_dict.a in it overlap"),
            ((5, 6), [((0, 0), (2, 6)), ((2, 0), (2, 6))], r"do not make up \(5, 6\)"),
            ((4, 6), [((0, 0), (2, 6)), ((3, 0), (2, 6))], "lies outside of its shape"),
            ((1 << 40, 6), [((0, 0), (2, 6)), ((2, 0), (2, 6))], "do not make up"),
            (
                (1 << 40, 6),
                [((0, 0), (1 << 39, 6)), ((1 << 39, 0), (1 << 39, 6))],
                "promises more of state_dict.a than",
            ),
            ((4, 5), [((0, 0), (2, 5)), ((2, 0), (2, 5))], "state_dict.a in it is not what .metadata says"),
        ],
    )
    def test_parts_that_do_not_fit_are_refused_in_little_memory(self, tmp_path, size, parts, message):
        halves = {"a0": torch.ones(2, 6), "a1": torch.ones(2, 6)}
        folder = self.write(tmp_path / "x.ckpt", a=torch.zeros(1, 1), **halves)
        self.split(folder, "a", size, parts)
        with pytest.raises(ValueError, match=message):
            ShardsFile(folder).read(["a"])

    def test_a_tensor_larger_than_its_bytes(self, tmp_path):
        huge = torch.zeros(1).expand(1 << 30)
        folder = self.write(tmp_path / "x.ckpt", a=torch.ones(300))
        torch.save(huge, tmp_path / "huge")
        content = (tmp_path / "huge").read_bytes()
        (folder / "__9_0.distcp").write_bytes(content)

        def edit(metadata):
            place = next(iter(metadata.storage_data.values()))
            place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(content)

        change(folder, edit)
        with pytest.raises(ValueError, match=r"state_dict\.a in it is not what"):
            ShardsFile(folder).read(["a"])


STATE = {
    "state": {"b": {"step": 1}, "a": {"step": 2}},
    "param_groups": [{"params": ["a", "c"], "lr": 1.0}, {"params": ["b"], "lr": 2.0}],
}


class TestOptimizers:
    def test_names_become_positions(self):
        found = by_position(STATE, "x")
        assert found["state"] == {0: {"step": 2}, 2: {"step": 1}} and list(found["state"]) == [0, 2]
        assert found["param_groups"] == [{"params": [0, 1], "lr": 1.0}, {"params": [2], "lr": 2.0}]
        assert by_position(found, "x") == found
        places = {"a": 7, "b": 2, "c": 4}  # as Lightning numbers them: by their place in the module
        groups = [{**one, "params": [places[name] for name in one["params"]]} for one in STATE["param_groups"]]
        numbered = {"state": {places[name]: value for name, value in STATE["state"].items()}}
        assert by_position(numbered | {"param_groups": groups}, "x") == found

    @pytest.mark.parametrize(
        "state",
        [
            None,
            {"state": {}},
            {"state": [], "param_groups": []},
            {"state": {}, "param_groups": [3]},
            {"state": {}, "param_groups": [{"lr": 1}]},
            {"state": {}, "param_groups": [{"params": [[]]}]},
            {"state": {"z": {}}, "param_groups": [{"params": ["a"]}]},
            {"state": {}, "param_groups": [{"params": ["a", "a"]}]},
        ],
    )
    def test_what_makes_no_sense_is_refused(self, state):
        with pytest.raises(ValueError, match="x is damaged: the optimiser's"):
            by_position(state, "x")

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            (("optimizer_0", "param_groups", 10**9, "lr"), "leads elsewhere"),
            (("optimizer_0", "param_groups", 0, "eps"), "leads elsewhere"),
            (("optimizer_0", "param_groups", Payload(), "lr"), "could run code"),
            (["optimizer_0", "param_groups", 0, "lr"], "no plain values"),
            (None, "does not say where in the optimiser's state"),
        ],
    )
    @pytest.mark.usefixtures("watched")
    def test_ways_that_lead_elsewhere(self, copied, path, message):
        change(copied, lambda metadata: metadata.planner_data.update({"optimizer_0.param_groups.0.lr": path}))
        with pytest.raises(ValueError, match=message):
            join_shards(copied)
        assert not was_run()

    def test_a_list_with_gaps(self, copied):
        def edit(metadata):
            for name in [name for name in metadata.storage_data if name.fqn.startswith("optimizer_0.param_groups.0.")]:
                del metadata.storage_data[name]

        change(copied, edit)
        with pytest.raises(ValueError, match="a list of the optimiser's state has gaps"):
            join_shards(copied)


DEEPSPEED = ["checkpoint/mp_rank_00_model_states.pt", "checkpoint/zero_pp_rank_0_mp_rank_00_optim_states.pt", "latest"]


def test_folders_of_deepspeed_say_what_they_are(tmp_path):
    folder = tmp_path / "x.ckpt"
    (folder / "checkpoint").mkdir(parents=True)
    for name in DEEPSPEED:
        torch.save({"module": Payload()}, folder / name)
    for source in (folder, folder / "checkpoint", tmp_path):
        message = r"checkpoint of DeepSpeed's, which opens .* by plain pickle.*\.weights_only = False.*convert_zero"
        with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
            load_pretrained(source)
