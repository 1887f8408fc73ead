import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher
from torch.utils.data import DataLoader

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.images import BadImageError, decode, resize_center_crop
from lightning_igpt.modules.batches import read_batch
from lightning_igpt.palette import Palette, token_rows
from tests.image_files import encoded, noise, picture, rows

ROOT = Path(__file__).parents[1]
# Eight far colors, so that the tokens of noise differ.
CORNERS = Palette([[r, g, b] for r in (-1, 1) for g in (-1, 1) for b in (-1, 1)])
SIZES = [(8, 8), (12, 9), (5, 30), (40, 40), (8, 8), (33, 8)]
PICTURES = [noise(size, seed) for seed, size in enumerate(SIZES)]


def by_hand(images, size=8, palette=CORNERS):
    """Tokens of PIL images, one at a time."""
    tokens = []
    for image in images:
        pixels = torch.from_numpy(np.array(resize_center_crop(decode(image), size)))  # (S, S, 3)
        tokens.append(palette.quantize(pixels.permute(2, 0, 1)[None])[0])
    return torch.stack(tokens)


TOKENS = by_hand(PICTURES)


@pytest.fixture
def transform():
    return CORNERS.transform(size=8)


@pytest.fixture
def dataset():
    return rows(PICTURES, [0, 1, 1, 0, 1, 0]).add_column("text", list("abcdef"))


def same(tokens):
    return np.array_equal(np.asarray(tokens), TOKENS.numpy())


def test_a_plain_batch(transform):
    labels = list(range(6))
    batch = transform({"label": labels, "image": list(PICTURES)})
    assert list(batch) == ["label", "tokens", "palette"]
    assert batch["tokens"].dtype == np.uint16
    assert batch["tokens"].shape == (6, 64)
    assert same(batch["tokens"])
    assert batch["palette"] == [CORNERS.sha256] * 6
    assert batch["label"] is labels


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ({"img": [], "label": []}, ValueError, r"no image column 'image'; the batch has \['img', 'label'\]"),
        ({"image": [], "tokens": []}, ValueError, r"already has the columns \['tokens'\]"),
        ({"image": picture()}, TypeError, r"holds one image, .* map\(..., batched=True\)"),
        ({"image": [picture(), 3]}, TypeError, "image 1 of the batch is a int"),
        ({"image": [np.zeros((4, 4))]}, TypeError, "image 0 .* ndarray"),
        ({"image": [picture(), None]}, BadImageError, "image 1 of the batch: the image is missing"),
        ({"image": ["no.png"]}, BadImageError, r"image 0 of the batch \(no.png\): there is no file"),
        ({"image": [{"bytes": b"junk", "path": "x.jpg"}]}, BadImageError, r"image 0 of the batch \(x.jpg\): the file"),
    ],
)
def test_wrong_batches_are_explained(transform, batch, error, message):
    before = list(batch)
    with pytest.raises(error, match=message):
        transform(batch)
    assert list(batch) == before


def test_every_form_of_an_image(transform, tmp_path):
    image, gray = PICTURES[1], PICTURES[0].convert("L")
    image.save(tmp_path / "a.png")
    path = {"bytes": None, "path": str(tmp_path / "a.png")}
    forms = [image, np.array(image), encoded(image), path["path"], tmp_path / "a.png", path, {"bytes": encoded(image)}]
    assert np.array_equal(transform({"image": forms})["tokens"], by_hand([image]).expand(len(forms), -1).numpy())
    tokens = transform({"image": [gray, np.array(gray), encoded(gray)]})["tokens"]
    assert np.array_equal(tokens, by_hand([gray]).expand(3, -1).numpy())


def test_equal_transforms_have_one_fingerprint(transform):
    columns = np.asfortranarray(CORNERS.colors.numpy())  # the same colors in another order of memory
    others = [Palette(CORNERS.to_list()), Palette(columns), Palette(columns.astype(np.float64))]
    fingerprints = {Hasher.hash(palette.transform(size=8)) for palette in others}
    CORNERS.quantize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8))
    assert fingerprints == {Hasher.hash(transform), Hasher.hash(pickle.loads(pickle.dumps(transform)))}
    different = [
        CORNERS.transform(size=9),
        CORNERS.transform("img", 8),
        Palette(CORNERS.colors.flip(0)).transform(size=8),
    ]
    assert len({Hasher.hash(other) for other in different} | fingerprints) == 4


@pytest.mark.parametrize("decoded", [True, False])
def test_with_transform(transform, dataset, decoded):
    dataset = dataset.cast_column("image", datasets.Image(decode=decoded)).with_transform(transform)
    row = dataset[2]
    assert list(row) == ["label", "text", "tokens", "palette"]
    assert (row["label"], row["text"], row["palette"]) == (1, "c", CORNERS.sha256)
    assert np.array_equal(row["tokens"], TOKENS[2].numpy())
    assert dataset[:4]["tokens"].shape == (4, 64)
    assert dataset[:4]["label"] == [0, 1, 1, 0]
    assert same(dataset[[0, 1, 2, 3, 4, 5]]["tokens"])
    assert same(np.stack([row["tokens"] for row in dataset]))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_makes_batches_that_modules_read(transform, dataset, workers):
    loader = DataLoader(dataset.with_transform(transform), batch_size=4, num_workers=workers)
    batches = list(loader)
    assert [batch["tokens"].dtype for batch in batches] == [torch.uint16] * 2
    config = ImageGPTConfig(n_layer=1, n_head=1, n_embd=8, image_size=8, vocab_size=8)
    read = [read_batch(batch, CORNERS, config) for batch in batches]
    assert torch.equal(torch.cat([batch.tokens for batch in read]), TOKENS)
    assert torch.cat([batch.labels for batch in read]).tolist() == [0, 1, 1, 0, 1, 0]


def test_map_puts_tokens_in_the_place_of_images(transform, dataset):
    mapped = dataset.map(transform, batched=True, batch_size=4, remove_columns=["image"])
    assert mapped.features == {
        **{name: dataset.features[name] for name in ("label", "text")},
        "tokens": datasets.List(datasets.Value("uint16")),
        "palette": datasets.Value("string"),
    }
    assert same(mapped.with_format("numpy")["tokens"][:])
    assert mapped["text"][:] == dataset["text"][:]
    assert set(mapped["palette"]) == {CORNERS.sha256}


@pytest.mark.slow
def test_map_in_several_processes():
    # Torch's threads are up before datasets forks: without care a process would wait for them forever.
    program = """
import datasets, numpy, torch
from lightning_igpt.palette import Palette
from tests.test_tokenizing import CORNERS
from tests.image_files import noise, rows

torch.set_num_threads(2)
torch.ones(1 << 22).add(1)
dataset = rows([noise((64, 64), seed) for seed in range(40)], [0] * 40)
options = {"batched": True, "batch_size": 20, "remove_columns": ["image"]}
results = [dataset.map(CORNERS.transform(size=64), num_proc=n, **options).with_format("numpy") for n in (None, 2)]
assert numpy.array_equal(*[result[:]["tokens"] for result in results])
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)


def test_token_rows(transform, dataset):
    mapped = dataset.map(transform, batched=True)
    forms = [TOKENS, TOKENS.numpy(), TOKENS.numpy().astype(np.uint16), TOKENS.tolist(), list(TOKENS.numpy())]
    forms += [
        dataset.with_transform(transform)[:]["tokens"],
        mapped["tokens"],
        mapped.with_format("torch")[:]["tokens"],
    ]
    for form in forms:
        assert torch.equal(token_rows(form).long(), TOKENS)
    assert token_rows(forms[2]).dtype == torch.uint16
    assert token_rows(TOKENS[0]).shape == token_rows(TOKENS[0].tolist()).shape == (1, 64)
    assert token_rows([]).shape == (0, 0)
    with pytest.raises(ValueError):
        token_rows([[1, 2], [3]])
