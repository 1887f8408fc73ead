import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import yaml

from lightning_igpt.__main__ import main
from lightning_igpt.commands import plan_cpu, recipes
from lightning_igpt.commands.arguments import run_function
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.planning import (
    DEVICES,
    choose,
    largest_batch,
    parameter_count,
    train_flops_per_token,
    training_bytes,
)

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "planning.md").read_text(encoding="utf-8")
PRETRAINING = [name for name in recipes.names() if "PretrainModule" in (recipes.folder() / f"{name}.yaml").read_text()]
PROBES = [name for name in recipes.names() if name.endswith("_probe")]


@pytest.fixture
def planned(capsys):
    """The JSON object of ``plan`` with these options."""

    def ask(*words):
        assert main(["plan", *map(str, words), "--format", "json"]) == 0
        return json.loads(capsys.readouterr().out)

    return ask


@pytest.fixture
def refused(capsys):
    """What ``plan`` says as it stops."""

    def ask(*words):
        with pytest.raises(SystemExit) as stop:
            main(["plan", *map(str, words)])
        return str(stop.value.code) + capsys.readouterr().err

    return ask


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe that is sound but for the changes; gives its path."""

    def write(**changes):
        whole = {
            "model": {"class_path": "PretrainModule", "init_args": {"network": "igpt_m"}},
            "data": {"class_path": "PretrainDataModule", "init_args": {"source": "photos", "batch_size": 4}},
            "trainer": {"max_steps": 100},
        }
        for path, value in changes.items():
            section = whole
            *above, last = path.split("__")
            for name in above:
                section = section[name]
            section[last] = value
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(whole))
        return tmp_path / "mine.yaml"

    return write


def test_the_figures_are_those_of_planning(planned):
    found = planned(
        "--network", "igpt_l", "--devices", 64, "--device-kind", "h100", "--batch-size", 128, "--steps", 1000
    )
    config, usable = PRESETS["igpt_l"], DEVICES["h100"].usable
    assert found["network"]["parameters"] == parameter_count(config)
    assert found["run"]["flops_per_step"] == 128 * 1024 * train_flops_per_token(config)
    assert found["run"]["flops"] == 1000 * found["run"]["flops_per_step"]
    assert found["run"]["tokens"] == 128 * 1000 * 1024 and found["run"]["micro_batch_size"] == 2
    for kind, sharded in (("ddp", False), ("fsdp", True)):
        parts = training_bytes(config, 2, devices=64, sharded=sharded)
        assert found["memory"][kind] == {**parts, "total": sum(parts.values())}
        for how, sizes in found["largest_micro_batch"][kind].items():
            options = {"devices": 64, "sharded": sharded, "recompute": how}
            assert sizes["eager"] == largest_batch(config, usable, **options)
            assert sizes["compiled"] == largest_batch(config, usable, compiled=True, **options)
    choice = choose(config, 2, 64, usable)
    assert found["strategy"] == {
        "strategy": "ddp", "recompute": "none", "fits": True, "bytes": choice.bytes, "reason": choice.reason,
    }  # fmt: skip
    assert found["run"]["mfu"] == 0.5
    assert found["run"]["seconds"] * 64 == pytest.approx(found["run"]["device_seconds"])


def test_text_and_json_hold_the_same(planned, capsys):
    words = ["--network", "igpt_xl", "--devices", "8", "--batch_size", "128"]
    found = planned(*words)
    assert main(["plan", *words]) == 0
    text = capsys.readouterr().out
    assert f"{found['network']['parameters']:,}" in text
    for kind in ("ddp", "fsdp"):
        assert f"{found['memory'][kind]['total'] / 2**30:.2f} GiB" in text
        assert f"{found['largest_micro_batch'][kind]['full']['compiled']:,}" in text
    assert found["strategy"]["reason"] in " ".join(text.split())
    assert max(len(line) for line in text.splitlines()) <= 100


def test_options_may_be_spelled_with_dashes(planned):
    dashes = planned("--batch-size", 8, "--device-kind=a100-40", "--image-size=48", "--accumulate-grad-batches", "2")
    below = planned("--batch_size", 8, "--device_kind=a100-40", "--image_size=48", "--accumulate_grad_batches", "2")
    assert dashes == below
    assert dashes["device"]["name"] == "A100 40 GB" and dashes["network"]["image_size"] == 48


def test_every_verb_takes_dashes_and_leaves_values_alone(capsys):
    def show(some_words: str, a_switch: bool = False, config: str = "none") -> None:
        print(some_words, a_switch, config)

    for function, before in ((show, []), ({"it": show}, ["it"])):
        run_function(function, [*before, "--some-words=--a-switch", "--a-switch", "true"], "show")
        assert capsys.readouterr().out.startswith("--a-switch True")
    run_function(show, ["--config", "mine.yaml", "--some_words", "x-y", "--a-switch"], "show")
    assert capsys.readouterr().out == "x-y True mine.yaml\n"


def test_the_batch_is_that_of_all_devices(planned, refused):
    assert planned("--batch_size", 8)["run"]["micro_batch_size"] == 8
    assert planned("--batch_size", 64, "--devices", 8)["run"]["micro_batch_size"] == 8
    assert planned("--batch_size", 64, "--devices", 8, "--accumulate_grad_batches", 4)["run"]["micro_batch_size"] == 2
    said = refused("--batch_size", 100, "--devices", 64)
    assert "batch_size 100" in said and "64 devices" in said and "take 64 or 128" in said
    assert "16 devices x 4 batches each" in refused("--batch_size", 65, "--devices", 16, "--accumulate_grad_batches", 4)
    assert "take 64" in refused("--batch_size", 3, "--devices", 64)


@pytest.mark.parametrize("name", PRETRAINING)
def test_every_pretraining_recipe_can_be_planned(name, planned):
    whole = yaml.safe_load((recipes.folder() / f"{name}.yaml").read_text())
    options, trainer = whole["model"]["init_args"], whole["trainer"]
    found = planned("--config", name)
    network = ImageGPTConfig.resolve(options["network"])
    assert found["network"]["objective"] == options.get("objective", network.objective)
    assert found["network"]["n_embd"] == network.n_embd and found["network"]["image_size"] == network.image_size
    micro_batch, parts = whole["data"]["init_args"]["batch_size"], trainer.get("accumulate_grad_batches", 1)
    assert found["run"]["micro_batch_size"] == micro_batch
    assert found["run"]["batch_size"] == micro_batch * trainer.get("devices", 1) * parts
    assert found["run"]["steps"] == trainer["max_steps"]


@pytest.mark.parametrize(
    ("name", "preset", "side", "steps"),
    [
        ("digits_tiny_finetune", None, 8, 8 * (1293 // 16)),
        ("cifar10_tiny_finetune", None, 16, 10 * (45_000 // 32)),
        ("cifar10_s_finetune", "igpt_s", 32, 50 * -(-(45_000 // 32) // 4)),
    ],
)
def test_finetuning_is_planned_for_the_network_of_the_recipe_before(name, preset, side, steps, planned):
    found = planned("--config", name)
    assert (found["network"]["preset"], found["network"]["image_size"], found["run"]["steps"]) == (preset, side, steps)


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_is_told_apart(name, refused):
    assert f"{name} is a probe: it trains no network" in refused("--config", name)


def test_given_options_win_over_the_recipe(planned, recipe):
    path = recipe(trainer__devices=4, trainer__precision="16-mixed", trainer__compile=True)
    found = planned("--config", path)
    assert found["run"] | {"batch_size": 16, "devices": 4, "precision": "16-mixed", "compiled": True} == found["run"]
    words = ["--network", "igpt_s", "--batch-size", 64, "--steps", 7, "--devices", 2, "--precision", "32-true"]
    found = planned("--config", path, *words, "--objective", "bert", "--compile", "false", "--recompute", "full")
    wanted = {
        "batch_size": 64,
        "devices": 2,
        "steps": 7,
        "precision": "32-true",
        "compiled": False,
        "recompute": "full",
    }
    assert found["run"] | wanted == found["run"]
    assert found["network"]["preset"] == "igpt_s" and found["network"]["objective"] == "bert"
    assert planned("--config", path, "--devices", 8)["run"]["batch_size"] == 32  # 4 per device, as fit would have it


def test_what_a_recipe_may_say(planned, recipe):
    network = {"n_layer": 2, "n_head": 2, "n_embd": 8, "image_size": 4}
    path = recipe(
        model__init_args={"network": network, "image_size": 8},
        data__init_args={"source": ["a", "b"], "batch_size": "${trainer.num_nodes}"},
        trainer={"devices": [0, 1], "num_nodes": 3, "max_steps": "${trainer.checkpoint_every}", "checkpoint_every": 50},
    )
    found = planned("--config", path)
    assert found["network"]["image_size"] == 8 and found["network"]["preset"] is None
    wanted = {"devices": 6, "micro_batch_size": 3, "batch_size": 18, "steps": 50}
    assert found["run"] | wanted == found["run"]
    both = recipe(data__init_args__source="digits", trainer={"max_steps": 900, "max_epochs": 2, "devices": "auto"})
    assert planned("--config", both)["run"]["steps"] == 2 * (1293 // 4)
    released = recipe(model={"class_path": "FineTuneModule", "init_args": {"pretrained": "openai/imagegpt-large"}})
    assert planned("--config", released)["network"]["preset"] == "igpt_l"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__class_path": "mine.Net"}, "trains a Net, of which nothing is known"),
        ({"trainer": {"max_epochs": 3}}, "for 3 epochs, and how many images its source has is not known.*pass --steps"),
        ({"trainer": {}}, "neither trainer.max_steps nor trainer.max_epochs; pass --steps"),
        ({"model__init_args": {"pretrained": "runs/mine"}}, "starts from runs/mine.*pass --network"),
        ({"model__init_args__network": "igpt_q"}, "no preset 'igpt_q'; did you mean 'igpt_"),
        ({"data__init_args__batch_size": "many"}, "data.init_args.batch_size is 'many'; it must be a whole number"),
        ({"trainer__devices": "some"}, "trainer.devices is 'some'"),
        ({"trainer__precision": "64-true"}, "precision is '64-true'; memory is known for"),
        ({"trainer__max_steps": "${trainer.length}"}, "Interpolation key 'trainer.length' not found"),
        ({"model": 3}, "no recipe: model"),
    ],
)
def test_recipes_that_cannot_be_planned(changes, message, refused, recipe):
    assert re.search(message, refused("--config", recipe(**changes)))


def test_files_that_are_no_recipes(refused, tmp_path):
    (tmp_path / "broken.yaml").write_text("model: [1, 2\n")
    assert "broken.yaml is not YAML" in refused("--config", tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]\n")
    assert "list.yaml is no recipe" in refused("--config", tmp_path / "list.yaml")
    said = refused("--config", "imagenet32_l_pretrian")
    assert "; did you mean 'imagenet32_l_pretrain'? See lightning-igpt recipes list" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network", "igpt_xxl"], "no preset 'igpt_xxl'; did you mean 'igpt_xl'"),
        (["--device-kind", "h10"], "no device 'h10'; there are b200, h200"),
        (["--mfu", "45"], "mfu is 45; it is a share above 0 and up to 1"),
        (["--steps", "0"], "steps is 0"),
        (["--batch_size", "-1"], "batch_size is -1"),
        (["--devices", "0"], "devices is 0; it must be at least 1"),
        (["--accumulate_grad_batches", "0"], "accumulate_grad_batches is 0"),
        (["--image_size", "0"], "image_size is 0"),
        (["--device_kind", "v100", "--precision", "bf16-mixed"], "V100 has no fast bfloat16"),
        (["--sweep", "cost.pdf"], "sweep is 'cost.pdf'; the plot is a PNG file"),
    ],
)
def test_wrong_options_are_named(words, message, refused):
    assert message in refused(*words)


def test_devices_without_bfloat16_train_in_float32(planned):
    assert planned("--device_kind", "v100")["run"]["precision"] == "32-true"


def test_no_more_mfu_is_assumed_than_can_be(planned):
    found = planned("--network", "igpt_tiny")["run"]
    assert found["mfu"] == found["ceiling_mfu"] < 0.33
    assert planned("--network", "igpt_tiny", "--mfu", 0.4)["run"]["mfu"] == 0.4


def test_this_cpu_is_measured(planned, monkeypatch):
    monkeypatch.setattr(plan_cpu, "SIDE", 128)
    monkeypatch.setattr(plan_cpu, "COPIED", 2**20)
    device = planned("--device_kind", "cpu", "--network", "igpt_tiny")["device"]
    assert device["name"].startswith("this CPU") and device["source"] == "measured now"
    assert device["peak_flops"] > 1e7 and device["bandwidth"] > 1e7 and device["memory_bytes"] > 2**28


def test_the_sweep_is_drawn(planned, tmp_path):
    planned("--devices", 8, "--sweep", tmp_path / "new" / "cost.png")
    picture = matplotlib.image.imread(tmp_path / "new" / "cost.png")
    assert picture.shape[0] > 500 and picture.shape[1] > 1000
    assert 0.02 < (picture[..., :3].min(-1) < 0.9).mean() < 0.5  # neither empty nor full


def test_planning_loads_neither_torch_nor_matplotlib():
    check = (
        "import sys; from lightning_igpt.__main__ import main; main(['plan', '--config', 'digits_tiny_pretrain'])\n"
        "assert not {'torch', 'numpy', 'matplotlib', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)


def test_the_page_shows_what_the_command_prints(capsys):
    command, printed = re.search(
        r"```bash\nlightning-igpt (plan [^`]*?)\n```\n+```text\n(.*?)```", PAGE, re.DOTALL
    ).groups()
    assert main(command.split()) == 0
    assert capsys.readouterr().out == printed


def test_the_page_names_every_figure_and_device(planned):
    def names(value):
        for key, below in value.items():
            yield key
            if isinstance(below, dict):
                yield from names(below)

    named = set(re.findall(r"`(\w+)`", PAGE))
    fields = set(ImageGPTConfig().to_dict()) | {"1", "16", "64"}
    assert set(names(planned("--network", "igpt_l", "--batch_size", 128, "--devices", 2))) - fields <= named
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line[:3] == "| `"]
    shown = {row[0].strip("`"): row[1:] for row in rows if len(row) == 7}
    assert list(shown) == list(DEVICES)
    for key, device in DEVICES.items():
        figures = [
            device.memory / 2**30,
            device.tflops_16,
            device.tflops_tf32,
            device.tflops_32,
            device.bandwidth / 1e9,
        ]
        assert shown[key][:-1] == [f"{value:,.5g}" if value else "" for value in figures]  # the last is the source
