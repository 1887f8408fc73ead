import csv
import math
import re
import statistics
import tracemalloc

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image

from lightning_igpt.__main__ import main
from lightning_igpt.commands.images import read_images
from lightning_igpt.commands.score import surprise_sheet
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.palette import Palette
from lightning_igpt.sampling import score
from lightning_igpt.weights import save_pretrained
from tests.image_files import noise, rows, save_images
from tests.modules.helpers import BERT
from tests.networks import random_network

CONFIG = ImageGPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=16, image_size=8)
PALETTE = Palette.load("gray:16")


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("network")
    save_pretrained(folder, random_network(CONFIG), PALETTE)
    return str(folder)


def run(network_folder, out, *words):
    return main(["score", "--pretrained", network_folder, "--images", "digits", "--out", str(out), *words])


def test_list_mean_and_error_are_those_of_the_images(network_folder, tmp_path, capsys):
    assert run(network_folder, tmp_path / "new" / "digits.csv", "--limit", "12", "--batch_size", "5") == 0
    pixels, names = read_images("digits", 8, limit=12)
    means = score(random_network(CONFIG), PALETTE.quantize(pixels)).mean(1).tolist()
    rows = list(csv.reader((tmp_path / "new" / "digits.csv").open()))
    assert rows[0] == ["image", "nats_per_pixel", "bits_per_pixel"]
    best_first = sorted(zip(means, names, strict=True), reverse=True)
    assert [row[0] for row in rows[1:]] == [name for _, name in best_first]
    for (_, nats, bits), (expected, _) in zip(rows[1:], best_first, strict=True):
        assert float(nats) == pytest.approx(expected, abs=2e-6)
        assert float(bits) == pytest.approx(expected / math.log(2), abs=2e-6)
    said = capsys.readouterr().out
    mean, error = re.search(r"^12 images: (\S+) \+- (\S+) nats per pixel .*n = 12", said, re.MULTILINE).groups()
    assert float(mean) == pytest.approx(statistics.mean(means), abs=1e-4)
    assert float(error) == pytest.approx(statistics.stdev(means) / math.sqrt(12), abs=1e-4)
    ranks = re.findall(r"^ +(\d+) +(\S+)  (\S+)$", said, re.MULTILINE)
    assert [(int(rank), name) for rank, _, name in ranks] == [(i + 1, best_first[i][1]) for i in range(5)]
    assert [float(nats) for _, nats, _ in ranks] == pytest.approx([nats for nats, _ in best_first[:5]], abs=1e-4)
    with Image.open(tmp_path / "new" / "digits_surprise.png") as drawn:
        assert drawn.mode == "RGB" and drawn.width > 4 * 2 * 128


def test_one_image_has_no_standard_error(network_folder, tmp_path, capsys):
    assert run(network_folder, tmp_path / "one.csv", "--limit", "1", "--pictures", "0") == 0
    said = capsys.readouterr().out
    assert re.search(r"^1 image: \d\.\d{4} nats per pixel \(no standard error", said, re.M) and "nan" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["one.csv"]


def area(sheet, color):
    """Pixels of a color on a sheet, in units of one enlarged 8 x 8 image."""
    return (sheet == torch.as_tensor(color).view(3, 1, 1)).all(0).sum().item() / 128**2


@pytest.mark.parametrize(
    ("pictures", "drawn"), [(4, [9, 8, 7, 6, 3, 2, 1, 0]), (8, list(range(10))), (99, list(range(10)))]
)
def test_sheet_shows_the_most_and_the_least_surprising_once(pictures, drawn):
    """Ten images of one color each; number i has i / 10 nats in every pixel."""
    tokens = torch.arange(1, 11)[:, None].expand(10, 64)
    nats = torch.arange(10)[:, None].expand(10, 64) / 10
    sheet = surprise_sheet(tokens, nats, [f"{i}.png" for i in range(10)], PALETTE, pictures=pictures)
    shown = [i for i in range(10) if area(sheet, PALETTE.rgb[tokens[i, 0]]) > 0.5]
    assert shown == sorted(drawn)
    assert all(area(sheet, PALETTE.rgb[tokens[i, 0]]) < 1.5 for i in shown)


def test_heat_maps_share_one_scale():
    nats = torch.zeros(2, 64)
    nats[0, 8:12] = math.log(16)
    nats[1, :32] = 100
    sheet = surprise_sheet(torch.ones(2, 64, dtype=torch.long), nats, ["a", "b"], PALETTE, pictures=2)
    black, bright = (np.array(colormaps["magma"](end, bytes=True)[:3]) for end in (0.0, 1.0))
    assert area(sheet, bright) == pytest.approx(32 / 64, abs=0.05)
    assert area(sheet, black) == pytest.approx((60 + 32) / 64, abs=0.05)  # and the text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--batch_size", "0"], "batch_size is 0"),
        (["--limit", "0"], "limit is 0; it must be at least 1"),
        (["--images", "nowhere"], "nowhere"),
        (["--against", "nowhere"], "nowhere does not exist"),
        (["--n_draws", "5"], "n_draws is 5"),
    ],
)
def test_mistakes_are_told_in_one_line(network_folder, tmp_path, words, told):
    with pytest.raises(SystemExit, match=told) as stop:
        run(network_folder, tmp_path / "scores.csv", *words)
    assert "\n" not in stop.value.code
    assert not list(tmp_path.iterdir())


def test_a_damaged_image_is_named_and_may_be_left_out(network_folder, tmp_path, capsys):
    photos = save_images(tmp_path / "photos", ["a.png", "b.png", "c.png"])
    (photos / "b.png").write_bytes(b"<html>")
    words, out = ("--images", str(photos), "--pictures", "0"), tmp_path / "scores.csv"
    with pytest.raises(SystemExit, match=r"photos/b\.png: the file is not an image"):
        run(network_folder, out, *words)
    assert run(network_folder, out, *words, "--on_bad_image", "skip") == 0
    assert sorted(row[0] for row in list(csv.reader(out.open()))[1:]) == ["photos/a.png", "photos/c.png"]
    assert "left out photos/b.png: the file is not an image" in capsys.readouterr().out
    for name in ("a.png", "c.png"):
        (photos / name).write_bytes(b"")
    with pytest.raises(SystemExit, match=r"can be read \(tried: 3\)"):
        run(network_folder, out, *words, "--on_bad_image", "skip")


def test_a_network_that_diverged_is_told_apart_from_surprising_images(tmp_path):
    network = random_network(CONFIG)
    with torch.no_grad():
        network.ln_f.weight.fill_(3e38)  # finite, but not what it is multiplied with
    save_pretrained(tmp_path / "network", network, PALETTE)
    with pytest.raises(SystemExit, match="test-00000: its surprise is nan"):
        run(str(tmp_path / "network"), tmp_path / "scores.csv", "--limit", "2")
    assert not (tmp_path / "scores.csv").exists()


def test_a_bert_network_gives_a_bound_with_the_error_of_its_draws(tmp_path, capsys):
    network, palette, out = random_network(BERT), Palette.load("gray:8"), tmp_path / "scores.csv"
    save_pretrained(tmp_path / "bert", network, palette)
    words = ("--limit", "6", "--batch_size", "4", "--n_draws", "8", "--seed", "3")
    assert run(str(tmp_path / "bert"), out, *words) == 0
    pixels, names = read_images("digits", 4, limit=6)
    draws = score(network, palette.quantize(pixels), n_draws=8, seed=3)  # (6, 4)
    expected = {name: (row.mean().item(), row.std().item() / 2) for name, row in zip(names, draws, strict=True)}
    heads, *rows = csv.reader(out.open())
    assert heads[1:] == ["nats_per_pixel_bound", "bits_per_pixel_bound", "standard_error_nats_per_pixel"]
    for name, nats, _, error in rows:
        assert (float(nats), float(error)) == pytest.approx(expected[name], abs=2e-6)
    assert "an upper bound by 8 masks" in capsys.readouterr().out and not list(tmp_path.glob("*.png"))


def test_one_encoded_image_is_in_memory_at_a_time(tmp_path):
    rows([noise((500, 500), seed) for seed in range(12)]).to_parquet(tmp_path / "noise.parquet")
    read_images(str(tmp_path / "noise.parquet"), 8, limit=1)  # which converts the file
    tracemalloc.start()
    assert len(read_images(str(tmp_path / "noise.parquet"), 8)[1]) == 12
    assert tracemalloc.get_traced_memory()[1] < 6 * 750_000
    tracemalloc.stop()


def test_names_are_shown_escaped(network_folder, tmp_path, capsys):
    save_images(tmp_path / "photos", ["a\x1b[31mb.png", "c\nd.png"])
    assert run(network_folder, tmp_path / "x.csv", "--images", str(tmp_path / "photos")) == 0
    assert r"a\x1b[31mb.png" in (out := capsys.readouterr().out) and r"c\nd.png" in out


def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read(tmp_path):
    (tmp_path / "text.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.txt holds no images: a file ends in .*\.parquet \.png"):
        read_images(str(tmp_path / "text.txt"), 8)
