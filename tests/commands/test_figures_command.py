import csv

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_igpt.__main__ import OWN_VERBS, main
from lightning_igpt.commands.figures import wanted
from lightning_igpt.commands.images import read_images, read_originals
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.modules import PretrainModule
from lightning_igpt.palette import Palette
from lightning_igpt.sampling import score
from lightning_igpt.weights import save_pretrained
from tests.image_files import noise, save_images
from tests.modules.helpers import BERT, quiet_trainer
from tests.networks import random_network

CONFIG = ImageGPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=16, image_size=8)
PALETTE = Palette.load("gray:16")
LIGHT, DARK = (255, 255, 255), (0x13, 0x14, 0x16)


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    save_pretrained(folder, random_network(CONFIG), PALETTE)
    return str(folder)


@pytest.fixture(scope="module")
def runs_folder(tmp_path_factory):
    """A pretraining of three validations, and two probes of it."""
    folder = tmp_path_factory.mktemp("runs")
    write(folder / "pretrain" / "metrics.csv", "step,val/nats_per_pixel", [(10, 2.5), (20, 2.25), (30, 2.0)])
    for name, accuracy in (("good", 0.5), ("bad", 0.25)):
        rows = [(layer, accuracy, accuracy + layer / 100) for layer in range(3)]
        write(folder / name / "probe_by_layer.csv", "layer,val_accuracy,test_accuracy", rows)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for number in range(4):
        noise(size=(12, 9), seed=number).save(folder / f"{number}.png")
    return str(folder)


def write(path, head, rows):
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head.split(","), *rows])


def figures(out, *words):
    assert main(["figures", "--out", str(out), *words]) == 0
    return {path.stem: path for path in sorted(out.glob("*.png"))}


def pixels_of(path):
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def both(*names):
    return sorted(f"{name}{suffix}" for name in names for suffix in ("", "-dark"))


@pytest.fixture(scope="module")
def drawn(network_folder, photos, runs_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn")
    given = ("--pretrained", network_folder, "--images", photos, "--runs", runs_folder)
    return figures(out, *given, "--n_images", "3", "--n_samples", "2")


def test_a_network_its_images_and_its_runs_give_six_figures_on_two_pages(drawn):
    assert sorted(drawn) == both("palette", "quantised", "completions", "surprise", "curves", "layers")
    for name, path in drawn.items():
        page = pixels_of(path)
        assert 700 < page.shape[1] < 1100, name
        assert tuple(page[0, 0]) == (DARK if name.endswith("-dark") else LIGHT)
        assert page.shape == pixels_of(drawn[name.removesuffix("-dark")]).shape
        assert path.stat().st_size < 60_000


@pytest.mark.parametrize("suffix", ["", "-dark"])
def test_pixels_have_their_exact_colours_and_are_whole_squares(drawn, photos, suffix):
    images, _ = read_images(photos, 8, limit=3)
    truth = PALETTE.dequantize(PALETTE.quantize(images)).permute(0, 2, 3, 1).numpy()
    page, cell = pixels_of(drawn[f"completions{suffix}"]), 960 // 4  # given, two samples, truth
    for row in range(3):
        top = 46 + row * (cell + 10)
        shown = page[top : top + cell, 10 + 3 * (cell + 10) :][:, :cell]
        assert np.array_equal(shown, truth[row].repeat(cell // 8, 0).repeat(cell // 8, 1))
        given = page[top : top + cell // 2, 10 : 10 + cell]
        assert np.array_equal(given, shown[: cell // 2])


def test_light_and_dark_show_the_same_samples(drawn):
    light, dark = (pixels_of(drawn[f"completions{suffix}"]) for suffix in ("", "-dark"))
    assert np.array_equal(light[46:286, 260:500], dark[46:286, 260:500])


def test_the_same_seed_gives_the_same_bytes_and_another_one_other_samples(drawn, network_folder, photos, tmp_path):
    given = ("--pretrained", network_folder, "--images", photos, "--n_images", "3", "--n_samples", "2")
    names = both("completions", "surprise")
    again = figures(tmp_path / "same", *given, "--only", "completions,surprise")
    assert sorted(again) == names
    assert all(again[name].read_bytes() == drawn[name].read_bytes() for name in names)
    other = figures(tmp_path / "other", *given, "--only", "surprise,completions", "--seed", "1")
    assert other["completions"].read_bytes() != drawn["completions"].read_bytes()
    assert other["surprise"].read_bytes() == drawn["surprise"].read_bytes()


def test_brighter_is_more_surprising(drawn, photos):
    """Of the first image, the map's brightness ranks its pixels as their surprise does, up to the ends of the scale."""
    images, _ = read_images(photos, 8, limit=3)
    nats = score(random_network(CONFIG), PALETTE.quantize(images))[0]
    cell = 960 // 3
    page = pixels_of(drawn["surprise"])
    top = 46 + cell + 10 + cell // 16
    shown = page[top : top + cell : cell // 8, 10 + cell // 16 : 10 + cell : cell // 8].sum(2).ravel()
    legend = page[top + cell + 10 :]
    assert len(np.unique(legend.reshape(-1, 3), axis=0)) > 100
    order = torch.argsort(nats).numpy()
    assert (np.diff(shown[order].astype(int)) >= 0).all() and len(set(shown)) > 10


def test_without_a_network_the_photographs_of_scikit_learn_are_shown_at_two_sizes(tmp_path, capsys):
    drawn = figures(tmp_path, "--n_images", "1", "--palette", "gray:8")
    assert sorted(drawn) == both("palette", "quantised")
    page = pixels_of(drawn["quantised"])
    assert page.shape == (10 + 36 + 192 + 10, 5 * 202 + 10, 3)
    greys = page[46:238, 10 + 2 * 202 :][:, :192].reshape(-1, 3)
    assert {tuple(color) for color in greys.tolist()} <= {tuple(color) for color in Palette.load("gray:8").rgb.tolist()}
    assert len({tuple(color) for color in page[46:238, 10:202].reshape(-1, 3).tolist()}) > 1000
    assert "palette.png and palette-dark.png" in capsys.readouterr().out


def test_diagrams_are_drawn_when_they_are_named(tmp_path):
    drawn = figures(tmp_path, "--only", "raster, shift,taps")
    assert sorted(drawn) == both("raster", "shift", "taps")
    for name in ("raster", "shift", "taps"):
        light, dark = pixels_of(drawn[name]), pixels_of(drawn[f"{name}-dark"])
        assert light.shape == dark.shape and light.shape[1] == 840
        for page in (light, dark):  # nothing is cut off at the edges
            edges = [page[0], page[-1], page[:, 0], page[:, -1]]
            assert all((edge == page[0, 0]).all() for edge in edges), name


def test_a_bert_network_has_completions_but_no_surprise(photos, tmp_path, capsys):
    trainer = quiet_trainer(tmp_path, max_steps=1)
    trainer.strategy.connect(PretrainModule(BERT, "gray:8", objective="bert"))
    trainer.save_checkpoint(tmp_path / "bert.ckpt")
    given = ("--pretrained", str(tmp_path / "bert.ckpt"), "--images", photos, "--n_images", "1", "--n_samples", "1")
    drawn = figures(tmp_path / "out", *given)
    assert sorted(drawn) == both("palette", "quantised", "completions")
    assert "left out surprise: a BERT network has no likelihood" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no figure surprise: a BERT network has no likelihood"):
        figures(tmp_path / "out", *given, "--only", "surprise")


def test_a_figure_that_runs_do_not_give_is_left_out_or_refused(runs_folder, tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"no figure layers: .*pretrain holds no probe of several layers"):
        figures(tmp_path, "--runs", f"{runs_folder}/pretrain", "--only", "layers")
    drawn = figures(tmp_path, "--runs", f"{runs_folder}/good", "--n_images", "1", "--palette", "gray:2")
    assert sorted(drawn) == both("palette", "quantised", "layers")
    assert "left out curves: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--only", "palete"], "there is no figure 'palete'; did you mean palette?"),
        (["--only", "zzz"], "there is no figure 'zzz'; there are palette, quantised"),
        (["--only", "completions"], "figure completions needs --pretrained"),
        (["--only", "layers"], "figure layers needs --runs"),
        (["--runs", "nowhere"], "nowhere does not exist"),
        (["--n_samples", "0"], "n_samples is 0"),
        (["--images", "digits", "--n_images", "0"], "asked for 0 images"),
        (["--n_images", "0"], "asked for 0 images"),
        (["--pretrained", "x", "--palette", "openai"], "x has a palette of its own"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path, words, told):
    with pytest.raises(SystemExit) as stop:
        figures(tmp_path / "out", *words)
    assert told in stop.value.code and "\n" not in stop.value.code
    assert not (tmp_path / "out").exists()


def test_every_figure_that_is_possible_is_wanted_once_in_one_order():
    assert wanted(None, has_network=False, has_runs=False) == ["palette", "quantised"]
    assert wanted("layers,palette,layers", has_network=False, has_runs=True) == ["palette", "layers"]


def test_originals_are_neither_resized_nor_lost(tmp_path):
    photos = save_images(tmp_path / "photos", ["a.png", "b.png"])
    noise(size=(40, 30)).save(photos / "c.png")
    found = list(read_originals(str(photos)))
    assert [name for _, name in found] == ["photos/a.png", "photos/b.png", "photos/c.png"]
    assert found[2][0].size == (40, 30) and np.array_equal(np.array(found[2][0]), np.array(noise(size=(40, 30))))


def test_the_verb_is_listed():
    assert "figures" in OWN_VERBS
