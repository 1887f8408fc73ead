"""Every shipped recipe says what it does, holds the paper's settings where it claims to, and runs.

The recipes run at toy size through the command line, on small stand-ins for their datasets, in one working folder: a
probe finds the weights of its pretraining recipe where it says that they are.
"""

import functools
import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import yaml

from lightning_igpt.__main__ import main
from lightning_igpt.commands import recipes
from lightning_igpt.config import EMBEDDED, ImageGPTConfig
from lightning_igpt.optim import default_warmup
from lightning_igpt.palette import Palette
from lightning_igpt.planning import train_flops_per_token
from lightning_igpt.weights import load_pretrained
from lightning_igpt.weights.checkpoint import STAMP, read_checkpoint
from tests.image_files import noise, rows
from tests.test_cli import printed

RECIPES = {path.stem: path for path in sorted(recipes.folder().rglob("*.yaml"))}
TOY = {"n_layer": 4, "n_head": 2, "n_embd": 8, "vocab_size": 16, "image_size": 8, "tokens_per_pixel": 1}
IMAGENET_TRAIN = 1_281_167
LARGE = pytest.mark.slow  # their files differ little from each other's, and not at all at toy size


# The paper's Table 5, with sections 3.3 and 3.4: layers, heads (0: not published), width, side, learning rate.
PAPER = {
    "imagenet32_s_pretrain": (24, 8, 512, 32, 0.003),
    "imagenet32_m_pretrain": (36, 8, 1024, 32, 0.003),
    "imagenet32_l_pretrain": (48, 16, 1536, 32, 0.001),
    "imagenet48_l_pretrain": (48, 16, 1536, 48, 0.01),
    "imagenet64_xl_pretrain": (60, 0, 3072, 64, 0.0003),
    "imagenet32_s_bert": (24, 8, 512, 32, 0.01),
    "imagenet32_m_bert": (36, 8, 1024, 32, 0.003),
    "imagenet32_l_bert": (48, 16, 1536, 32, 0.001),
}


def read(name):
    return yaml.safe_load(RECIPES[name].read_text())


def header(name):
    lines = RECIPES[name].read_text().splitlines()
    return [line.removeprefix("#").strip() for line in lines[: lines.index("")]]


def network_of(recipe):
    options = recipe["model"]["init_args"]
    config = ImageGPTConfig.resolve(options["network"])
    return replace(config, objective=options.get("objective") or config.objective)


def images_per_step(recipe):
    return recipe["data"]["init_args"]["batch_size"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Small datasets with the columns, splits and labels of the ones on the hub."""
    folder = tmp_path_factory.mktemp("sources")

    def write(split, n, *, hidden=False):
        labels = [-1] * n if hidden else [i % 10 for i in range(n)]
        return rows([noise((20, 18), seed=i) for i in range(n)], labels, names=[f"class {i}" for i in range(10)])

    for name, splits in {"cifar10": ("train", "test"), "imagenet": ("train", "validation", "test")}.items():
        for split in splits:
            data = write(split, 40 if split == "train" else 8, hidden=name == "imagenet" and split == "test")
            data = data.rename_column("image", "img") if name == "cifar10" else data
            (folder / name).mkdir(exist_ok=True)
            data.to_parquet(folder / name / f"{split}-00000-of-00001.parquet")
    for i in range(16):  # sorted by class, and four batches are to hold both
        path = folder / "photos" / ("cat", "dog")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise((20, 18), seed=i).save(path)
    return {
        "digits": "digits",
        "emoji": "emoji",
        "photos": str(folder / "photos"),
        "uoft-cs/cifar10": str(folder / "cifar10"),
        "ILSVRC/imagenet-1k": str(folder / "imagenet"),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory, sources):
    """Fit a recipe at toy size, after the one whose weights it starts from; returns its run folder and its flags."""
    cache = tmp_path_factory.mktemp("hf")

    @functools.cache
    def fit(name):
        recipe = read(name)
        start = recipe["model"]["init_args"].get("pretrained")
        if start not in (None, *EMBEDDED):
            fit(Path(start).name)
        flags = toy_flags(recipe, sources)
        assert main(["fit", "--config", name, *flags]) == 0
        return Path(recipe["trainer"]["default_root_dir"]), flags

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("work"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        yield fit


def toy_flags(recipe, sources):
    trainer, accumulate = recipe["trainer"], min(2, recipe["trainer"].get("accumulate_grad_batches", 1))
    flags = {
        "data.init_args.source": sources[recipe["data"]["init_args"]["source"]],
        "data.init_args.batch_size": 4,
        "trainer.accumulate_grad_batches": accumulate,
        "data.init_args.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.precision": "32-true",
        "trainer.limit_val_batches": 2,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    if "pretrained" not in recipe["model"]["init_args"]:
        flags |= {"model.init_args.network": json.dumps(TOY), "model.init_args.palette": "gray:16"}
    if recipe["model"]["init_args"].get("warmup_steps"):
        flags["model.init_args.warmup_steps"] = 1
    if "max_steps" in trainer:
        flags |= {"trainer.max_steps": 2, "trainer.val_check_interval": accumulate, "trainer.checkpoint_every": 1}
    else:
        flags |= {"trainer.max_epochs": 1, "trainer.limit_train_batches": 4, "trainer.val_check_interval": 1.0}
    return [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]


def newest(folder):
    return max(folder.rglob("*.ckpt"), key=lambda path: path.stat().st_mtime)


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_header_computes_is_true(name, capsys):
    text, recipe = " ".join(header(name)), read(name)
    for words, gib in re.findall(r"`lightning-igpt (plan [^`]*)`: (\d+) GiB", text):
        main(words.split())
        assert re.search(r"^strategy .*, (\d+) GiB$", capsys.readouterr().out, re.MULTILINE)[1] == gib
    for flops in re.findall(r"takes (\S+) floating-point operations", text):
        network, images = network_of(recipe), images_per_step(recipe) * recipe["trainer"]["max_steps"]
        assert f"{images * network.n_positions * train_flops_per_token(network):.1e}" == flops


@pytest.mark.parametrize("name", RECIPES)
def test_the_parts_fit_together(name):
    recipe = read(name)
    options = recipe["model"]["init_args"]
    assert recipe["trainer"]["default_root_dir"] == f"runs/{name}"
    assert recipe["data"]["class_path"] == recipe["model"]["class_path"].replace("Module", "DataModule")
    if options.get("pretrained") in EMBEDDED:
        assert "network" not in options and "palette" not in options
    elif "pretrained" in options:
        before = read(Path(options["pretrained"]).name)
        assert before["trainer"]["default_root_dir"] == options["pretrained"]
        for key in ("source", "val_fraction"):  # else images held out there would be trained on here
            assert before["data"]["init_args"].get(key) == recipe["data"]["init_args"].get(key)
    else:
        assert len(Palette.load(options["palette"])) == network_of(recipe).vocab_size


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_settings(name):
    recipe, (n_layer, n_head, n_embd, side, lr) = printed("--config", name), PAPER[name]
    network, options, trainer = network_of(recipe), recipe["model"]["init_args"], recipe["trainer"]
    objective = "bert" if name.endswith("bert") else "autoregressive"
    assert network == ImageGPTConfig(n_layer, n_head or network.n_head, n_embd, 512, side, objective=objective)
    assert options["palette"] == "openai"
    assert (options["lr"], options["betas"], options["weight_decay"]) == (lr, [0.9, 0.95], 0)
    batch, steps = (64, 2_000_000) if side == 64 else (128, 1_000_000)
    assert (images_per_step(recipe), trainer["max_steps"]) == (batch, steps)
    assert options["mask_ratio"] == 0.15 and options["warmup_steps"] is None
    warmup = default_warmup(steps, IMAGENET_TRAIN // batch)
    assert abs(warmup - IMAGENET_TRAIN / batch) <= 1  # one epoch
    assert f"here {warmup:,} steps" in RECIPES[name].read_text()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=LARGE if name.startswith("imagenet") else ()) for name in RECIPES]
)
def test_the_recipe_runs(name, run):
    folder, _ = run(name)
    recipe, checkpoint = read(name), read_checkpoint(newest(folder))
    loaded = load_pretrained(folder)
    objective = recipe["model"]["init_args"].get("objective", "autoregressive")
    started = name.startswith("photos")  # from the embedded network
    assert loaded.config == (
        load_pretrained("photos").config if started else ImageGPTConfig(**TOY, objective=objective)
    )
    assert checkpoint[STAMP]["class"] == recipe["model"]["class_path"]
    drawn = list(folder.rglob("completions/*.png"))
    assert bool(drawn) == ("CompletionGrid" in RECIPES[name].read_text())
