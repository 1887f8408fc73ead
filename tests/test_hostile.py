"""Whatever a stranger writes into a checkpoint, opening it runs no code, whichever way it is opened.

Trainers of make_trainer refuse it by name; a plain Trainer ends in torch's own error. The formats of weights are in
weights/test_files.py.
"""

import pickle
import shutil
import sys
import urllib.request

import lightning
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_igpt import cli
from lightning_igpt.__main__ import main
from lightning_igpt.checkpointing import AtomicCheckpointIO
from lightning_igpt.modules import PretrainModule
from lightning_igpt.palette import Palette
from lightning_igpt.strategies import FullyShardedStrategy
from lightning_igpt.weights import load_pretrained
from tests.modules.helpers import TINY, loader, quiet_trainer
from tests.payload import Payload, was_run, watched  # noqa: F401
from tests.test_cli import write

pytestmark = [
    pytest.mark.usefixtures("watched"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*:UserWarning"),
]
REFUSED = "cannot be opened with weights_only=True: .*holds Python objects, which could run code"
VERBS = ["fit", "validate", "test", "predict"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's checkpoint."""
    runner = quiet_trainer(tmp_path_factory.mktemp("run"), max_steps=1)
    runner.fit(PretrainModule(TINY, "gray:8"), loader())
    return runner.checkpoint_callback.best_model_path


def guarded_trainer(folder, **options):
    return quiet_trainer(folder, plugins=[AtomicCheckpointIO()], **options)


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
        with pytest.raises(ValueError, match=rf"bad\.ckpt {REFUSED}"):
            getattr(guarded_trainer(tmp_path, max_steps=2), verb)(
                PretrainModule(TINY, "gray:8"), loader(), ckpt_path=bad
            )
        plain = lightning.Trainer(logger=False, max_steps=2, accelerator="cpu", devices=1, enable_progress_bar=False)
        with pytest.raises(pickle.UnpicklingError):
            getattr(plain, verb)(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=bad)

    @pytest.mark.parametrize("place", ["itself", "callback", "hyper_parameters", "optimizer_states", "loops"])
    def test_any_place(self, run, tmp_path, place):
        bad = poisoned(run, place, tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=rf"bad\.ckpt {REFUSED}"):
            guarded_trainer(tmp_path, max_steps=2).fit(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=bad)
        with pytest.raises(pickle.UnpicklingError):
            PretrainModule.load_from_checkpoint(bad)

    def test_the_sharding_strategy(self, run, tmp_path):
        """It opens files itself, to map them."""
        bad, strategy = poisoned(run, "extra", tmp_path / "bad.ckpt"), FullyShardedStrategy(1)
        with pytest.raises(ValueError, match=REFUSED):
            strategy.load_checkpoint(bad)
        with pytest.raises(ValueError, match="not fetched"):
            strategy.load_checkpoint("https://a/x.ckpt")

    def test_torch_is_told_and_not_left_to_choose(self, run, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
        bad = poisoned(run, "extra", tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match=REFUSED):
            guarded_trainer(tmp_path).validate(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=bad)

    def test_the_programs_own_word_is_respected(self, run, tmp_path):
        """Who writes weights_only=False into a program could as well write the payload there."""
        bad = poisoned(run, "extra", tmp_path / "bad.ckpt")
        model = PretrainModule(TINY, "gray:8")
        guarded_trainer(tmp_path).validate(model, loader(), ckpt_path=bad, weights_only=False, verbose=False)
        assert was_run()
        PretrainModule.load_from_checkpoint(bad, weights_only=False)
        assert was_run()

    def test_the_newest_of_a_run_is_passed_over(self, run, tmp_path, caplog):
        folder = tmp_path / "run"
        folder.mkdir()
        shutil.copy(run, folder / "good.ckpt")
        poisoned(run, "extra", folder / "newest.ckpt")
        assert "good.ckpt" in load_pretrained(folder).origin
        assert "newest.ckpt is skipped" in caplog.text and "could run code" in caplog.text


ADDRESS = "http://127.0.0.1:9/x.ckpt"


@pytest.fixture
def asked(monkeypatch):
    """What something connects to."""
    asked = []

    def connect(self, address):
        asked.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr("socket.socket.connect", connect)
    return asked


def test_nothing_is_fetched(asked, tmp_path):
    with pytest.raises(OSError, match="urlopen"):
        urllib.request.urlopen(ADDRESS)
    assert asked.pop() == ("127.0.0.1", 9)
    for open_it in (
        lambda: guarded_trainer(tmp_path).validate(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=ADDRESS),
        lambda: guarded_trainer(tmp_path).fit(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=ADDRESS),
        lambda: load_pretrained(ADDRESS),
        lambda: Palette.load(ADDRESS),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=r"x\.ckpt"):
            open_it()
    assert asked == []


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
        assert done.config["model"]["init_args"]["lr"] == 0.125


def test_palettes_of_objects(tmp_path):
    np.save(tmp_path / "p.npy", np.array([[Payload(), 1, 2]] * 2, dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        Palette.load(tmp_path / "p.npy")


DEMOS = "lightning.pytorch.demos.boring_classes.Boring"
RECIPE = {
    "model": {"class_path": f"{DEMOS}Model"},
    "data": {"class_path": f"{DEMOS}DataModule"},
    "trainer": {"max_steps": 1, "accelerator": "cpu", "logger": False},
}


class TestRecipes:
    """With Lightning's own model and data, too, a recipe has no checkpoint run code or be fetched."""

    @pytest.mark.parametrize("extra", [{}, {"weights_only": False}])
    @pytest.mark.parametrize("verb", VERBS)
    def test_a_checkpoint_with_code(self, run, tmp_path, verb, extra):
        poisoned(run, "extra", tmp_path / "bad.ckpt")
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"ckpt_path": "bad.ckpt"} | extra))
        with pytest.raises(SystemExit) as stop:
            main([verb, "--config", "recipe.yaml"])
        assert stop.value.code not in (0, None)

    def test_an_address(self, asked, tmp_path):
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"ckpt_path": ADDRESS}))
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
    runner = guarded_trainer(tmp_path, max_steps=checkpoint["global_step"] + 3, callbacks=[callback])
    runner.fit(PretrainModule(TINY, "gray:8"), loader(), ckpt_path=tmp_path / "hostile.ckpt")
    assert (victim / "thesis.tex").exists() and list(own.glob("*.ckpt"))
