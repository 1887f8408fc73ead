import json
import re

import matplotlib.image
import pytest
import yaml

from lightning_igpt.__main__ import main
from lightning_igpt.commands import plan as plan_module
from lightning_igpt.commands import plan_cpu
from lightning_igpt.commands.plan_recipe import read_recipe

SOUND = {
    "model": {"class_path": "PretrainModule", "init_args": {"network": "igpt_s"}},
    "data": {"class_path": "PretrainDataModule", "init_args": {"source": "digits", "batch_size": 4}},
    "trainer": {"max_epochs": 3},
}
BATCHES = 1293 // 4  # of a pass over the digits


@pytest.fixture
def recipe(tmp_path):
    def write(trainer=None, **sections):
        whole = {**SOUND, **sections, "trainer": SOUND["trainer"] | (trainer or {})}
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in whole.items() if value is not ...}))
        return str(path)

    return write


@pytest.fixture
def planned(capsys):
    def ask(*words):
        assert main(["plan", *map(str, words), "--format", "json"]) == 0
        return json.loads(capsys.readouterr().out)

    return ask


@pytest.mark.parametrize(
    ("limit", "batches"),
    [(None, BATCHES), (10, 10), (1, 1), (1.0, BATCHES), (0.5, BATCHES // 2), (10**6, BATCHES), (1e-9, 1)],
)
def test_a_pass_has_no_more_batches_than_it_is_limited_to(limit, batches, recipe):
    found = read_recipe(recipe({"limit_train_batches": limit}))
    assert found.steps(4, 1) == 3 * batches
    if limit == 10:
        assert found.steps(16, 4) == 3 * 3  # the end of a pass cuts the third step short
        assert found.steps(4 * 64, 1) == 3 * (1293 // 256)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer": {"limit_train_batches": 0}}, "limit_train_batches is 0; it must be a whole number from 1 on"),
        ({"trainer": {"limit_train_batches": 1.5}}, "limit_train_batches is 1.5"),
        ({"trainer": {"recompute": "sometimes"}}, "trainer.recompute is 'sometimes'; it must be auto, none, selective"),
        ({"trainer": {"recompute": {"a": 1}}}, "trainer.recompute is "),
        ({"model": ...}, "has no section model"),
        ({"model": {}}, "model.class_path must name what is trained"),
        ({"model": {"class_path": "PretrainModule", "init_args": [1]}}, r"model.init_args is \[1\], not a section"),
        ({"model": {"class_path": "PretrainModule", "init_args": "igpt_m"}}, "model.init_args is 'igpt_m', not a"),
    ],
)
def test_what_is_malformed_is_named(changes, message, recipe):
    with pytest.raises(ValueError, match=message):
        read_recipe(recipe(**changes))


def test_a_recipe_may_leave_out_what_is_told(recipe, planned):
    path = recipe(model=...)
    assert planned("-c", path, "--network", "igpt_m")["network"]["preset"] == "igpt_m"
    assert read_recipe(recipe({"recompute": "auto"})).recompute is None
    assert read_recipe(recipe({"recompute": "full"})).recompute == "full"


@pytest.mark.parametrize(("strategy", "chosen"), [("fsdp2", "fsdp"), ("ddp", "ddp"), ("auto", "ddp")])
def test_the_strategy_of_a_recipe_is_kept(strategy, chosen, recipe, planned):
    path = recipe({"strategy": strategy, "devices": 8})
    assert planned("--config", path)["strategy"]["strategy"] == chosen


@pytest.mark.parametrize(("short", "long"), [("bf16", "bf16-mixed"), ("16", "16-mixed"), ("32", "32-true")])
def test_short_names_of_precisions(short, long, planned):
    assert planned("--precision", short) == planned("--precision", long)


def test_keys_and_values_have_the_width_of_the_precision(planned, capsys):
    half, single = planned()["inference"], planned("--precision", "32")["inference"]
    assert single["cache_bytes_per_image"] == 2 * half["cache_bytes_per_image"] == 2 * 48 * 2**20
    for precision, kind in (("bf16", "bfloat16"), ("16", "float16"), ("32", "float32")):
        assert main(["plan", "--precision", precision]) == 0
        assert f"per image in {kind}\n" in capsys.readouterr().out


def test_bert_networks_sample_nothing(planned, capsys):
    found = planned("--objective", "bert")["inference"]
    assert found["sampling"] is None and found["cache_bytes_per_image"] is None
    assert main(["plan", "--objective", "bert"]) == 0
    text = capsys.readouterr().out
    assert "sampling" not in text and "keys and values" not in text and "features, floor" in text


def test_flops_are_compared_with_the_papers(planned, capsys):
    assert planned("--network", "igpt_s", "--image-size", 64)["paper"]["flops_ratio"] == pytest.approx(5.7, abs=0.05)
    assert main(["plan", "--network", "igpt_tiny", "--steps", "1", "--batch-size", "1"]) == 0
    text = capsys.readouterr().out
    assert "x the FLOPs" not in text and re.search(r"^run +1 image x 1 step:", text, re.MULTILINE)


def test_the_strategy_says_which_recomputation_it_reckons_with(capsys):
    assert main(["plan", "--recompute", "full", "--compile"]) == 0
    text = capsys.readouterr().out
    assert "(recompute full, compiled)" in text and "one device, recompute none" in text


def test_the_sweep_takes_the_share_that_a_cpu_reaches(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan_cpu, "SIDE", 128)
    monkeypatch.setattr(plan_cpu, "COPIED", 2**20)
    taken, draw = [], plan_module.draw_sweep

    def watched(planned, path, *, mfu):
        taken.append(mfu)
        draw(planned, path, mfu=mfu)

    monkeypatch.setattr(plan_module, "draw_sweep", watched)
    for words in (["cpu"], ["cpu", "--mfu", "0.4"], ["h100"]):
        assert main(["plan", "--sweep", str(tmp_path / "cost.PNG"), "--device-kind", *words]) == 0
    assert taken == [0.6, 0.4, None]
    assert matplotlib.image.imread(tmp_path / "cost.PNG", format="png").shape[0] > 500
