"""Scaling laws are recovered from noisy points; a study is planned, and fitted, from the command line."""

import csv
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_igpt import scaling
from lightning_igpt.__main__ import main
from lightning_igpt.commands import recipes
from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.files import write_csv
from lightning_igpt.planning import parameter_count, train_flops_per_token
from lightning_igpt.scaling import Point, Run
from tests.studies import METRIC, law, study, write_run

PF_DAY = 8.64e19


def henighan(noise=0.0):
    """Runs around the 32 x 32 law of Henighan et al. (2020): C in PF-days, N_opt and the least loss in their table."""
    random = np.random.default_rng(0)
    for c in np.geomspace(1e-4, 10, 6):
        for ratio in (1 / 5, 1 / 2.2, 1, 2.2, 5):
            n = ratio * (c / 1.6e-13) ** 0.65
            loss = 2.21 + (c / 3.6e-9) ** -0.10 + 0.02 * math.log(ratio) ** 2
            yield Point(n, c * PF_DAY / 6 / n, c * PF_DAY, loss * (1 + noise * random.normal()))


def chinchilla(noise=0.0):
    """Runs that follow the law of Hoffmann et al. (2022)."""
    random = np.random.default_rng(0)
    for c in np.geomspace(1e18, 1e21, 4):
        for n in np.geomspace(3e7, 1e10, 10):
            d = c / 6 / n
            if 1 < d / n < 3000:
                yield Point(n, d, c, (1.69 + 406.4 / n**0.34 + 410.7 / d**0.28) * (1 + noise * random.normal()))


@pytest.mark.parametrize("noise, room", [(0, 1e-3), (0.001, 0.02)])
def test_the_law_of_henighan_is_recovered(noise, room):
    values, refused = scaling.fit_laws([*henighan(noise)])
    assert not refused
    assert values["a"] == pytest.approx(0.65, abs=room) and values["b"] == pytest.approx(0.35, abs=room)
    assert values["a6"] == pytest.approx(values["a"])  # here, C is 6 N D
    assert values["k_N"] * PF_DAY ** values["a"] == pytest.approx((1 / 1.6e-13) ** 0.65, rel=10 * room)
    assert values["L_inf"] == pytest.approx(2.21, abs=room) and values["alpha_C"] == pytest.approx(0.10, abs=room)
    assert values["K"] / PF_DAY ** values["alpha_C"] == pytest.approx(3.6e-9**0.10, rel=5 * room)


@pytest.mark.parametrize("noise, room", [(0, 1e-3), (0.002, 0.02)])
def test_the_law_of_hoffmann_is_recovered(noise, room):
    points = [*chinchilla(noise)]
    values, refused = scaling.fit_laws(points)
    assert not refused
    truth = {"E": 1.69, "alpha": 0.34, "beta": 0.28, "beta/(alpha+beta)": 0.28 / 0.62}
    assert {name: values[name] for name in truth} == pytest.approx(truth, abs=room)
    assert (values["A"], values["B"]) == pytest.approx((406.4, 410.7), rel=15 * room)
    assert values["a"] == pytest.approx(0.28 / 0.62, abs=0.03)  # parabolas are an approximation
    again, _ = scaling.fit_laws(points, values)
    assert {name: again[name] for name in truth} == pytest.approx({name: values[name] for name in truth}, rel=1e-3)


def test_an_outlier_weighs_little():
    points = [*chinchilla()]
    points[7] = points[7]._replace(loss=1.1 * points[7].loss)
    assert scaling.fit_laws(points)[0]["alpha"] == pytest.approx(0.34, abs=0.002)


def test_intervals_hold_the_truth_and_narrow_with_the_noise():
    widths = []
    for noise in (0.0005, 0.002):
        points = [*chinchilla(noise)]
        values, _ = scaling.fit_laws(points)
        ranges, share = scaling.intervals(points, values, 20)
        assert 0.5 < share <= 1 and ranges == scaling.intervals(points, values, 20)[0]
        assert ranges["alpha"][0] < 0.34 < ranges["alpha"][1] and ranges.keys() == values.keys()
        low, high = scaling.without_each_size(points, values)["a"]
        assert low < values["a"] < high
        widths.append(ranges["alpha"][1] - ranges["alpha"][0])
    assert widths[0] < widths[1] / 2


@pytest.mark.parametrize(
    "losses, message",
    [
        ([4, 3, 2.5, 2.2], "no minimum between 10 and 10,000 parameters, since it favors the largest network"),
        ([1, 1.5, 2.5, 4], "at 1e.09 FLOPs the parabola has no minimum .* it favors the smallest network; add smaller"),
        ([1, 2, 2, 1.5], "favors the smallest network"),  # a maximum
        ([2, 1], "a parabola takes 3 sizes, and 1e.09 FLOPs has 2; add runs"),
    ],
)
def test_a_curve_without_a_minimum_is_refused(losses, message):
    points = [Point(10.0 ** (1 + i), 1e8, 1e9, loss) for i, loss in enumerate(losses)]
    with pytest.raises(ValueError, match=message):
        scaling.optimum(points)
    values, refused = scaling.fit_laws(points)
    assert not values and len(refused) == 3  # and what the laws would take


def test_a_parabola_gives_its_own_minimum_and_the_tokens_there():
    losses = {n: 2 + 0.3 * math.log(n / 500) ** 2 for n in (100, 400, 3000)}
    points = [Point(n, 1e9 / n, 6e9 * 1.01**i, loss) for i, (n, loss) in enumerate(losses.items())]
    best = scaling.optimum(points)
    assert best == pytest.approx((500, 2e6, 6e9 * 1.01, 2, 0.3))
    assert len(scaling.budgets([*points, points[0]._replace(c=7e9)])) == 2


def test_a_run_counts_as_planning_does():
    config = PRESETS["igpt_s"]
    run = Run("s", config, 128_000_000)
    n, d, c, _ = run.point()
    assert (d, c) == (128_000_000 * 1024, d * train_flops_per_token(config))
    assert n == 24 * 12 * 512**2 and run.point(embeddings=True).n == parameter_count(config)


@pytest.mark.parametrize(
    "size, shape",
    [
        ("96x6", (96, 6, 4)),
        ("64x2", (64, 2, 2)),  # 24 wide or more, as in the base
        ("40x1", (40, 1, 1)),
        ("igpt_m", (1024, 36, 8)),
    ],
)
def test_a_size_takes_all_but_its_shape_from_the_recipe(size, shape):
    base = ImageGPTConfig(n_layer=1, n_head=4, n_embd=96, vocab_size=16, image_size=8, n_inner=192, dropout=0.1)
    config = scaling.resized(base, size)
    assert (config.n_embd, config.n_layer, config.n_head) == shape and config.n_inner == 2 * config.n_embd
    assert (config.vocab_size, config.image_size, config.dropout) == (16, 8, 0.1)


PLAN = ["scaling", "plan", "digits_tiny_pretrain", "--budgets", "4e9", "1e9", "--sizes", "16x1", "32x2"]


def test_a_plan_is_a_recipe_for_each_run_and_a_script_that_trains_and_resumes_them(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([*PLAN, "--out", "study"])
    text = capsys.readouterr().out
    assert "lr hint is 0.0283 N^-1/4 (Henighan et al., 2020), a start for a search; --lr hint uses it." in text
    names = ["16x1_1e09", "32x2_1e09", "16x1_4e09", "32x2_4e09"]
    assert sorted(path.stem for path in Path("study").glob("*.yaml")) == sorted(names)
    for name in names:
        recipe = yaml.safe_load(Path("study", f"{name}.yaml").read_text())
        options, trainer = recipe["model"]["init_args"], recipe["trainer"]
        config, steps = ImageGPTConfig.resolve(options["network"]), trainer["max_steps"]
        per_step = train_flops_per_token(config) * 64 * 16
        assert abs(steps * per_step - float(name.partition("_")[2])) <= per_step / 2
        assert options["lr"] == 0.003 and options["palette"] == "gray:16"
        assert trainer["val_check_interval"] == steps and trainer["default_root_dir"] == f"study/{name}"
    main([*PLAN, "--out", "study"])  # the same again
    with pytest.raises(SystemExit, match=r"study/16x1_1e09.yaml belongs to another plan; remove it, or name another"):
        main([*PLAN, "--out", "study", "--lr", "hint"])
    main([*PLAN, "--out", "hinted", "--lr", "hint"])
    recipe = yaml.safe_load(Path("hinted", "16x1_1e09.yaml").read_text())
    assert recipe["model"]["init_args"]["lr"] == pytest.approx(0.0283 * (12 * 16**2) ** -0.25, rel=1e-2)
    program = tmp_path / "lightning-igpt"
    program.write_text('#!/bin/sh\necho "$@" >> calls\n')
    program.chmod(0o755)
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["sh", "study/run.sh", "--data.source", "a b"], check=True, env=path)
    calls = [f"fit --config study/{name}.yaml --resume auto --data.source a b" for name in names]
    assert Path("calls").read_text().splitlines() == calls


@pytest.mark.parametrize(
    "words, message",
    [
        (["digits_tiny_probe"], "digits_tiny_probe does not pretrain from scratch; take a recipe such as"),
        (["mine.yaml", "--budgets", "1e3"], r"budget of 1e\+03 FLOPs is below one step of 16 images, 2.68e\+07"),
        (["mine.yaml", "--budgets", "nan"], r"budgets are \[nan\]; they must be above 0"),
        (["mine.yaml", "--sizes", "big"], "size big is neither WIDTHxDEPTH, such as 96x6, nor one of igpt_tiny"),
        (["mine.yaml"], "16x1_1e09 has 37 steps and the recipe's warmup_steps is 99; leave it out of the recipe, or"),
        (["none.yaml"], r"none.yaml is no recipe: .*"),
        (["nowhere"], "there is no file or recipe 'nowhere'"),
    ],
)
def test_plans_that_cannot_be_run_are_refused(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(recipes.find("digits_tiny_pretrain").read_text())
    recipe["model"]["init_args"]["warmup_steps"] = 99
    Path("mine.yaml").write_text(yaml.safe_dump(recipe))
    Path("none.yaml").write_text("model: [PretrainModule")
    with pytest.raises(SystemExit, match=message):
        main(["scaling", "plan", "--budgets", "1e9", "--sizes", "16x1", "--out", "study", *words])
    assert not Path("study").exists()


def test_wrong_usage_is_answered_without_torch():
    code = "import sys; from lightning_igpt.__main__ import main\ntry: main(['scaling', 'plan', 'x'])\n"
    code += "except SystemExit as stop: sys.exit(stop.code + 9 * bool({'torch', 'scipy', 'numpy'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 2


def fitted(folder, *words, out="fit"):
    main(["scaling", "fit", str(folder), "--out", str(folder.parent / out), "--n_bootstrap", "3", *words])
    with (folder.parent / out / "laws.csv").open(newline="") as file:
        return {row[""]: row for row in csv.DictReader(file)}


def test_a_study_is_fitted_from_its_run_folders(tmp_path, capsys):
    study(tmp_path / "study")
    laws = fitted(tmp_path / "study")
    text = capsys.readouterr().out
    expected, _ = scaling.fit_laws([run.point() for run in scaling.read_runs([tmp_path / "study"], METRIC)])
    assert {name: float(row["N"]) for name, row in laws.items()} == pytest.approx(expected, rel=1e-3)
    assert float(laws["alpha"]["N"]) == pytest.approx(0.35, abs=0.01) and " to " in laws["a"]["95 %"]
    assert float(laws["a"]["N, all"]) != float(laws["a"]["N"])
    assert text.count("_2e+12 ") == 6 and "of the resampled budgets had a minimum" in text
    with (tmp_path / "fit" / "runs.csv").open(newline="") as file:
        row = {row["run"]: row for row in csv.DictReader(file)}["96x2_8e+12"]
    config = ImageGPTConfig(n_layer=2, n_head=1, n_embd=96, vocab_size=16, image_size=8)
    n, d = 2 * 12 * 96**2, float(row["tokens"])
    assert row["N"] == f"{n:,}" and row["N, all"] == f"{parameter_count(config):,}"
    assert float(row["FLOPs"]) == pytest.approx(8e12, rel=1e-2)
    assert float(row["6 N D"]) == pytest.approx(6 * n * d, rel=1e-3)
    assert float(row["epochs"]) == pytest.approx(d / 64e3, rel=1e-2)
    assert float(row[METRIC]) == pytest.approx(law(n, d), abs=1e-3)
    assert all((tmp_path / "fit" / f"{name}.png").stat().st_size > 10_000 for name in ("profiles", "optima"))


def test_accuracies_are_fitted_as_errors_of_the_best_layer_and_other_values_come_from_a_file(tmp_path):
    def accuracies(n, d):
        return {f"online_probe/layer_{i}/accuracy": (3.4 - law(n, d)) / 2 - 0.1 * abs(i - 1) for i in range(3)}

    study(tmp_path / "study", value=accuracies)
    laws = fitted(tmp_path / "study", "--metric", "online_probe/layer_*/accuracy")
    assert float(laws["E"]["N"]) == pytest.approx(0.05, abs=0.01)
    runs = scaling.read_runs([tmp_path / "study"], "online_probe/layer_1/accuracy")
    rows = [("run", "distance"), *((tmp_path / "study" / run.name, 100 * run.loss) for run in runs)]
    write_csv(tmp_path / "distances.csv", rows)
    laws = fitted(tmp_path / "study", "--metric", "distance", "--values", str(tmp_path / "distances.csv"))
    assert float(laws["E"]["N"]) == pytest.approx(5, abs=1)


@pytest.mark.parametrize(
    "change, words, message",
    [
        ({}, ["--metric", "val/none"], "no run there has val/none; they have epoch, val/bits_per_pixel, val/nats"),
        ({"budgets": (2e12,), "widths": (48, 64, 96)}, [], r"2e\+12 FLOPs the parabola has no minimum .* add smaller"),
        ({"value": lambda n, d: {METRIC: d / 1e9}}, [], "the best val/nats_per_pixel is .* a metric that falls"),
        ({"value": lambda n, d: {METRIC: -1.0}}, [], "the value to fit is -1; it must be above 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, words, message, tmp_path):
    study(tmp_path / "study", **change)
    with pytest.raises(SystemExit, match=message):
        fitted(tmp_path / "study", *words)


def test_a_run_that_is_not_done_is_refused(tmp_path):
    config = ImageGPTConfig(n_layer=2, n_head=1, n_embd=16, vocab_size=16, image_size=8)
    write_run(tmp_path / "study" / "half", Run("half", config, 320), {METRIC: 2.0}, max_steps=20)
    with pytest.raises(SystemExit, match="half was measured at step 10 of 20; continue it, or leave it out"):
        fitted(tmp_path / "study")
    for name, text in {"run.json": '{"runs": [{}]}', "metrics.csv": "epoch,val/nats_per_pixel\n0,2.0\n"}.items():
        (tmp_path / "study" / "half" / name).write_text(text)
        with pytest.raises(SystemExit, match=f"{name} (does not say network, batch size and steps|is damaged)"):
            fitted(tmp_path / "study")


def test_a_planned_study_is_trained_resumed_and_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["scaling", "plan", "digits_tiny_pretrain", "--budgets", "2e8", "--sizes", "8x1", "--out", "study"])
    recipe = yaml.safe_load(Path("study/8x1_2e08.yaml").read_text())
    words = ["--resume", "auto", "--trainer.callbacks", "null", "--trainer.enable_progress_bar", "false"]
    for _ in range(2):  # the second time, nothing is left to do
        main(["fit", "--config", "study/8x1_2e08.yaml", *words, "--trainer.accelerator", "cpu"])
    [run] = scaling.read_runs([Path("study")], METRIC)
    assert run.images == 16 * recipe["trainer"]["max_steps"] and run.train_images == 1293 and run.name == "8x1_2e08"
