import inspect
import os
import random
import re
import shlex
import socket
import subprocess
import time

import pytest
import torch
import yaml
from lightning_igpt.commands.launch_batch import BATCH_SIZE, OURS, Recipe
from torch.distributed.run import get_args_parser

from lightning_igpt import data
from lightning_igpt.__main__ import main
from lightning_igpt.commands import launch, recipes
from tests.commands import slurm
from tests.drills.run import RECIPE, ROOT, SLOW, assert_same_end
from tests.leftovers import end_all_in, working_in

DATA = {"class_path": "PretrainDataModule", "init_args": {"source": "digits", "batch_size": 8}}
TRAINER = {"devices": 8, "accumulate_grad_batches": 2, "val_check_interval": 20, "limit_val_batches": 40}
HOSTILE = [
    "$(touch executed)",
    "`touch executed`",
    "'; touch executed; '",
    '"; touch executed #',
    "a b",
    "*",
    "\\",
    "~",
    "",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, with the programs of SLURM."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{slurm.install(tmp_path / 'bin')}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


def write(path="recipe.yaml", **sections):
    with open(path, "w") as file:
        yaml.safe_dump({"model": {"class_path": "PretrainModule"}, "data": DATA, "trainer": TRAINER} | sections, file)
    return str(path)


def words(config="recipe.yaml", nodes=1, gpus=8, time="1:00:00"):
    return ["slurm", "--config", config, "--nodes", str(nodes), "--gpus", str(gpus), "--time", time]


def script(*more, **options):
    """The script, which bash takes."""
    assert launch.run([*words(**options), "--out", "job.sh", "--overwrite", *more]) == 0
    assert subprocess.run(["bash", "-n", "job.sh"], check=False).returncode == 0
    with open("job.sh") as file:
        return file.read()


def directives(text):
    """Those before the first command, which are all that sbatch reads."""
    head = re.match(r"(?:#.*\n|\n)*", text)[0]
    return dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", head, re.MULTILINE))


def refused(capsys, *own):
    with pytest.raises(SystemExit) as stop:
        launch.run(list(own))
    assert str(stop.value.code).startswith("lightning-igpt launch: ") and "\n" not in stop.value.code
    return stop.value.code


class TestScript:
    def test_it_is_complete(self, here, capsys):
        write()
        assert launch.run(words(nodes=4)) == 0
        text, told = capsys.readouterr()
        assert directives(text) == {
            "job-name": "recipe", "output": "recipe-%j.out", "nodes": "4", "ntasks-per-node": "8", "gpus-per-node": "8",
            "cpus-per-task": "1", "time": "1:00:00", "signal": "SIGUSR1@120", "requeue": "", "open-mode": "append",
        }  # fmt: skip
        assert shlex.split(text.rpartition("\nsrun ")[2].replace("\\\n", " ")) == [
            *("--kill-on-bad-exit=0", "--wait=60", "lightning-igpt", "fit", "--config", "recipe.yaml"),
            *("--trainer.num_nodes", "4", "--trainer.devices", "8", "--resume", "auto"),
            *("--trainer.accumulate_grad_batches", "1", "--data.init_args.batch_size", "4"),
            *("--trainer.val_check_interval", "10", "--trainer.limit_val_batches", "20"),
        ]
        assert "accumulate_grad_batches 2 -> 1, batch_size 8 -> 4" in told
        assert "accumulate_grad_batches 2 -> 1, batch_size 8 -> 4" in text
        assert all(len(line) <= 120 for line in text.splitlines())

    def test_every_option_has_its_place(self, here):
        write(data=DATA | {"init_args": DATA["init_args"] | {"num_workers": 6}})
        assert directives(script())["cpus-per-task"] == "7"
        text = script(
            *("--partition", "gpu,big", "--account", "lab-1", "--qos", "high", "--constraint", "[a100|h100]&ib"),
            *("--cpus-per-gpu", "5", "--mem", "0", "--job_name", "run.1", "--signal-seconds=300"),
            *("--setup", "module load cuda; source venv/bin/activate", "--", "--trainer.strategy", "ddp"),
        )
        found = directives(text)
        assert found["partition"] == "gpu,big" and found["constraint"] == "[a100|h100]&ib" and found["qos"] == "high"
        assert found["account"] == "lab-1" and found["mem"] == "0" and found["signal"] == "SIGUSR1@300"
        assert found["job-name"] == "run.1" and found["output"] == "run.1-%j.out" and found["cpus-per-task"] == "5"
        assert "SRUN_CPUS_PER_TASK=5 " in text and "\nmodule load cuda; source venv/bin/activate\n" in text
        assert text.endswith("--trainer.strategy ddp\n")

    @pytest.mark.parametrize("word", HOSTILE)
    def test_no_word_can_run_a_command(self, here, word):
        path = f"{word.replace('/', '')}.yaml"
        write(path)
        script("--", "--model.init_args.palette", word, config=path)
        done = slurm.batch(here / "job.sh", here, SRUN_STATUS="0")
        assert done.wait(timeout=60) == 0
        asked = slurm.asked_of_srun(here)
        assert asked[-2:] == ["--model.init_args.palette", word] and asked[asked.index("--config") + 1] == path
        assert not (here / "executed").exists()

    @pytest.mark.parametrize("name", ["job-name", "partition", "account", "qos", "constraint", "mem", "time"])
    @pytest.mark.parametrize(
        "value", ["a\n#SBATCH --wrap=x", "a --wrap=x", "a'", 'a"', "a\\", "a#b", "$(x)", "`x`", "", "é"]
    )
    def test_no_value_can_bring_a_directive(self, here, name, value, capsys):
        write()
        told = refused(capsys, *words(), f"--{name}={value}", "--out", "job.sh")
        assert name.replace("-", "_") in told.replace("-", "_")
        assert not (here / "job.sh").exists()

    @pytest.mark.parametrize("name", ["setup", "container", "config"])
    def test_line_breaks_are_refused(self, here, name, capsys):
        write()
        own = words(config="a\nb.yaml") if name == "config" else [*words(), f"--{name}", "a\n#SBATCH --wrap=x"]
        assert "line breaks" in refused(capsys, *own)
        assert "line breaks" in refused(capsys, *words(), "--", "--x", "a\rb")

    def test_setup_cannot_bring_a_directive(self, here):
        write()
        head, _, _ = script("--setup", "#SBATCH --wrap=x").partition("export ")
        assert "wrap" not in head  # sbatch reads no further than to the first command

    @pytest.mark.parametrize(
        "setup",
        [
            "source 'venv",
            "cat <<EOF",
            "true ||",
            "true &&",
            "true |",
            "true \\",
            "if true; then",
            "f() {",
            "x=$(ls",
            "fi",
        ],
    )
    def test_a_setup_that_is_not_closed_is_refused(self, here, setup, capsys):
        write()
        told = refused(capsys, *words(), "--setup", setup, "--out", "job.sh")
        assert "setup is no whole shell command" in told and not (here / "job.sh").exists()

    @pytest.mark.parametrize(
        "setup", ["true; true", "export A=é # it's \\", "true &", "(true) && x=$(ls)", "cat <<< a"]
    )
    def test_a_whole_setup_is_taken(self, here, setup, monkeypatch):
        write()
        monkeypatch.setenv("LC_ALL", "no_such.locale")  # bash warns about it
        script("--setup", setup)
        assert slurm.batch(here / "job.sh", here, SRUN_STATUS="3").wait(timeout=60) == 3

    def test_a_container_has_no_scontrol(self, here):
        write()
        script("--container", "docker://image:1")
        for status, requeued in ((0, False), (1, False), (143, True)):
            (here / "scontrol.txt").unlink(missing_ok=True)
            assert slurm.batch(here / "job.sh", here, SRUN_STATUS=str(status)).wait(timeout=60) == status
            assert (here / "scontrol.txt").exists() == requeued
        assert (here / "scontrol.txt").read_text() == "requeue 14711\n"
        assert slurm.asked_of_srun(here)[2:8] == [
            "apptainer",
            "exec",
            "--nv",
            "docker://image:1",
            "lightning-igpt",
            "fit",
        ]

    @pytest.mark.parametrize(
        "time, seconds",
        [
            ("90", 5400),
            ("5:30", 330),
            ("1:00:00", 3600),
            ("0-5", 18000),
            ("0-3:4", 11040),
            ("0-0:1:1", 61),
            ("1-0", 65536),
        ],
    )
    def test_the_signal_comes_before_the_end(self, here, time, seconds, capsys):
        write()
        assert f"time is {time!r}" not in script("--signal-seconds", str(min(seconds - 1, 65535)), time=time)
        assert "it must be from 1 to" in refused(capsys, *words(time=time), "--signal-seconds", str(seconds))
        assert "it must be from 1 to" in refused(capsys, *words(time=time), "--signal-seconds", "0")

    @pytest.mark.parametrize("time", ["0", "0:00:00", "UNLIMITED", "infinite"])
    def test_no_limit_of_time_limits_no_signal(self, here, time, capsys):
        write()
        found = directives(script("--signal-seconds", "65535", time=time))
        assert found["time"] == time and found["signal"] == "SIGUSR1@65535"
        assert "from 1 to 65535" in refused(capsys, *words(time=time), "--signal-seconds", "65536")
        assert "too short" in refused(capsys, *words(time="0:01"))

    def test_fit_takes_what_the_script_says(self, here, capsys):
        write(model=RECIPE["model"])
        script("--", "--trainer.accelerator", "cpu", nodes=2, gpus=2)
        slurm.batch(here / "job.sh", here, SRUN_STATUS="0").wait(timeout=60)
        asked = slurm.asked_of_srun(here)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*asked[asked.index("fit") :], "--print_config"])
        assert stop.value.code == 0
        printed = yaml.safe_load(capsys.readouterr().out)
        trainer = printed["trainer"]
        assert int(trainer["devices"]) * trainer["num_nodes"] * trainer["accumulate_grad_batches"] == 16
        assert printed["data"]["init_args"]["batch_size"] == 8 and printed["resume"] == "auto"


class TestFiles:
    def test_a_name_that_begins_with_a_dash(self, here, capsys):
        write("-r.yaml", model=RECIPE["model"])
        launch.run(["slurm", "--config=-r.yaml", *words()[3:], "--out", "job.sh", "--", "--config=-r.yaml"])
        slurm.batch(here / "job.sh", here, SRUN_STATUS="0").wait(timeout=60)
        asked = slurm.asked_of_srun(here)
        assert asked.count("--config=-r.yaml") == 2
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([*asked[asked.index("fit") :], "--trainer.accelerator", "cpu", "--print_config"])
        assert stop.value.code == 0 and "num_nodes: 1" in capsys.readouterr().out

    def test_nothing_is_written_for_a_recipe_that_is_not_there(self, here, capsys):
        assert "digits_tiny_pretrain" in refused(capsys, *words(config="digits_tiny_pretran"), "--out", "job.sh")
        (here / "text.yaml").write_text("- a list")
        assert "is no recipe" in refused(capsys, *words(config="text.yaml"), "--out", "job.sh")
        (here / "broken.yaml").write_text("a: [")
        assert "cannot be read as YAML" in refused(capsys, *words(config="broken.yaml"), "--out", "job.sh")
        assert not (here / "job.sh").exists()

    def test_a_file_that_is_there_stays(self, here, capsys):
        write()
        (here / "job.sh").write_text("mine")
        assert "--overwrite true" in refused(capsys, *words(), "--out", "job.sh")
        assert (here / "job.sh").read_text() == "mine"

    def test_submit(self, here, capsys, monkeypatch):
        write()
        assert launch.run(words()) == 0
        text = capsys.readouterr().out
        assert launch.run([*words(), "--submit"]) == 0
        assert (here / "submitted").read_text() == text and capsys.readouterr().out == ""
        monkeypatch.setenv("SBATCH_STATUS", "1")
        assert "status 1" in refused(capsys, *words(), "--submit", "true")
        monkeypatch.setenv("PATH", "")
        assert "there is no sbatch here" in refused(capsys, *words(), "--submit", "true")

    def test_every_shipped_recipe_can_be_launched(self, here, capsys):
        for name in recipes.names():
            for nodes, gpus in ((1, 1), (1, 8)):
                Recipe(name).share(nodes, gpus)
            assert launch.run(words(config=name, nodes=2, gpus=4)) == 0, name


class TestBatch:
    def test_the_defaults_are_those_of_the_data_modules(self):
        for name in OURS:
            common = inspect.signature(data.base.ImageDataModule.__init__).parameters
            assert issubclass(getattr(data, name), data.base.ImageDataModule)
            assert common["batch_size"].default == BATCH_SIZE

    def test_the_images_of_a_step_stay(self, here):
        draws = random.Random(0)
        for _ in range(100):
            size, devices, nodes, accumulate = (draws.randint(1, 12) for _ in range(4))
            config = write(
                data=DATA | {"init_args": {"batch_size": size}},
                trainer={"devices": devices, "num_nodes": nodes, "accumulate_grad_batches": accumulate},
            )
            recipe, on = Recipe(config), (draws.randint(1, 6), draws.randint(1, 6))
            together, world = size * devices * nodes * accumulate, on[0] * on[1]
            able = [
                (a, b) for a in range(1, together + 1) for b in range(1, size + 1) if a * b * world == together
            ]  # every way there is
            if not able:
                with pytest.raises(ValueError, match=f"{together} images .* by {world} devices"):
                    recipe.share(*on)
                continue
            found = recipe.share(*on).batch
            assert (found.accumulate, found.batch_size) == min(able) and found.devices == world

    def test_what_counts_batches_of_a_device_counts_as_many_steps_and_images(self, here):
        write()
        for nodes in (1, 2, 4, 16):
            share = Recipe("recipe.yaml").share(nodes, 8)
            now = {name: after for name, (_, after) in share.changes.items()}
            assert now.get("trainer.val_check_interval", 20) == 10 * share.batch.accumulate
            images = share.batch.batch_size * share.batch.devices * now.get("trainer.limit_val_batches", 40)
            assert images == 40 * 8 * 8
        write(trainer=TRAINER | {"val_check_interval": 0.25, "limit_val_batches": 1.0})
        assert set(Recipe("recipe.yaml").share(2, 8).changes) == {"trainer.accumulate_grad_batches"}

    @pytest.mark.parametrize(
        "devices, number", [("auto", 1), (-1, 1), (4, 4), ("4", 4), ([0, 2], 2), ("0,1,3", 3), ("0,", 1)]
    )
    def test_devices_in_every_spelling(self, here, devices, number):
        recipe = Recipe(write(trainer={"devices": devices}))
        assert recipe.batch.devices == number and recipe.batch.open == (str(devices) in ("auto", "-1"))
        assert ("number of devices" in " ".join(recipe.share(1, 1).remarks)) == recipe.batch.open

    def test_what_options_say_stays(self, here):
        write()
        share = Recipe("recipe.yaml", ["--data.batch_size", "2"]).share(1, 8)
        assert (share.batch.batch_size, share.batch.accumulate) == (2, 8)
        assert (
            share.words[:2] == ["--trainer.accumulate_grad_batches", "8"]
            and "--data.init_args.batch_size" not in share.words
        )
        share = Recipe("recipe.yaml", ["--trainer.accumulate_grad_batches=1"]).share(1, 8)
        assert (share.batch.batch_size, share.batch.accumulate) == (16, 1)
        both = ["--trainer.accumulate_grad_batches=1", "--data.init_args.batch_size=8"]
        share = Recipe("recipe.yaml", both).share(4, 8)
        assert share.batch.together == 256 and "256 images" in share.remarks[0] and "128" in share.remarks[0]
        share = Recipe("recipe.yaml", ["--trainer.limit_val_batches", "3"]).share(2, 8)
        assert "trainer.limit_val_batches" not in share.changes and "trainer.val_check_interval" in share.changes
        other = write("other.yaml", trainer={"devices": 4})
        assert Recipe("recipe.yaml", ["--config", other]).batch.together == 64

    def test_what_cannot_be_shared_is_refused_with_the_numbers(self, here, capsys):
        write()
        told = refused(capsys, *words(gpus=5), "--out", "job.sh")
        assert "128 images" in told and "5 devices" in told and "take 4 or 8 devices" in told
        assert "batch_size 3" in refused(capsys, *words(), "--", "--data.batch_size", "3")
        assert "take 128 devices" in refused(capsys, *words(nodes=129, gpus=1))
        assert not (here / "job.sh").exists()

    def test_features_that_are_computed_once_may_be_divided_anyhow(self, here):
        probe = {"class_path": "ProbeDataModule", "init_args": {"batch_size": 128}}
        assert Recipe(write(data=probe, trainer={"max_epochs": 1})).share(1, 3).words == []
        probe["init_args"]["shuffle"] = True
        with pytest.raises(ValueError, match="cannot be shared by 3 devices"):
            Recipe(write(data=probe, trainer={"max_epochs": 1})).share(1, 3)

    @pytest.mark.parametrize(
        "sections, message",
        [
            ({"trainer": {"devices": "many"}}, "trainer.devices is 'many'"),
            ({"trainer": {"accumulate_grad_batches": 0}}, "must be at least 1"),
            ({"data": {"class_path": "mine.Data"}}, "Data, has no batch_size"),
            ({"data": None}, "sections model, data and trainer"),
            ({"data": [1]}, "data is [1]; it must be a section"),
            (
                {"data": {"class_path": "PretrainDataModule", "init_args": 3}},
                "data.init_args is 3; it must be a section",
            ),
            ({"trainer": 3}, "trainer is 3; it must be a section"),
            ({"model": ["a"]}, "model is ['a']; it must be a section"),
            ({"trainer": {"devices": {"a": 1}}}, "trainer.devices is {'a': 1}"),
            ({"ckpt_path": "a.ckpt"}, "--resume auto takes the newest"),
        ],
    )
    def test_bad_recipes(self, here, sections, message, capsys):
        write(**sections)
        assert message in refused(capsys, *words())

    @pytest.mark.parametrize(
        "more, message",
        [
            (["--", "--trainer.devices", "4"], "say --gpus before --"),
            (["--", "--trainer.num_nodes=2"], "say --nodes before --"),
            (["--", "--ckpt_path", "a.ckpt"], "every restart would go back"),
            (["--nodes", "0"], "nodes is 0"),
            (["--cpus_per_gpu", "0"], "cpus_per_gpu is 0"),
            (["--nodes", "1:4"], "nodes is '1:4'"),
            (["--gpus=1:4"], "gpus is '1:4'"),
            (["--cpus-per-gpu=1:4"], "cpus_per_gpu is '1:4'"),
            (["--", "--trainer", "{devices: 3}"], "--trainer follows --"),
            (["--", "--trainer={devices: 3}"], "--trainer follows --"),
            (["--", "--trainer.num_node", "3"], "--trainer.num_node follows --"),
            (["--", "--trainer.num-nodes", "3"], "say --nodes before --"),
            (["--", "--trainer.devices+", "3"], "say --gpus before --"),
            (["--", "--data", "{init_args: {batch_size: 3}}"], "such as --data.init_args.batch_size"),
            (["--", "--data.init_args={batch_size: 3}"], "such as --data.init_args.batch_size"),
            (["--", "--data.dict_kwargs.batch_size", "3"], "with batch_size 3"),
        ],
    )
    def test_bad_options(self, here, more, message, capsys):
        write()
        assert message in refused(capsys, *words(), *more)

    def test_names_of_options_may_have_dashes(self, here):
        write()
        text = script(
            "--", "--trainer.accumulate-grad-batches", "1", "--model.network=igpt-x", "--logger-x", "a-b", "-1-2"
        )
        assert text.endswith(
            "--trainer.accumulate_grad_batches 1 \\\n  --model.network=igpt-x \\\n  --logger_x a-b -1-2\n"
        )
        assert "batch_size 8 -> 16" in text

    @pytest.mark.parametrize(
        "more", [["--config", "b2.yaml"], ["--config=b2.yaml"], ["-c", "b2.yaml"], ["-cb2.yaml"], ["--conf", "b2.yaml"]]
    )
    def test_a_further_recipe_comes_before_what_the_launch_says(self, here, more, capsys):
        write(model=RECIPE["model"])
        write("b2.yaml", model=RECIPE["model"], trainer={"devices": 2, "accumulate_grad_batches": 4})
        script("--", "--trainer.accelerator", "cpu", *more, "--trainer.max_steps", "7", gpus=4)
        slurm.batch(here / "job.sh", here, SRUN_STATUS="0").wait(timeout=60)
        asked = slurm.asked_of_srun(here)
        files = asked[asked.index("fit") + 1 : asked.index("--trainer.num_nodes")]
        assert files == ["--config", "recipe.yaml", "--config", "b2.yaml"]
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main([*asked[asked.index("fit") :], "--print_config"])
        trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
        assert (str(trainer["devices"]), trainer["accumulate_grad_batches"], trainer["max_steps"]) == ("4", 2, 7)

    def test_a_further_recipe_of_another_shape(self, here, capsys):
        write()
        (here / "b2.yaml").write_text("trainer: [1]")
        assert "b2.yaml is no recipe: trainer is [1]" in refused(capsys, *words(), "--", "--config", "b2.yaml")

    def test_another_resume_takes_the_place_of_auto(self, here):
        write()
        text = script("--", "--resume", "elsewhere")
        assert "--resume elsewhere" in text and "resume auto \\" not in text


class TestTorchrun:
    def printed(self, capsys, *more, nodes="2"):
        own = ["--config", "recipe.yaml", "--nodes", nodes, "--gpus", "8", "--rendezvous", "node1:29500"]
        assert launch.run(["torchrun", *own, *more]) == 0
        text, told = capsys.readouterr()
        return shlex.split(text.replace("\\\n", " "), comments=True), told

    def test_a_fixed_number_of_machines(self, here, capsys):
        write()
        found, told = self.printed(capsys, "--max-restarts", "5", "--", "--trainer.strategy", "ddp")
        assert found == [
            *("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1", "torchrun", "--nnodes=2", "--nproc-per-node=8"),
            *("--max-restarts=5", "--rdzv-backend=c10d", "--rdzv-endpoint=node1:29500", "--rdzv-id=recipe"),
            *("-m", "lightning_igpt", "fit", "--config", "recipe.yaml", "--trainer.num_nodes", "2"),
            *("--trainer.devices", "8", "--resume", "auto", "--trainer.accumulate_grad_batches", "1"),
            *("--trainer.val_check_interval", "10", "--trainer.limit_val_batches", "20", "--trainer.strategy", "ddp"),
        ]
        assert "accumulate_grad_batches 2 -> 1" in told

    def test_an_elastic_group(self, here, capsys):
        write()
        found, told = self.printed(capsys, "--", "--trainer.strategy", "ddp", nodes="1:4")
        assert found[2] == "--nnodes=1:4"
        assert found[found.index("-m") :] == [
            *("-m", "lightning_igpt", "launch", "worker", "--config", "recipe.yaml", "--accumulate", "2"),
            *("--", "--trainer.strategy", "ddp"),
        ]
        assert "A group of 3 machines ends with an error" in told

    @pytest.mark.parametrize("nodes, size", [(1, 8), (2, 4), (4, 2)])
    def test_a_worker_counts_the_devices(self, here, nodes, size, monkeypatch):
        write()
        started = []
        monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
        for name, value in {"WORLD_SIZE": 8 * nodes, "LOCAL_WORLD_SIZE": 8, "RANK": 1}.items():
            monkeypatch.setenv(name, str(value))
        assert launch.run(["worker", "--config", "recipe.yaml", "--accumulate", "2", "--", "--trust", "drill"]) == 0
        changes = [] if size == 8 else ["--data.init_args.batch_size", str(size)]
        assert started[0][3:6] == ["fit", "--config", "recipe.yaml"] and started[0][1:3] == ["-m", "lightning_igpt"]
        counted = ["--trainer.num_nodes", str(nodes), "--trainer.devices", "8", "--resume", "auto"]
        assert started[0][6:12] == counted and started[0][12 : 12 + len(changes)] == changes
        assert launch.run(["worker", "--config=recipe.yaml", "--", "--trust", "drill", "-c", "recipe.yaml"]) == 0
        assert started[1][3:8] == ["fit", "--config", "recipe.yaml", "--config", "recipe.yaml"]
        assert "--trainer.accumulate_grad_batches" not in started[0] and started[0][-2:] == ["--trust", "drill"]

    @pytest.mark.parametrize(
        "name, value, message",
        [
            ("nodes", "0", "at least 1"),
            ("nodes", "4:2", "not below the first"),
            ("nodes", "two", "a number, or a range"),
            ("nodes", "1:", "a number, or a range"),
            ("rendezvous", "node1", "HOST:PORT"),
            ("rendezvous", "node1:0", "HOST:PORT"),
            ("rendezvous", "a b:1", "HOST:PORT"),
            ("max_restarts", "-1", "at least 0"),
            ("gpus", "0", "gpus is 0"),
            ("gpus", "1:8", "Only the nodes of launch torchrun"),
            ("max-restarts", "1:8", "max_restarts is '1:8'"),
        ],
    )
    def test_bad_values(self, here, name, value, message, capsys):
        write()
        own = {"config": "recipe.yaml", "nodes": "1", "gpus": "8", "rendezvous": "node1:29500"} | {name: value}
        assert message in refused(capsys, "torchrun", *(f"--{one}={text}" for one, text in own.items()))

    def test_an_elastic_group_decides_on_the_batch(self, here, capsys):
        write()
        own = ["torchrun", "--config", "recipe.yaml", "--nodes", "1:2", "--gpus", "8", "--rendezvous", "node1:1"]
        assert "follow the size" in refused(capsys, *own, "--", "--data.batch_size", "1")

    def test_a_worker_needs_torchrun(self, here, capsys, monkeypatch):
        write()
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert "launch torchrun prints how" in refused(capsys, "worker", "--config", "recipe.yaml")


class TestPage:
    """What docs/how-to/cluster.md shows; tests/test_docs.py has its commands parsed."""

    PAGE = (ROOT / "docs" / "how-to" / "cluster.md").read_text(encoding="utf-8")

    def test_torchrun_is_shown_as_it_is_printed(self, here, capsys):
        shown = re.search(r"^```text\n(# The same.*?)^```$", self.PAGE, re.MULTILINE | re.DOTALL)[1]
        command = next(line for line in self.PAGE.splitlines() if line.startswith("lightning-igpt launch torchrun"))
        assert main(shlex.split(command)[1:]) == 0
        assert capsys.readouterr().out == shown

    def test_torchrun_takes_its_options(self, here, capsys):
        shown = re.search(r"^TORCH_DISABLE.*?\n```$", self.PAGE, re.MULTILINE | re.DOTALL)[0]
        _, program, *rest = shlex.split(shown.removesuffix("```").replace("\\\n", " "))
        assert program == "torchrun"
        found = get_args_parser().parse_args(rest)
        assert (found.nnodes, found.nproc_per_node, found.max_restarts) == ("2", "8", 3)
        assert found.module and found.training_script == "lightning_igpt"
        with pytest.raises(SystemExit) as stop:
            main([*found.training_script_args, "--print_config"])
        assert stop.value.code == 0

    def test_the_table_of_shares(self, here):
        (row,) = re.findall(r"^\| batch_size 8, accumulate_grad_batches 2 \|(.*)\|$", self.PAGE, re.MULTILINE)
        write()
        for cell, (nodes, gpus) in zip(row.split("|"), ((1, 4), (2, 8), (4, 8)), strict=True):
            batch = Recipe("recipe.yaml").share(nodes, gpus).batch
            assert cell.strip() == f"{batch.batch_size}, accumulating {batch.accumulate}"


class Job:
    """The drills' run as a job of two machines; it can be stopped and started like theirs."""

    def __init__(self, folder):
        self.folder = folder
        trainer = {name: value for name, value in RECIPE["trainer"].items() if name != "devices"}
        init = RECIPE["data"]["init_args"] | {"num_workers": 1}
        sections = {"model": RECIPE["model"], "data": RECIPE["data"] | {"init_args": init}, "trainer": trainer}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(sections))
        (folder / "drill.py").write_text(SLOW)
        with (
            socket.socket() as one
        ):  # Lightning takes the last four digits of the job's number for a port from 15000 on
            number = next(n for n in range(os.getpid() % 9000, 9999) if one.connect_ex(("127.0.0.1", 15000 + n)))
        self.number = f"1{number:04}"

    def start(self, pace=0.0):
        paths = os.pathsep.join([str(ROOT), str(self.folder)])
        options = {"SLURM_JOB_ID": self.number, "PYTHONPATH": paths, "SECONDS_PER_STEP": str(pace)}
        return slurm.batch(self.folder / "job.sh", self.folder, **options)

    def checkpoints(self):
        return sorted((self.folder / "run").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)

    def wait_for_step(self, step, process):
        end = time.monotonic() + 200
        while not any(path.name == f"step={step}.ckpt" for path in self.checkpoints()):
            assert process.poll() is None, process.communicate()[0][-3000:]
            assert time.monotonic() < end, f"step {step} was never saved"
            time.sleep(0.01)

    def final(self):
        (path,) = (path for path in self.checkpoints() if path.name == "final.ckpt")
        return torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.marathon
def test_a_requeued_job_goes_on_where_it_was(tmp_path, monkeypatch):
    ends = []
    for name in ("run", "twin"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        job = Job(tmp_path / name)
        script("--", "--trainer.strategy", "ddp", "--trust", "drill", nodes=2, gpus=1)
        try:
            process = job.start(pace=0.1 if name == "run" else 0.0)
            if name == "run":
                job.wait_for_step(5, process)
                (job.folder / "time-is-up").touch()
                out, _ = process.communicate(timeout=200)
                assert process.returncode == 143, out[-3000:]
                assert (job.folder / "scontrol.txt").read_text() == f"requeue {job.number}\n"
                assert "hpc_ckpt_1.ckpt" in [path.name for path in job.checkpoints()]
                process = job.start()
            out, _ = process.communicate(timeout=200)
            assert process.returncode == 0, out[-3000:]
            assert ("Restoring states from the checkpoint path at" in out) == (name == "run")
            assert not working_in(job.folder)
        finally:
            end_all_in(job.folder)
        ends.append(job)
    assert_same_end(*ends)
