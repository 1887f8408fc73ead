"""Whatever a stranger writes into a checkpoint, opening it runs no code, whichever way it is opened.

Where Lightning or torch alone would run it, a test shows that too, so that it is known to be able to fail. The formats
of weights are in weights/test_files.py, crafted lists of tensors in weights/test_safety.py.
"""

import contextlib
import http.server
import pickle
import shutil
import sys
import threading

import lightning
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_igpt import cli
from lightning_igpt.__main__ import main
from lightning_igpt.checkpointing import AtomicCheckpointIO, check_resumable, consolidate_checkpoint, find_checkpoint
from lightning_igpt.modules import FineTuneModule, PretrainModule, ProbeModule
from lightning_igpt.palette import Palette
from lightning_igpt.weights import load_pretrained
from tests.modules.helpers import TINY, loader, quiet_trainer
from tests.payload import Payload, was_run, watched  # noqa: F401
from tests.sharding import fit, module, process_group, trainer  # noqa: F401
from tests.test_cli import write

pytestmark = [
    pytest.mark.usefixtures("watched"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]
REFUSED = "cannot be opened with weights_only=True: .*holds Python objects, which could run code"
LIGHTNINGS = "lightning.pytorch.cli.instantiate_module"  # which Lightning lets a checkpoint name
VERBS = ["fit", "validate", "test", "predict"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's checkpoint."""
    runner = quiet_trainer(tmp_path_factory.mktemp("run"), max_steps=1)
    runner.fit(PretrainModule(TINY, "gray:8"), loader())
    return runner.checkpoint_callback.best_model_path


@pytest.fixture(scope="module")
def sharded_runs(tmp_path_factory, process_group):  # noqa: F811
    """Sharded checkpoints as Lightning's own strategies write them."""
    folder = tmp_path_factory.mktemp("sharded")
    for kind in ("fsdp", "model"):
        fit(folder, kind, atomic=False)[1].save_checkpoint(folder / kind)
    return folder


@pytest.fixture
def unguarded(monkeypatch):
    """Lightning as it is without this package's guard."""

    def leave_out():
        monkeypatch.setattr("lightning_igpt.modules.guarded.guard_loading", lambda strategy: None)

    return leave_out


def poisoned(path, place, target):
    """A copy of a checkpoint with a payload in it."""
    checkpoint = torch.load(path, weights_only=True)
    if place == "itself":
        checkpoint = Payload()
    elif place == "callback":
        checkpoint["callbacks"][next(iter(checkpoint["callbacks"]))]["best_model_score"] = Payload()
    else:
        checkpoint[place] = Payload()
    torch.save(checkpoint, target)
    return target


class TestFiles:
    @pytest.mark.parametrize("verb", VERBS)
    def test_any_trainer(self, run, tmp_path, verb):
        bad = poisoned(run, "extra", tmp_path / "bad.ckpt")
        runner = lightning.Trainer(logger=False, max_steps=2, accelerator="cpu", devices=1, enable_progress_bar=False)
        with pytest.raises(ValueError, match=rf"bad\.ckpt {REFUSED}"):
            getattr(runner, verb)(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=bad)

    @pytest.mark.parametrize("place", ["itself", "callback", "hyper_parameters", "optimizer_states", "loops"])
    def test_any_place(self, run, tmp_path, place):
        bad = poisoned(run, place, tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=rf"bad\.ckpt {REFUSED}"):
            quiet_trainer(tmp_path, max_steps=2).fit(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=bad)
        with pytest.raises(ValueError, match=rf"bad\.ckpt {REFUSED}"):
            PretrainModule.load_from_checkpoint(bad)

    @pytest.mark.parametrize("kind", [ProbeModule, FineTuneModule])
    def test_any_module(self, run, tmp_path, kind):
        bad = poisoned(run, "extra", tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=rf"bad\.ckpt {REFUSED}"):
            quiet_trainer(tmp_path).test(kind(run, num_classes=3), loader(), ckpt_path=bad)

    @pytest.mark.parametrize("io", [TorchCheckpointIO, AtomicCheckpointIO, AsyncCheckpointIO])
    def test_any_checkpoint_io(self, run, tmp_path, io):
        bad = poisoned(run, "extra", tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=rf"bad\.ckpt {REFUSED}"):
            quiet_trainer(tmp_path, plugins=[io()]).test(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=bad)

    def test_a_checkpoint_io_by_itself(self, run, tmp_path):
        with pytest.raises(Exception, match=r"Weights only load failed|weights_only"):
            AtomicCheckpointIO().load_checkpoint(poisoned(run, "extra", tmp_path / "bad.ckpt"))

    @pytest.mark.parametrize("setting", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None])
    def test_torch_is_told_and_not_left_to_choose(self, run, tmp_path, monkeypatch, setting):
        if setting:
            monkeypatch.setenv(setting, "1")
        bad = poisoned(run, "extra", tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=REFUSED):
            quiet_trainer(tmp_path).validate(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=bad)

    def test_calls_on_an_instance_are_refused_as_before(self, run):
        with pytest.raises(TypeError, match="cannot be called on an instance"):
            PretrainModule(TINY, "gray:8").load_from_checkpoint(run)

    def test_the_programs_own_word_is_respected(self, run, tmp_path):
        """Who writes weights_only=False into a program could as well write the payload there."""
        bad = poisoned(run, "extra", tmp_path / "bad.ckpt")
        model = PretrainModule(TINY, "gray:8")
        quiet_trainer(tmp_path).validate(model, loader(), ckpt_path=bad, weights_only=False, verbose=False)
        assert was_run()
        PretrainModule.load_from_checkpoint(bad, weights_only=False)
        assert was_run()

    def test_a_format_of_ones_own_is_left_to_its_reader(self, run, tmp_path):
        class Own(lightning.pytorch.plugins.CheckpointIO):
            def load_checkpoint(self, path, map_location=None, weights_only=None):
                assert (path, weights_only) == ("by any name", True)
                return torch.load(run, weights_only=True)

            def save_checkpoint(self, checkpoint, path, storage_options=None): ...

            def remove_checkpoint(self, path): ...

        runner = quiet_trainer(tmp_path, plugins=[Own()])
        runner.validate(PretrainModule(TINY, "gray:8"), loader(), ckpt_path="by any name", verbose=False)

    def test_the_newest_of_a_run_is_passed_over(self, run, tmp_path, caplog):
        folder = tmp_path / "run"
        folder.mkdir()
        shutil.copy(run, folder / "good.ckpt")
        poisoned(run, "extra", folder / "newest.ckpt")
        assert "good.ckpt" in load_pretrained(folder).origin
        assert "newest.ckpt is passed over" in caplog.text and "could run code" in caplog.text


class TestShards:
    @pytest.mark.parametrize(("kind", "atomic"), [("fsdp", False), ("model", False), ("model", True)])
    @pytest.mark.parametrize("place", [".metadata", "meta.pt", "shard"])
    def test_sharded_checkpoints(self, sharded_runs, tmp_path, unguarded, monkeypatch, kind, place, atomic):
        bad = shutil.copytree(sharded_runs / kind, tmp_path / "bad.ckpt")
        if place == "meta.pt":
            torch.save(torch.load(bad / place) | {"extra": Payload()}, bad / place)
            monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # torch is told, and not left to choose
        else:
            metadata = pickle.loads((bad / ".metadata").read_bytes())
            if place == "shard":
                torch.save(Payload(), bad / "__9_0.distcp")
                index = next(index for index in metadata.storage_data if index.fqn.endswith(".eps"))
                where = metadata.storage_data[index]
                where.relative_path, where.offset = "__9_0.distcp", 0
                where.length = (bad / "__9_0.distcp").stat().st_size
            else:
                metadata.version = Payload()
            (bad / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(ValueError, match=r"bad\.ckpt/(\.metadata|meta\.pt|__9_0\.distcp) .*could run code"):
            trainer(tmp_path, kind, atomic=atomic).fit(module(kind), loader(), ckpt_path=bad)
        for opener in (load_pretrained, check_resumable, lambda path: consolidate_checkpoint(path, "one.ckpt")):
            with pytest.raises(ValueError, match=r"could run code"):
                opener(bad)
        with pytest.raises(ValueError, match=r"could run code"):
            runner = quiet_trainer(tmp_path, plugins=[AtomicCheckpointIO()])
            runner.fit(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=bad)
        with pytest.raises(ValueError, match=r"could run code"):
            AtomicCheckpointIO().load_checkpoint(bad, weights_only=False)
        assert not was_run()
        if not atomic:
            unguarded()
            with contextlib.suppress(Exception):  # whatever comes of what the payload left in its place
                trainer(tmp_path, kind, atomic=False).fit(module(kind), loader(), ckpt_path=bad)
            assert was_run()

    @pytest.mark.parametrize(("verb", "atomic"), [("fit", False), ("validate", False), ("fit", True)])
    def test_whole_files_under_fsdp(self, run, tmp_path, process_group, unguarded, verb, atomic):  # noqa: F811
        bad = poisoned(run, "extra", tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=rf"bad\.ckpt {REFUSED}"):
            runner = trainer(tmp_path, "fsdp", atomic=atomic, folders=False)
            getattr(runner, verb)(module("fsdp"), loader(), ckpt_path=bad)
        assert not was_run()
        if not atomic:
            unguarded()
            runner = trainer(tmp_path, "fsdp", atomic=False, folders=False)
            with contextlib.suppress(ValueError):  # this checkpoint is another module's
                getattr(runner, verb)(module("fsdp"), loader(), ckpt_path=bad, weights_only=True)
            assert was_run()  # which Lightning does not pass on

    def test_whole_files_under_model_parallel(self, run, tmp_path, process_group):  # noqa: F811
        bad = poisoned(run, "extra", tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=rf"bad\.ckpt {REFUSED}"):
            trainer(tmp_path, "model", atomic=False).fit(module("model"), loader(), ckpt_path=bad)

    def test_folders_of_deepspeed(self, tmp_path):
        """Stands in for DeepSpeed's own strategy, which needs a GPU: it opens the folder by plain pickle too."""

        class Engine(SingleDeviceStrategy):
            restore_checkpoint_after_setup = True

            def load_checkpoint(self, checkpoint_path, weights_only=None):
                torch.load(checkpoint_path / "checkpoint" / "mp_rank_00_model_states.pt", weights_only=False)
                raise RuntimeError("opened")

        folder = tmp_path / "x.ckpt"
        (folder / "checkpoint").mkdir(parents=True)
        torch.save(Payload(), folder / "checkpoint" / "mp_rank_00_model_states.pt")

        def fit_it(strategy=None):
            runner = quiet_trainer(tmp_path, strategy=strategy or Engine())
            runner.fit(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=folder)

        for opener in (fit_it, lambda: check_resumable(folder), lambda: find_checkpoint(tmp_path)):
            with pytest.raises(ValueError, match=r"x\.ckpt is a checkpoint of DeepSpeed's.*weights_only = False"):
                opener()
        assert not was_run()
        trusted = Engine()
        trusted.weights_only = False
        with pytest.raises(RuntimeError, match="opened"):
            fit_it(trusted)
        assert was_run()

    def test_the_guard_is_put_on_once(self, sharded_runs, tmp_path):
        runner = trainer(tmp_path, "model", atomic=False)
        for _ in range(2):
            runner.validate(module("model"), loader(), ckpt_path=sharded_runs / "model", verbose=False)
        assert runner.strategy.load_checkpoint.args[1].__self__ is runner.strategy


@pytest.fixture
def server(run, tmp_path):
    """The address of a poisoned checkpoint, and what is asked for there."""
    asked = []
    content = poisoned(run, "extra", tmp_path / "served.ckpt").read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *args): ...

    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}/x.ckpt", asked
    served.shutdown()
    served.server_close()


class TestAddresses:
    def test_nothing_is_fetched(self, server, tmp_path):
        address, asked = server
        for open_it in (
            lambda: quiet_trainer(tmp_path).validate(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=address),
            lambda: quiet_trainer(tmp_path).fit(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=address),
            lambda: PretrainModule.load_from_checkpoint(address),
            lambda: load_pretrained(address),
            lambda: Palette.load(address),
        ):
            with pytest.raises((ValueError, FileNotFoundError), match=r"x\.ckpt"):
                open_it()
        assert asked == []

    def test_lightning_alone_would_fetch_and_run_it(self, server, tmp_path, monkeypatch, unguarded):
        address, asked = server
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        unguarded()
        quiet_trainer(tmp_path).validate(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=address, verbose=False)
        assert was_run() and asked


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """The name of a module that tells when it is imported."""
    (tmp_path / "evil_module.py").write_text("open('executed', 'w')\nclass Thing: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "evil_module"
    assert "evil_module" not in sys.modules


class TestNames:
    """Plain texts open safely; they must not be taken for names of code either."""

    def hostile(self, path, target, names):
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["hyper_parameters"] |= names
        torch.save(checkpoint, target)
        return target

    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ({"_instantiator": "evil_module.Thing"}, "_?instantiator"),
            (
                {"_instantiator": "lightning.pytorch.cli.instantiate_module", "_class_path": "evil_module.Thing"},
                "class",
            ),
            ({"network": {"class_path": "evil_module.Thing"}}, "class_path"),
            ({"network": "evil_module.Thing"}, "evil_module"),
            ({"palette": "evil_module.Thing"}, "evil_module"),
            ({"class_path": "evil_module.Thing", "_class_path": "evil_module.Thing"}, None),
        ],
    )
    def test_in_hyperparameters(self, run, tmp_path, evil, names, message):
        bad = self.hostile(run, tmp_path / "bad.ckpt", names)
        if message is None:
            assert type(PretrainModule.load_from_checkpoint(bad)) is PretrainModule
            return
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
            PretrainModule.load_from_checkpoint(bad)

    @pytest.mark.parametrize("verb", ["fit", "validate"])
    def test_on_the_command_line(self, run, tmp_path, evil, verb):
        names = {"_instantiator": "evil_module.Thing", "_class_path": "evil_module.Thing", "lr": 9.0, "seed": 7}
        bad = self.hostile(run, tmp_path / "bad.ckpt", names)
        model = {"init_args": {"network": TINY.to_dict(), "palette": "gray:8"}}
        recipe = write(tmp_path / "recipe.yaml", model=model)
        done = cli.run([verb, "--config", recipe, "--ckpt_path", str(bad), "--model.init_args.lr", "0.125"])
        assert type(done.model) is PretrainModule
        assert (done.model.lr, done.model.seed) == (0.125, 0)
        assert done.config[verb]["model"]["init_args"]["lr"] == 0.125


def test_palettes_of_objects(tmp_path):
    np.save(tmp_path / "p.npy", np.array([[Payload(), 1, 2]] * 2, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        Palette.load(tmp_path / "p.npy")


DEMOS = "lightning.pytorch.demos.boring_classes.Boring"
RECIPE = {
    "model": {"class_path": f"{DEMOS}Model"},
    "data": {"class_path": f"{DEMOS}DataModule"},
    "trainer": {
        "max_steps": 1,
        "accelerator": "cpu",
        "logger": False,
        "plugins": [{"class_path": "lightning.pytorch.plugins.io.TorchCheckpointIO"}],
    },
}


class TestRecipes:
    """With classes of Lightning alone, which guard nothing, a recipe has no checkpoint run code or be fetched."""

    @pytest.mark.parametrize("extra", [{}, {"weights_only": False}])
    @pytest.mark.parametrize("verb", VERBS)
    def test_a_checkpoint_with_code(self, run, tmp_path, verb, extra):
        poisoned(run, "extra", tmp_path / "bad.ckpt")
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"ckpt_path": "bad.ckpt"} | extra))
        with pytest.raises(SystemExit) as stop:
            main([verb, "--config", "recipe.yaml"])
        assert stop.value.code not in (0, None)

    def test_an_address(self, server, tmp_path):
        address, asked = server
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"ckpt_path": address}))
        with pytest.raises(SystemExit, match=r"x\.ckpt"):
            main(["fit", "--config", "recipe.yaml"])
        assert asked == []


@pytest.mark.parametrize("place", ["local://{}", "{}", "{}/../run/checkpoints/../../victim"])
def test_no_file_is_removed_at_the_word_of_a_checkpoint(run, tmp_path, place):
    """ModelCheckpoint removes the best file before the last, whose name it reads in the checkpoint."""
    victim, own = tmp_path / "victim", tmp_path / "run" / "checkpoints"
    victim.mkdir()
    own.mkdir(parents=True)
    (victim / "thesis.tex").write_text("years of work")
    checkpoint, callback = torch.load(run, weights_only=True), ModelCheckpoint(dirpath=own, every_n_train_steps=1)
    named = dict.fromkeys(("best_model_path", "kth_best_model_path", "last_model_path"), place.format(victim))
    state = callback.state_dict() | named | {"best_model_score": None, "kth_value": 0.0}
    checkpoint["callbacks"] = {callback.state_key: state}
    torch.save(checkpoint, tmp_path / "hostile.ckpt")
    runner = quiet_trainer(tmp_path, max_steps=checkpoint["global_step"] + 3, callbacks=[callback])
    runner.fit(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=tmp_path / "hostile.ckpt")
    assert (victim / "thesis.tex").exists() and list(own.glob("*.ckpt"))
