import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_igpt.__main__ import main
from lightning_igpt.commands.complete import read_mask
from lightning_igpt.commands.images import read_images
from lightning_igpt.modules import PretrainModule
from lightning_igpt.palette import Palette
from lightning_igpt.sampling import HIDDEN, completion_rows, inpaint
from tests.image_files import save_images
from tests.modules.helpers import BERT, TINY, quiet_trainer
from tests.networks import random_network

PALETTE = Palette.load("gray:8")


@pytest.fixture(scope="module", params=[TINY, BERT], ids=["autoregressive", "BERT"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.objective)
    module = PretrainModule(request.param, "gray:8", objective=request.param.objective)
    module.network.load_state_dict(random_network(request.param).state_dict())
    trainer = quiet_trainer(folder, max_steps=1)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "network.ckpt")
    return str(folder / "network.ckpt")


def run(checkpoint, out, *words):
    options = ["--n_images", "2", "--n_samples", "2", "--out", str(out)]
    return main(["complete", "--pretrained", checkpoint, "--images", "digits", *options, *words])


def draw_mask(path, *, mode="L", size=(4, 4), hole=(1, 1, 2, 2), white=255, black=0):
    """An image with a white box (left, top, right, bottom, all inside)."""
    image = Image.new(mode, size, black)
    image.paste(white, (hole[0], hole[1], hole[2] + 1, hole[3] + 1))
    image.save(path)
    return str(path)


HOLE = torch.tensor([5, 6, 9, 10])  # the box of draw_mask in raster order


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "1", "white": 1},
        {"mode": "RGBA", "white": (255, 255, 255, 255), "black": (255, 255, 255, 0)},
        {"white": 128, "black": 127},
        {"size": (40, 40), "hole": (10, 10, 29, 29)},
        {"size": (60, 40), "hole": (20, 10, 39, 29)},
        {"size": (40, 80), "hole": (10, 30, 29, 49)},
    ],
    ids=["grey", "one bit", "transparent", "nearest end", "large", "wide", "high"],
)
def test_white_is_redrawn_and_the_rest_is_kept(options, tmp_path):
    hole = read_mask(draw_mask(tmp_path / "mask.png", **options), 4)
    assert hole.dtype == torch.bool
    assert torch.equal(hole.nonzero().flatten(), HOLE)


def test_masks_that_say_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"mask .*none\.png has no white pixel at 4 x 4"):
        read_mask(draw_mask(tmp_path / "none.png", white=0), 4)
    with pytest.raises(ValueError, match=r"mask .*absent\.png: there is no file"):
        read_mask(str(tmp_path / "absent.png"), 4)


def test_mask_redraws_the_hole_alone(checkpoint, tmp_path):
    assert run(checkpoint, tmp_path / "out", "--mask", draw_mask(tmp_path / "mask.png")) == 0
    tokens = PALETTE.quantize(read_images("digits", 4, limit=2)[0])
    truth = PALETTE.dequantize(tokens).flatten(2)
    changed = 0
    for image in range(2):
        files = sorted((tmp_path / "out").glob(f"{image:03d}-*.png"))
        assert len(files) == 2
        for file in files:
            different = (truth[image] != torch.from_numpy(np.array(Image.open(file))).flatten(0, 1).T).any(0)
            assert set(different.nonzero().flatten().tolist()) <= set(HOLE.tolist())
            changed += int(different.sum())
    assert changed > 4
    assert (tmp_path / "out" / "completions.png").is_file()


@pytest.mark.parametrize("config", [TINY, BERT], ids=["autoregressive", "BERT"])
def test_rows_hold_what_was_given_draws_and_the_truth(config):
    network = random_network(config)
    tokens, hole = torch.randint(8, (3, 16), generator=torch.manual_seed(0)), torch.zeros(16, dtype=torch.bool)
    hole[HOLE] = True
    rows = completion_rows(network, PALETTE, tokens, hole=hole, n_samples=2, seed=4)
    assert rows.shape == (3, 4, 3, 4, 4) and rows.dtype == torch.uint8
    flat, truth = rows.flatten(3), PALETTE.dequantize(tokens).flatten(2)
    assert torch.equal(flat[:, -1], truth)
    assert torch.equal(flat[..., ~hole], truth[:, None][..., ~hole].expand(3, 4, 3, 12))
    assert (flat[:, 0][..., hole] == torch.tensor(HIDDEN)[:, None]).all()
    assert not torch.equal(flat[:, 1], flat[:, 2])
    assert torch.equal(rows, completion_rows(network, PALETTE, tokens, hole=hole, n_samples=2, seed=4))
    assert not torch.equal(rows, completion_rows(network, PALETTE, tokens, hole=hole, n_samples=2, seed=5))


def test_an_image_file_is_completed_without_lightning_and_datasets(tmp_path):
    save_images(tmp_path, ["photo.png"])
    words = ["complete", "--images", str(tmp_path / "photo.png"), "--out", str(tmp_path / "out"), "--n_samples", "1"]
    code = f"import sys; from lightning_igpt.__main__ import main; main({words})\n"
    code += "assert not {'lightning', 'datasets', 'sklearn'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert (tmp_path / "out" / "000-photo-sample1.png").is_file()


def test_whole_pictures_in_random_order(checkpoint, tmp_path):
    words = ("--keep_rows", "0", "--order", "random", "--steps", "16")
    if "bert" not in checkpoint:
        with pytest.raises(SystemExit, match=r"this one is autoregressive.*drop steps and order"):
            run(checkpoint, tmp_path / "out", *words)
        return
    assert run(checkpoint, tmp_path / "out", *words) == 0
    nothing = torch.zeros(4, 16, dtype=torch.bool)
    options = {"steps": 16, "order": "random", "temperature": 0.8, "generator": torch.Generator().manual_seed(0)}
    drawn = PALETTE.dequantize(inpaint(random_network(BERT), nothing.long(), nothing, **options))
    for image, file in zip(drawn, sorted((tmp_path / "out").glob("00*.png")), strict=True):
        assert np.array_equal(Image.open(file), image.permute(1, 2, 0))


@pytest.mark.parametrize("words", [["--keep_rows", "0"], ["--top_k", "3"], ["--top_p", "0.5"]])
def test_a_mask_excludes_what_it_replaces(words, tmp_path):
    with pytest.raises(SystemExit, match="drop keep_rows, top_k, top_p"):
        run("nothing/loaded", tmp_path / "out", "--mask", "nothing is read", *words)


def test_names_of_samples(checkpoint, tmp_path):
    """Long ones are cut, and what is no text is written as an escape."""
    save_images(tmp_path / "photos", [f"{'ü' * 120}.png", "a\x1b[31mb.png"])
    assert run(checkpoint, tmp_path / "out", "--images", str(tmp_path / "photos")) == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("*-sample1.png"))
    assert names == [r"000-a\x1b[31mb-sample1.png", f"001-{'ü' * 50}-sample1.png"]
