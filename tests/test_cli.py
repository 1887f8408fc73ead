"""The command line: what it understands, what it refuses, and that nothing a user says is silently dropped."""

import contextlib
import copy
import functools
import http.server
import importlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import torch
import yaml
from filelock import FileLock
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_igpt
from lightning_igpt import cli, load_pretrained
from lightning_igpt.__main__ import OWN_VERBS, main
from lightning_igpt.commands import recipe_words, recipes
from lightning_igpt.commands.arguments import one_line_errors
from lightning_igpt.commands.help import parameters, texts, verbs
from lightning_igpt.report import read_curves
from lightning_igpt.trainer import make_trainer

NETWORK = {"n_layer": 1, "n_head": 1, "n_embd": 8, "vocab_size": 4, "image_size": 8}
RECIPE = {
    "model": {"class_path": "PretrainModule", "init_args": {"network": NETWORK, "palette": "gray:4"}},
    "data": {"class_path": "PretrainDataModule", "init_args": {"source": "digits", "batch_size": 4}},
    "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 1, "precision": "32-true"}
    | {"limit_val_batches": 2, "limit_test_batches": 2, "default_root_dir": "runs/pretrain"}
    | dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False),
}


def write(path, **changes):
    """Write RECIPE with some of its sections changed."""
    path.write_text(yaml.safe_dump({key: RECIPE[key] | changes.get(key, {}) for key in RECIPE}))
    return str(path)


def downstream(path, kind, pretrained):
    """Write a recipe that probes or fine-tunes."""
    init_args = {"pretrained": str(pretrained)} if pretrained else {"network": NETWORK, "palette": "gray:4"}
    return write(
        path,
        model={"class_path": f"{kind}Module", "init_args": init_args},
        data={"class_path": f"{kind}DataModule"},
        trainer={"max_steps": -1, "max_epochs": 1, "limit_train_batches": 2, "default_root_dir": f"runs/{kind}"},
    )


def printed(*words):
    """The configuration as the command line understands it; nothing is built."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main(["fit", *words, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(out.getvalue())


def refusal(words):
    """The message with which the program ends: one line, and exit status 1."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    message = stop.value.code
    assert isinstance(message, str)  # which the interpreter prints, and exits with 1
    assert message.startswith(f"lightning-igpt {words[0]}: ")
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def _work_in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished pretraining run: the command line object, and the absolute path of its newest checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        done = cli.run(["fit", "--config", write(folder / "recipe.yaml")])
    return done, max(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)


def in_a_new_process(*words):
    """Run Python where the package can be imported; returns its output and the seconds it took."""
    environment = os.environ | {"PYTHONPATH": str(Path(lightning_igpt.__file__).parents[1])}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, time.perf_counter() - start


class TestVerbs:
    def test_version_answers_at_once(self):
        out, seconds = in_a_new_process("-m", "lightning_igpt", "--version")
        assert out.split() == ["lightning-igpt", lightning_igpt.__version__]
        assert seconds < 2

    def test_wrong_usage_help_and_recipes_are_answered_without_torch(self):
        wrong = ["fit --no_option 1", "fit -c nothing", "test -c digits_tiny_probe --ckpt_path nothing.ckpt"]
        wrong += ["fit --help", "fit --trainer.max_stepz 1", "fit --resume nothing", "fit --data.source nothing"]
        wrong += ["complete --pretrained nothing --images digits", "score --no_option", "lowdata --help", "data show"]
        wrong += ["score --images digits --against nowhere", "score --images digits --n_draws 5"]
        code = "import sys; from contextlib import suppress; from lightning_igpt.__main__ import main\n"
        code += f"for words in {wrong}:\n with suppress(SystemExit): main(words.split())\n"
        out, _ = in_a_new_process("-c", f"{code}main(['recipes', 'list']); print(*sys.modules)")
        assert not {"torch", "lightning", "datasets", "transformers", "omegaconf"} & set(out.splitlines()[-1].split())
        assert "digits_tiny_pretrain" in out

    def test_signatures_read_from_source_files_are_those_of_the_functions(self):
        pairs = [*zip(recipe_words.trainers(), (make_trainer, Trainer.__init__), strict=True)]
        for verb in OWN_VERBS:
            module = importlib.import_module(f"lightning_igpt.commands.{verb}")
            pairs += [(outline, getattr(module, outline.__name__)) for outline in verbs(verb).values()]
        for outline, function in pairs:
            read, meant = parameters(outline), parameters(function)
            assert [(name, part.default) for name, part in read.items()] == [(n, p.default) for n, p in meant.items()]
            assert texts(outline) == texts(function)
            if function not in (make_trainer, Trainer.__init__):
                hints = get_type_hints(function)
                assert all(part.annotation == hints[name] for name, part in read.items())

    @pytest.mark.parametrize(("typed", "meant"), [("fitt", "fit"), ("complet", "complete"), ("recipe", "recipes")])
    def test_a_misspelt_verb_is_wrong_usage_with_a_hint(self, typed, meant, capsys):
        with pytest.raises(SystemExit) as stop:
            main([typed])
        assert stop.value.code == 2
        assert f"{typed!r}; did you mean {meant!r}?" in capsys.readouterr().err


class TestConfig:
    def test_the_name_of_a_shipped_recipe_and_its_path_are_the_same(self, tmp_path):
        by_name = printed("--config", "digits_tiny_pretrain")
        assert by_name == printed(f"--config={recipes.folder() / 'digits_tiny_pretrain.yaml'}")
        assert by_name == printed("-c", "digits_tiny_pretrain.yaml")
        assert by_name["model"]["init_args"]["palette"] == "gray:16"
        write(tmp_path / "digits_tiny_pretrain.yaml")  # a file here wins over a shipped recipe
        assert printed("--config", "digits_tiny_pretrain.yaml")["model"]["init_args"]["palette"] == "gray:4"

    @pytest.mark.parametrize("order", [("steps.yaml", "warmup.yaml"), ("warmup.yaml", "steps.yaml")])
    @pytest.mark.parametrize(("flags", "steps"), [([], 3), (["--trainer.max_steps", "5"], 5)])
    def test_one_file_refers_to_a_value_of_another(self, order, flags, steps, tmp_path):
        (tmp_path / "steps.yaml").write_text("trainer: {max_steps: 3}")
        warmup = RECIPE["model"]["init_args"] | {"warmup_steps": "${trainer.max_steps}"}
        model = RECIPE["model"] | {"init_args": warmup}
        (tmp_path / "warmup.yaml").write_text(yaml.safe_dump({"model": model, "data": RECIPE["data"]}))
        config = printed(*(word for file in order for word in ("--config", file)), *flags)
        assert config["trainer"]["max_steps"] == steps
        assert config["model"]["init_args"]["warmup_steps"] == steps

    def test_the_saved_configuration_runs_again_as_it_is(self, trained):
        first, checkpoint = trained
        saved = checkpoint.parents[1] / "config.yaml"
        assert saved.is_file()
        second = cli.run(["fit", "--config", str(saved)])
        assert first.trainer.callback_metrics == second.trainer.callback_metrics
        assert "val/nats_per_pixel" in second.trainer.callback_metrics


class TestCheckpoints:
    @pytest.mark.parametrize("verb", ["validate", "test", "predict"])
    @pytest.mark.parametrize("kind", ["Pretrain", "Probe", "FineTune"])
    def test_random_weights_are_not_evaluated(self, verb, kind, trained, tmp_path):
        path = tmp_path / "recipe.yaml"
        for pretrained in (None, trained[1])[: 1 + (kind != "Pretrain")]:  # under an untrained classifier
            config = write(path) if kind == "Pretrain" else downstream(path, kind, pretrained)
            assert "--random_weights true" in refusal([verb, "--config", config])

    def test_pretrained_weights_can_be_evaluated_without_a_run(self, trained, tmp_path):
        done, checkpoint = trained
        model = {"init_args": {"pretrained": str(checkpoint)}}
        config = write(tmp_path / "recipe.yaml", model=model, trainer={"max_steps": -1})  # evaluation needs no length
        again = cli.run(["validate", "--config", config])
        expected = done.trainer.callback_metrics["val/nats_per_pixel"]
        assert again.trainer.callback_metrics["val/nats_per_pixel"] == expected

    def test_the_checkpoint_does_not_change_what_recipe_and_flags_say(self, trained, tmp_path):
        config = write(tmp_path / "recipe.yaml", trainer={"max_steps": 4})
        words = ["--config", config, "--ckpt_path", str(trained[1]), "--model.init_args.lr", "0.125"]
        resumed = cli.run(["fit", *words])
        assert resumed.trainer.global_step == 4
        assert resumed.model.lr == resumed.model.hparams["lr"] == 0.125
        assert resumed.config["model"]["init_args"]["lr"] == 0.125
        for group in resumed.trainer.optimizers[0].param_groups:  # whose state comes from the checkpoint
            assert group["initial_lr"] == 0.125
        assert set(resumed.trainer.lr_scheduler_configs[0].scheduler.base_lrs) == {0.125}


class TestErrors:
    @pytest.mark.parametrize(
        ("flag", "value", "told"),
        [
            ("model.init_args.palette", "gray:8", "the palette has 8 colors but the network's vocab_size is 4"),
            ("model.init_args.network", "igpt_z", "igpt_z"),
            ("data.init_args.batch_size", "0", "batch_size is 0; it must be at least 1"),
            ("data.init_args.source", "nowhere", "no file or folder of that name is here"),
            ("data.init_args.source", " ", "source is empty"),
            ("model.init_args.palette", "", "palette is empty"),
            ("trainer.precision", "int8", "trainer: Precision 'int8' is invalid"),
            ("trainer.strategy", "quick", "trainer: You selected an invalid strategy name"),
            ("seed_everything", "-1", "seed_everything is -1; it must be from 0 to"),
            ("data.init_args.source", "/dev/null", "/dev/null is no Parquet file"),
            ("trainer", "{max_steps: -1, max_epochs: 1, val_check_interval: 999}", "(999) must be less than or equal"),
        ],
    )
    def test_a_users_mistake_is_told_in_one_line(self, flag, value, told, tmp_path):
        assert told in refusal(["fit", "--config", write(tmp_path / "recipe.yaml"), f"--{flag}", value])

    def test_the_variable_brings_the_traceback_back(self, monkeypatch):
        monkeypatch.setenv("LIGHTNING_IGPT_TRACEBACK", "1")
        with pytest.raises(FileNotFoundError, match="digits_tiny_pretrian"):
            main(["fit", "--config", "digits_tiny_pretrian"])

    def test_an_error_of_someone_elses_keeps_its_traceback(self):
        with pytest.raises(ValueError, match="invalid literal"), one_line_errors("lightning-igpt fit"):
            int("three")


class TestRecipes:
    def test_list_and_show(self, capsys):
        assert main(["recipes", "list"]) == 0
        out = capsys.readouterr().out
        assert re.findall(r"^\w+", out, re.MULTILINE) == recipes.names() and max(map(len, out.splitlines())) <= 80
        assert main(["recipes", "show", "digits_tiny_probe"]) == 0
        assert capsys.readouterr().out == (recipes.folder() / "digits_tiny_probe.yaml").read_text()
        for words in (["recipes", "show", "digits_tiny_prob"], ["fit", "--config", "digits_tiny_prob.yaml"]):
            assert "; did you mean 'digits_tiny_probe' or " in refusal(words)

    def test_copy_replaces_nothing_unasked(self, tmp_path):
        text = recipes.find("digits_tiny_probe").read_text()
        for to in ("mine.yaml", "new/folder/digits_tiny_probe.yaml"):
            words = ["recipes", "copy", "digits_tiny_probe", "--to", to.removesuffix("/digits_tiny_probe.yaml")]
            assert main(words) == 0
            assert (tmp_path / to).read_text() == text
        mine = tmp_path / "digits_tiny_probe.yaml"
        mine.write_text("# my changes\n")
        assert "--overwrite" in refusal(["recipes", "copy", "digits_tiny_probe"])
        assert mine.read_text() == "# my changes\n"
        assert main(["recipes", "copy", "digits_tiny_probe", "--overwrite"]) == 0
        assert mine.read_text() == text


TRAP = """
open("executed", "w").close()
from lightning.pytorch import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

class Trap(Callback):
    pass

class IO(TorchCheckpointIO):
    pass

def function(*args):
    pass
"""
LAMBDA = {"class_path": "lightning.pytorch.callbacks.LambdaCallback"}
REEXPORTED = "lightning.pytorch.trainer.connectors.signal_connector.os.system"


@pytest.mark.parametrize(
    "section, value",
    [
        ("trainer", {"callbacks": [{"class_path": "trap.Trap"}]}),
        ("trainer", {"callbacks": {"class_path": "trap.Trap"}}),
        ("trainer", {"callbacks": ["trap.Trap"]}),
        ("trainer", {"plugins": [{"class_path": "trap.IO"}]}),
        ("trainer", {"logger": {"class_path": "trap.Trap"}}),
        ("trainer", {"strategy": {"class_path": "trap.Trap"}}),
        ("trainer", {"profiler": {"class_path": "trap.Trap"}}),
        ("trainer", {"callbacks": [LAMBDA | {"init_args": {"on_fit_start": "trap.function"}}]}),
        ("trainer", {"callbacks": [LAMBDA | {"init_args": {"on_fit_start": "os.system"}}]}),
        ("trainer", {"callbacks": [{"class_path": REEXPORTED}]}),
        ("model", {"class_path": "trap.Trap"}),
        ("data", {"class_path": "trap.Trap"}),
        ("data", {"init_args": {"source": {"class_path": "trap.Trap"}}}),
        ("model", {"init_args": {"network": {"class_path": "trap.Trap"}}}),
        ("trainer", {"callbacks": [{"class_path": "trap.Trap"}], "trust": ["trap"]}),
    ],
)
def test_a_recipe_cannot_have_a_module_imported(section, value, tmp_path, monkeypatch, capsys):
    (tmp_path / "trap.py").write_text(TRAP)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", write(tmp_path / "recipe.yaml", **{section: value})])
    assert stop.value.code not in (0, None)
    assert not (tmp_path / "executed").exists() and "trap" not in sys.modules
    if section == "trainer" and len(value) == 1:
        assert ("system" if "system" in str(value) else "trap.") in str(stop.value.code) + capsys.readouterr().err


def test_a_class_of_others_runs_once_it_is_trusted(tmp_path, monkeypatch, capsys):
    (tmp_path / "trap.py").write_text(TRAP)
    monkeypatch.syspath_prepend(tmp_path)
    named = {"callbacks": ["trap.Trap"], "plugins": [{"class_path": "trap.IO"}]}
    recipe = write(tmp_path / "recipe.yaml", trainer=named)
    for trust in ([], ["--trust", "trap.Trap"]):  # IO is another class
        with pytest.raises(SystemExit, match="2"):
            main(["fit", "--config", recipe, *trust])
        assert "--trust NAME" in capsys.readouterr().err and Path("executed").exists() == bool(trust)
    assert main(["fit", "--config", recipe, "--trust", "trap"]) == 0


@pytest.mark.parametrize("words", [["--trust=no-name"], ["--trust", "jsonargparse"], ["--trust="]])
def test_trust_takes_a_name(words):
    assert "--trust" in refusal(["fit", "--config", "digits_tiny_pretrain", *words])


def test_resume_auto(tmp_path):
    recipe = write(tmp_path / "recipe.yaml", trainer={"max_steps": 4, "checkpoint_every": 3})
    assert main(["fit", "--config", recipe, "--resume", "auto"]) == 0  # nothing there yet
    whole = load_pretrained("runs/pretrain").network.state_dict()
    (final,) = Path("runs/pretrain").rglob("final.ckpt")
    final.write_bytes(final.read_bytes()[:5000])  # as a kill in another program's save might leave it
    assert main(["fit", "--config", recipe, "--resume", "auto"]) == 0
    (again,) = [path for path in final.parent.glob("final*.ckpt") if path != final]
    state = load_pretrained(again).network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in whole.items())
    assert torch.load(again, weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("logger", [None, "CSVLogger"])
def test_a_resumed_run_continues_in_its_folder_unless_that_is_in_use(logger, tmp_path, caplog):
    given = {"logger": {"class_path": logger, "init_args": {"save_dir": "runs/pretrain"}}} if logger else {}
    trainer = {"max_steps": 6, "checkpoint_every": 3, "log_every_n_steps": 1} | given
    recipe = write(tmp_path / "recipe.yaml", trainer=trainer)
    whole = cli.run(["fit", "--config", recipe])
    folder = Path(whole.trainer.log_dir)
    rows = read_curves(folder / "metrics.csv")
    best = whole.trainer.checkpoint_callback.best_model_path
    assert f"next: lightning-igpt complete --pretrained {folder} --images digits" in caplog.text
    (step,) = folder.rglob("step=6.ckpt")
    other = write(tmp_path / "longer.yaml", trainer=trainer | {"max_steps": 9})
    assert Path(cli.run(["fit", "-c", other, "--ckpt_path", str(step)]).trainer.log_dir) == folder and best
    curves = read_curves(folder / "metrics.csv")["train/nats_per_pixel"]
    assert curves[0] == list(range(9)) and curves[1][:6] == rows["train/nats_per_pixel"][1]
    assert len(json.loads((folder / "run.json").read_text())["runs"]) == 2 and f"step 6 of {step}" in caplog.text
    events = EventAccumulator(str(folder)).Reload() if not logger else None
    assert not events or [event.step for event in events.Scalars("train/nats_per_pixel")] == list(range(9))
    with FileLock(folder / ".lock"):
        again = cli.run(["fit", "-c", other, "--ckpt_path", str(step)])
    assert Path(again.trainer.log_dir) == folder.with_name("version_1")


def test_a_run_that_fails_before_it_begins_leaves_no_folder(tmp_path):
    recipe = write(tmp_path / "recipe.yaml", data={"init_args": {"source": "nowhere", "batch_size": 4}})
    assert "nowhere" in refusal(["fit", "--config", recipe])
    assert [*tmp_path.iterdir()] == [tmp_path / "recipe.yaml"]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--resume", "nowhere"], "does not exist"),
        (["--resume", "."], "has no checkpoint"),
        (["--resume", "auto", "--ckpt_path", "x.ckpt"], "drop one of them"),
        (["--resume", "recipe.yaml"], "weights_only=True|damaged"),
        (["--resume", ""], "resume is empty"),
        (["--ckpt_path", ""], "ckpt_path is empty"),
        (["--data.source", "${data_dir"], "data.init_args.source .*a reference is"),
        (["--model.lr", "${trainer.max_stepz}"], "max_stepz"),
    ],
)
def test_resume_refuses(words, message, tmp_path):
    assert re.search(message, refusal(["fit", "--config", write(tmp_path / "recipe.yaml"), *words]))


def test_random_weights_on_demand(tmp_path, caplog):
    recipe = write(tmp_path / "recipe.yaml")
    assert main(["validate", "--config", recipe, "--random_weights", "true"]) == 0
    assert "these are random weights" in caplog.text


@pytest.fixture
def website():
    """The address of a server, and the paths that were asked for."""
    asked, served = [], http.server.SimpleHTTPRequestHandler
    kind = type("Counting", (served,), {"log_request": lambda handler, *args: asked.append(handler.path)})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


@pytest.mark.parametrize("mode", ["--print_config", "--dry_run"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("trainer.default_root_dir", "ADDRESS/${oc.env:PATH}"),
        ("trainer.logger", {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "ADDRESS"}}),
        ("trainer.callbacks", [{"class_path": "ModelCheckpoint", "init_args": {"dirpath": "blockcache::ADDRESS"}}]),
        ("model.init_args.palette", "ADDRESS/palette.npy"),
        ("model.init_args.pretrained", "ADDRESS/final.ckpt"),
        ("model", "ADDRESS/model.yaml"),
        ("data.init_args.source", "ADDRESS/photos"),
        ("ckpt_path", "ADDRESS/final.ckpt"),
    ],
)
def test_a_recipe_opens_no_address(key, value, mode, website, tmp_path, capsys):
    address, asked = website
    config = {**copy.deepcopy(RECIPE), "ckpt_path": None}
    *parents, last = key.split(".")
    place = functools.reduce(dict.__getitem__, parents, config)
    place[last] = value
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config).replace("ADDRESS", address))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "recipe.yaml", mode])
    assert asked == [] and [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
    if mode == "--dry_run":
        assert address in str(stop.value.code) + capsys.readouterr().err


def test_addresses_that_are_typed_or_trusted(tmp_path):
    recipe = write(tmp_path / "recipe.yaml", trainer={"default_root_dir": "memory://runs"})
    words = ["fit", "--config", recipe, "--dry_run"]
    assert "--trust memory://runs" in refusal([*words, "--trust", "memory://run"])
    assert "--trust memory://runs" in refusal([*words, "--data.source", "memory://runs/photos"])
    for trust in (["--trust", "memory://"], ["--trust", "memory://runs"], ["--trainer.default_root_dir", "memory://x"]):
        assert main([*words, *trust]) == 0
    assert "nothing can be saved" in refusal([*words, "--trainer.default_root_dir", "http://127.0.0.1/x"])


@pytest.mark.parametrize("text", ["2024", "007", "on", "1.5"])
@pytest.mark.parametrize(("section", "key"), [("data", "image_column"), ("model", "palette")])
def test_texts_that_yaml_reads_otherwise_are_to_be_quoted(section, key, text, tmp_path, capsys):
    write(tmp_path / "recipe.yaml")
    (tmp_path / "more.yaml").write_text(f"{section}: {{init_args: {{{key}: {text}}}}}")
    with pytest.raises(SystemExit, match="2"):
        main(["fit", "--config", "recipe.yaml", "--config", "more.yaml"])
    assert f': {key} is {text}, which YAML does not read as text; quote it: {key}: "{text}".' in capsys.readouterr().err


def test_short_names_of_classes_in_a_cli_of_ones_own():
    code = """
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule
import lightning_igpt
words = ["--trainer.callbacks", "CompletionGrid", "--model.network", "igpt_tiny", "--model.palette", "gray:512"]
LightningCLI(lightning_igpt.PretrainModule, BoringDataModule, run=False, args=words)
words += ["--model", "PretrainModule", "--data", "ProbeDataModule", "--data.source", "digits"]
print(type(LightningCLI(run=False, args=words[:2] + words[6:8] + words[2:6] + words[8:]).datamodule))
"""
    assert "ProbeDataModule" in in_a_new_process("-c", code)[0]


@pytest.mark.parametrize(("platform", "libc"), [("linux", "gnu_get_libc_version"), ("linux", "musl"), ("darwin", "")])
def test_only_glibc_keeps_memory_between_steps(platform, libc, monkeypatch):
    seen, parts = [], {"mallopt": lambda *call: seen.append(call), libc: 0}
    monkeypatch.setattr("ctypes.CDLL", lambda _: SimpleNamespace(**parts))
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("lightning_igpt.__main__._run", lambda words: None)
    assert main(["recipes"]) == main(["fit"]) == 0
    assert seen == ([(-1, 2**31 - 1), (-4, 0)] if libc.startswith("gnu") else [])
