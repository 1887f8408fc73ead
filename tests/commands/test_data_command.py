"""``lightning-igpt data show``: every number is counted a second time, and the picture is read back."""

import re

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_igpt.__main__ import main
from lightning_igpt.commands.data_look import letterbox, spread
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.data import FineTuneDataModule, PretrainDataModule, tokenize
from lightning_igpt.data.transforms import RandomCrop
from lightning_igpt.images import decode, resize_center_crop
from lightning_igpt.model import ImageGPT
from lightning_igpt.palette import Palette
from lightning_igpt.weights import save_pretrained
from tests.image_files import noise, rows, tiny

CELL, GAP, CAPTION = 128, 4, 18


@pytest.fixture(autouse=True)
def _work_in_a_folder_of_its_own(monkeypatch, tmp_path_factory, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))


@pytest.fixture
def photos(tmp_path):
    """Six files of five modes, 16 bits and an alpha channel among them, and a damaged one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    noise((90, 70), 1).save(folder / "a.png")
    noise((20, 30), 2).convert("L").save(folder / "b.png")
    Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)).save(folder / "c.png")
    clear = noise((16, 16), 3).convert("RGBA")
    clear.putalpha(Image.new("L", (16, 16), 100))
    clear.save(folder / "d.png")
    (folder / "e.jpg").write_bytes(b"no image")
    noise((300, 8), 4).convert("CMYK").save(folder / "f.jpg")
    noise((16, 16), 5).save(folder / "g.png")
    return folder


def shown(capsys, *words):
    """What ``data show`` prints: the text, and what follows each name at the beginning of a line."""
    capsys.readouterr()
    assert main(["data", "show", *map(str, words)]) == 0
    text = capsys.readouterr().out
    return text, {line[:12].strip(): line[12:] for line in text.splitlines() if line[:12].strip()}


def refusal(*words):
    """The line with which the program ends; exit status 1."""
    with pytest.raises(SystemExit) as stop:
        main(["data", "show", *map(str, words)])
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    assert stop.value.code.startswith("lightning-igpt data: ")
    return stop.value.code


def cells(path="data.png", n_columns=4, side=CELL):
    """The pictures of the contact sheet, uint8 (rows, columns, 3, side, side)."""
    with Image.open(path) as image:
        sheet = np.asarray(image)
    pitch = side + GAP
    tops = [CAPTION + GAP] if len(sheet) > side else []
    while tops and tops[-1] + 2 * (pitch + GAP + CAPTION) <= len(sheet) + CAPTION + GAP:
        tops.append(tops[-1] + pitch + GAP + CAPTION)
    lefts = [GAP + number * pitch for number in range(n_columns)]
    found = [[sheet[top : top + side, left : left + side] for left in lefts] for top in tops]
    return torch.from_numpy(np.array(found)).permute(0, 1, 4, 2, 3)


def shrunk(pictures, size):
    """Enlarged pictures with one pixel for each square; every square has to be of one colour."""
    factor = CELL // size
    small = pictures[..., ::factor, ::factor]
    assert torch.equal(small.repeat_interleave(factor, -1).repeat_interleave(factor, -2), pictures)
    return small


def tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def recipe(path, data, model=None, **sections):
    content = {"data": {"class_path": "PretrainDataModule", "init_args": data}, **sections}
    if model is not None:
        content["model"] = {"class_path": "PretrainModule", "init_args": model}
    path.write_text(yaml.safe_dump(content))
    return path


class TestFolder:
    def test_every_kind_of_file_is_counted(self, photos, capsys):
        text, said = shown(capsys, photos, "--image_size", 16, "--palette", "gray:4")
        assert said["source"] == str(photos)
        assert said["splits"] == "train             7  trains on 6, validates on 1 (held out)"
        assert said["columns"] == "image, no labels"
        assert said["classes"] == "none"
        assert said["looked at"] == "7 of train"
        assert said["images"] == "RGB 2, L 1, I;16 1, RGBA 1, CMYK 1; 16 x 16 to 90 x 70"
        assert said["bad images"] == "1 of 7 (train 1)"
        assert re.search(r"split 'train', row 4 \(\S+e\.jpg\): the file is not an image of a known format", text)
        assert "a run stops at the first of them" in text
        assert said["crop"].startswith("random squares of 2 of 6 looked at (shorter side at least 32)")

    def test_the_palette_error_is_that_of_all_resized_images(self, photos, capsys):
        images = [
            tensor(resize_center_crop(decode({"path": str(path)}), 16))
            for path in sorted(photos.iterdir())
            if path.name != "e.jpg"
        ]
        expected = Palette.load("gray:4").rmse(torch.stack(images))
        _, said = shown(capsys, photos, "--image_size", 16, "--palette", "gray:4")
        assert said["palette"] == f"gray:4, 4 colours: RMSE {expected:.2f} of 255 per channel at 16 x 16"

    def test_the_sheet_shows_what_training_makes_of_the_images(self, photos, capsys):
        text, _ = shown(capsys, photos, "--image_size", 16, "--palette", "gray:4", "--out", "new/sheet.png")
        assert "wrote new/sheet.png: 6 training images (original, resized, quantised, in training)" in text
        data = PretrainDataModule(str(photos), image_size=16)
        data.setup()
        files = [sorted(photos.iterdir())[row] for row in data.parts["train"].rows]
        images = [decode({"path": str(file)}) for file in files if file.name != "e.jpg"]
        palette, pictures = Palette.load("gray:4"), cells("new/sheet.png")
        assert len(pictures) == len(images) == 6
        assert torch.equal(pictures[:, 0], torch.stack([letterbox(image, CELL) for image in images]))
        resized = torch.stack([tensor(resize_center_crop(image, 16)) for image in images])
        assert torch.equal(shrunk(pictures[:, 1], 16), resized)
        assert torch.equal(shrunk(pictures[:, 2], 16), palette.dequantize(palette.quantize(resized)))
        drawn = torch.stack([tensor(RandomCrop(16, 0)(image, number)) for number, image in enumerate(images)])
        assert torch.equal(shrunk(pictures[:, 3], 16), palette.dequantize(palette.quantize(drawn)))
        assert not torch.equal(pictures[:, 3], pictures[:, 2])

    def test_an_image_takes_the_place_of_a_bad_one(self, photos, capsys):
        text, _ = shown(capsys, photos, "--palette", "gray:4", "--data.val_fraction", 0, "--n_images", 6)
        assert "6 training images" in text
        assert len(cells()) == 6

    def test_hidden_labels_are_told_of(self, tmp_path, capsys):
        rows([noise((4, 4), 1)] * 4, [0, 1, -1, 1]).save_to_disk(tmp_path / "stored")
        _, said = shown(capsys, tmp_path / "stored", "--palette", "gray:4")
        assert said["classes"].startswith("2, but the labels are of no use: 1 of 4 labels of")

    def test_skip_is_judged_by_the_share_it_allows(self, photos, capsys):
        words = (photos, "--palette", "gray:4", "--data.on_bad_image", "skip")
        assert "max_bad_share is 0.05 and these are 0.14: a run stops" in shown(capsys, *words)[0]
        assert "a run leaves them out" in shown(capsys, *words, "--data.max_bad_share", 0.5)[0]

    def test_nothing_but_bad_images_is_still_a_report(self, tmp_path, capsys):
        for number in range(12):
            (tmp_path / f"{number:02}.png").write_bytes(b"no image")
        text, said = shown(capsys, tmp_path, "--palette", "gray:4")
        assert said["bad images"] == "12 of 12 (train 12)"
        assert text.count("not an image of a known format") == 10
        assert "  and 2 more\n" in text
        assert "0 training images" in text

    def test_a_limit_is_spread_over_the_split(self, photos, capsys):
        assert (
            shown(capsys, photos, "--palette", "gray:4", "--limit", 2)[1]["images"]
            == "RGB 1, RGBA 1; 16 x 16 to 90 x 70"
        )
        assert shown(capsys, photos, "--palette", "gray:4", "--limit", 0)[1]["looked at"] == "7 of train"
        assert spread(7, 2) == [0, 3]
        assert spread(3, 0) == spread(3, 5) == [0, 1, 2]

    def test_classes_beyond_twenty_are_summed_up(self, tmp_path, capsys):
        for number in range(23):
            (tmp_path / f"c{number:02}").mkdir()
            for copy in range(1 + number % 2):
                noise((4, 4), number).save(tmp_path / f"c{number:02}" / f"{copy}.png")
        text, said = shown(capsys, tmp_path, "--palette", "gray:4", "--data.val_fraction", 0)
        assert said["classes"] == "23, with 1 to 2 training images each"
        found = re.findall(r"^  (c\d\d) +(\d)$", text, re.MULTILINE)
        assert found == [(f"c{number:02}", str(1 + number % 2)) for number in range(20)]
        assert "\n  and 3 more\n" in text


class TestRecipe:
    def test_by_name_with_other_images(self, photos, capsys):
        words = ("--config", "digits_tiny_pretrain", "--data.init_args.source", photos, "--data.batch_size=3")
        _, said = shown(capsys, *words)
        assert said["source"] == str(photos)
        assert said["palette"].startswith("gray:16, 16 colours: RMSE ")
        assert said["palette"].endswith(" at 8 x 8")
        assert said["training"] == "PretrainDataModule: 8 x 8 pixels, 64 tokens per image"
        assert said["batches"] == "2 of 3 in a pass on one device"

    def test_digits_are_counted_as_the_data_module_has_them(self, capsys):
        text, said = shown(capsys, "--config", "digits_tiny_pretrain", "--limit", 10)
        assert said["splits"] == "train         1,437  trains on 1,293, validates on 144 (held out)"
        assert "test            360  tests\n" in text
        assert said["columns"] == "image, label"
        data = PretrainDataModule(batch_size=16)
        data.setup()
        part = data.parts["train"]
        counts = np.bincount(np.array(part.dataset["label"])[part.rows])
        assert [int(count) for count in re.findall(r"^  \d +(\d+)$", text, re.MULTILINE)] == counts.tolist()
        assert said["looked at"] == "10 of train, 10 of test"
        assert said["images"] == "L 20; 8 x 8"
        assert said["batches"] == f"{data.batches_per_epoch} of 16 in a pass on one device"

    def test_fine_tuning_shows_its_augmentation(self, tmp_path, capsys):
        tiny(26, (8, 8)).save_to_disk(tmp_path / "stored")
        words = ("--data", "FineTuneDataModule", "--data.pad", 2, "--data.source", tmp_path / "stored")
        _, said = shown(capsys, *words, "--image_size", 8, "--palette", "gray:4")
        assert said["augment"] == "padded by 2 reflected pixels and cut at random, mirrored at random"
        assert said["crop"] == "the middle square of each image"
        data = FineTuneDataModule("digits", image_size=8, pad=2)
        augment = data.augmentation()
        quantised, trained = shrunk(cells(), 8)[:, 2], shrunk(cells(), 8)[:, 3]
        expected = augment(quantised.numpy(), range(len(quantised)))
        assert torch.equal(trained, torch.from_numpy(expected))

    def test_a_token_cache_of_one_crop_keeps_the_centre(self, photos, capsys):
        words = (photos, "--image_size", 16, "--palette", "gray:4", "--data.cache", "disk")
        _, said = shown(capsys, *words)
        assert (said["crop"], said["cache"]) == (
            "the middle square of each image",
            "disk: tokens, 1 of each image",
        )
        assert torch.equal(cells()[:, 2], cells()[:, 3])
        _, said = shown(capsys, *words, "--data.n_crops", 3)
        assert said["crop"].startswith("random squares")

    def test_references_are_followed_and_flags_count_in_them(self, photos, tmp_path, capsys):
        data = {"source": str(photos), "batch_size": "${trainer.devices}"}
        model = {
            "network": "igpt_tiny",
            "image_size": "${data.init_args.batch_size}",
            "palette": "gray:${trainer.colors}",
        }
        file = recipe(tmp_path / "r.yaml", data, model, trainer={"devices": 6, "colors": 4, "loop": "${nowhere}"})
        text, said = shown(capsys, "--config", file)
        assert "gray:4, 4 colours" in text
        assert said["training"].startswith("PretrainDataModule: 6 x 6 pixels")
        _, said = shown(capsys, "-c", file, "--data.init_args.batch_size", 5)
        assert said["training"].startswith("PretrainDataModule: 5 x 5 pixels")

    def test_several_recipes_merge_and_the_options_win(self, photos, tmp_path, capsys):
        one = recipe(tmp_path / "one.yaml", {"source": "digits", "image_size": 9}, {"palette": "gray:8"})
        two = recipe(tmp_path / "two.yaml", {"source": str(photos)})
        _, said = shown(capsys, "--config", one, "--config", two)
        assert said["source"] == str(photos)
        assert said["palette"].startswith("gray:8") and said["palette"].endswith("9 x 9")
        _, said = shown(capsys, "--config", one, f"--config={two}", "--image_size", 7, "--palette", "gray:4")
        assert said["palette"].startswith("gray:4") and said["palette"].endswith("7 x 7")

    @pytest.mark.parametrize(
        ("model", "size"),
        [
            ({}, 32),
            ({"network": "igpt_tiny"}, 32),
            ({"network": {"n_layer": 1, "image_size": 8}}, 8),
            ({"network": {"n_layer": 1, "image_size": 8}, "image_size": 12}, 12),
        ],
    )
    def test_the_size_is_the_networks(self, model, size, photos, tmp_path, capsys):
        file = recipe(tmp_path / "r.yaml", {"source": str(photos)}, model | {"palette": "gray:4"})
        assert shown(capsys, "--config", file, "--limit", 1)[1]["palette"].endswith(f" at {size} x {size}")

    def test_palette_and_size_of_pretrained_weights(self, photos, tmp_path, capsys):
        save_pretrained(tmp_path / "weights", ImageGPT(ImageGPTConfig(1, 1, 8, 4, 6)), Palette.load("gray:4"))
        file = recipe(tmp_path / "r.yaml", {"source": str(photos)}, {"pretrained": str(tmp_path / "weights")})
        _, said = shown(capsys, "--config", file)
        assert said["palette"].startswith(f"of {tmp_path / 'weights'}, 4 colours") and said["palette"].endswith("6 x 6")

    def test_weights_that_are_not_there_yet(self, photos, tmp_path, capsys):
        file = recipe(tmp_path / "r.yaml", {"source": str(photos)}, {"pretrained": "runs/not/yet.ckpt"})
        text, said = shown(capsys, "--config", file, "--limit", 1)
        assert "runs/not/yet.ckpt is not there yet: palette openai and 32 x 32 pixels are assumed\n" in text
        assert said["palette"].startswith("openai, 512 colours")

    def test_slices_and_splits_without_use(self, tmp_path, capsys):
        stored = datasets.DatasetDict({"train": tiny(20), "test": tiny(4), "extra": tiny(5)})
        stored.save_to_disk(tmp_path / "stored")
        words = (tmp_path / "stored", "--palette", "gray:4", "--data.train_split", "train[:15]")
        text, said = shown(capsys, *words, "--data.val_split", "train[15:]")
        lines = [re.split(r"  +", line[12:].strip()) for line in text.splitlines()[1:6]]
        assert lines == [
            ["train", "20", "used in slices"],
            ["test", "4", "tests"],
            ["extra", "5", "not used"],
            ["train[:15]", "15", "trains"],
            ["train[15:]", "5", "validates"],
        ]
        assert said["looked at"] == "15 of train[:15], 5 of train[15:], 4 of test"


class TestTokens:
    @pytest.fixture
    def stored(self, tmp_path):
        tokenize(tiny(9, (8, 8)), "gray:4", size=8).save_to_disk(tmp_path / "tokens")
        return tmp_path / "tokens"

    def test_their_pictures_by_their_palette(self, stored, capsys):
        text, said = shown(capsys, stored, "--palette", "gray:4", "--data.val_fraction", 0, "--n_images", 20)
        assert said["images"] == "tokens; 8 x 8"
        assert said["palette"] == f"gray:4, 4 colours, the tokens' own ({Palette.load('gray:4').sha256[:12]})"
        assert "9 training images (tokens, in training)" in text
        tokens = torch.tensor(datasets.load_from_disk(str(stored))["tokens"][:])
        assert torch.equal(shrunk(cells(n_columns=2), 8)[:, 0], Palette.load("gray:4").dequantize(tokens))

    def test_unknown_colours_are_not_shown(self, stored, tmp_path, capsys):
        text, said = shown(capsys, stored)
        assert said["palette"].startswith(f"unknown: the tokens belong to {Palette.load('gray:4').sha256[:12]}")
        assert "--palette" in text
        assert not (tmp_path / "data.png").exists()

    def test_tokens_without_a_colour_are_bad(self, stored, tmp_path, capsys):
        ruined = datasets.load_from_disk(str(stored)).map(
            lambda row, number: {"tokens": [4] * 64} if number == 3 else row, with_indices=True
        )
        ruined.save_to_disk(tmp_path / "ruined")
        text, said = shown(capsys, tmp_path / "ruined", "--palette", "gray:4")
        assert said["bad images"] == "1 of 9 (train 1)"
        assert "row 3: tokens from 4 to 4, but 4 colours have ids 0..3" in text

    def test_another_size_than_the_networks_is_refused(self, stored):
        assert "holds tokens of 8 x 8 images, but image_size is 9" in refusal(stored, "--image_size", 9)


class TestStreams:
    @pytest.fixture
    def stored(self, tmp_path):
        (tmp_path / "parquet").mkdir()
        tiny(40).to_parquet(tmp_path / "parquet" / "train.parquet")
        return tmp_path / "parquet"

    def test_only_the_first_rows_are_read(self, stored, capsys):
        words = (stored, "--palette", "gray:4", "--data.streaming", "true", "--image_size", 4, "--limit", 7)
        text, said = shown(capsys, *words)
        assert said["splits"].startswith(
            "train  unknown (stream)  trains on about 90%, validates on the first 1,000 of"
        )
        assert said["looked at"] == "the first 7 of train"
        assert said["classes"] == "2, counts unknown (stream): a, b"
        assert said["streaming"] == "yes, shuffled within shards and blocks of 1,000"
        assert said["batches"] == "of 128; how many in a pass is unknown (stream)"
        assert "8 training images" in text

    def test_the_sheet_leaves_out_what_validates(self, stored, capsys):
        words = (stored, "--palette", "gray:4", "--data.streaming", "true", "--image_size", 4, "--n_images", 40)
        shown(capsys, *words, "--data.val_fraction", 0.5)
        data = PretrainDataModule(str(stored), image_size=4, streaming=True, val_fraction=0.5)
        data.setup()
        held_out = torch.cat([batch["image"] for batch in data.val_dataloader()])[:, 0, 0, 0].tolist()
        resized = shrunk(cells()[:, 1], 4)[:, 0, 0, 0].tolist()
        assert 0 < len(held_out) < 40
        assert sorted(resized + held_out) == list(range(40))

    def test_tokens(self, tmp_path, capsys):
        tokenize(tiny(9, (8, 8)), "gray:4", size=8).to_parquet(tmp_path / "tokens.parquet")
        text, _ = shown(capsys, tmp_path / "tokens.parquet", "--palette", "gray:4", "--data.streaming", "true")
        assert "(tokens, in training)" in text


class TestMistakes:
    def test_are_told_in_one_line(self, photos, tmp_path):
        (tmp_path / "broken.yaml").write_text("data: [")
        (tmp_path / "list.yaml").write_text("- 1\n")
        (tmp_path / "model.yaml").write_text("model: {class_path: PretrainModule}\n")
        (tmp_path / "loose.yaml").write_text("data: {class_path: PretrainDataModule, init_args: {seed: '${nix.da}'}}\n")
        config = "--config", "digits_tiny_pretrain"
        for words, told in (
            ([], "give a source, such as digits or a folder of images, or a recipe by --config"),
            ([photos, *config], "--data.init_args.source"),
            ([photos, "--data.source", "photos"], "both name images"),
            (["nowhere"], "no file or folder of that name is here"),
            (["--config", "digits_tiny_pretrian"], "did you mean 'digits_tiny_pretrain'?"),
            (["--config", "broken.yaml"], "broken.yaml cannot be read as YAML"),
            (["--config", "list.yaml"], "list.yaml is no recipe"),
            (["--config", "model.yaml"], "model.yaml has no section data"),
            (["--config", "loose.yaml"], "nix.da"),
            ([*config, "--data.batch_size", 0], "batch_size is 0; it must be at least 1"),
            ([*config, "--limit", -1], "limit is -1; it must be at least 0"),
            ([*config, "--n_images", 0], "n_images is 0; it must be at least 1"),
            ([*config, "--image_size", 0], "image_size is 0; it must be at least 1"),
            ([*config, "--palette", "opnai"], "there is no palette 'opnai'; did you mean 'openai'"),
            ([photos, "--data", "ProbeDataModule"], "has no labels"),
            ([photos, "--data.train_split", "tarin"], "train_split is 'tarin', but"),
            (["--data", "lightning.pytorch.demos.boring_classes.BoringDataModule"], "BoringDataModule is not a data"),
        ):
            assert told in refusal(*words), words

    @pytest.mark.parametrize(
        ("words", "named"),
        [
            ([], "verb"),
            (["shwo"], "shwo"),
            (["show", "digits", "--limt", "3"], "limt"),
            (["show", "digits", "--limit", "some"], "some"),
            (["show", "digits", "--data.batch_sise", "3"], "batch_sise"),
            (["show", "--conf", "digits_tiny_pretrain"], "conf"),
            (["show", "--config", "digits_tiny_pretrain", "--model.palette", "gray:4"], "model.palette"),
        ],
    )
    def test_wrong_usage_is_named(self, words, named, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["data", *words])
        assert stop.value.code == 2
        assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "side", "box"),
    [
        ((8, 8), 128, (0, 0, 128, 128)),
        ((8, 4), 30, (3, 9, 27, 21)),  # three times as large, and no fraction more
        ((200, 50), 128, (0, 48, 128, 80)),
        ((1, 4000), 128, (63, 0, 64, 128)),
    ],
)
def test_letterbox(size, side, box):
    pixels = letterbox(Image.new("RGB", size, (255, 0, 0)), side)
    assert pixels.shape == (3, side, side)
    red = (pixels == torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)).all(0).nonzero()
    (top, left), (bottom, right) = red.amin(0).tolist(), (red.amax(0) + 1).tolist()
    assert (left, top, right, bottom) == box
    assert len(red) == (right - left) * (bottom - top)
