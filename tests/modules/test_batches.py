from collections import namedtuple

import pytest
import torch

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.modules.batches import need_labels, read_batch, to_bytes
from lightning_igpt.palette import Palette

CONFIG = ImageGPTConfig(n_layer=1, n_head=1, n_embd=4, vocab_size=8, image_size=4)
PALETTE = Palette.load("gray:8")
IMAGES = torch.randint(256, (3, 3, 4, 4), dtype=torch.uint8, generator=torch.manual_seed(0))
LABELS = torch.tensor([0, 2, 1])


def read(batch, keys=None):
    return read_batch(batch, PALETTE, CONFIG, keys)


def test_every_form_of_batch_gives_the_same_tokens():
    tokens = PALETTE.quantize(IMAGES)
    forms = [
        IMAGES,
        (IMAGES, LABELS),
        [IMAGES, LABELS],
        {"image": IMAGES, "label": LABELS},
        {"tokens": tokens, "label": LABELS},
        {"tokens": tokens.to(torch.int16), "palette": [PALETTE.sha256] * len(tokens)},
        {"tokens": tokens.to(torch.uint16), "palette": torch.zeros(len(tokens), dtype=torch.int64)},
        {"image": IMAGES.float() / 255},
        {"image": IMAGES.double() / 255},
    ]
    for form in forms:
        assert torch.equal(read(form).tokens, tokens)
    assert torch.equal(read(IMAGES[:, :1]).tokens, PALETTE.quantize(IMAGES[:, :1].expand(-1, 3, -1, -1)))  # gray
    assert read(IMAGES).labels is None
    named = [("image", "labels"), ("pixel_values", "labels"), ("img", "label"), ("input", "target"), ("png", "cls")]
    for image, label in named:
        for batch in ({image: IMAGES, label: LABELS}, namedtuple("Batch", [image, label])(IMAGES, LABELS)):
            assert torch.equal(read(batch).tokens, tokens) and torch.equal(read(batch).labels, LABELS)
    pair, keys = namedtuple("Pair", ["x", "y"])(IMAGES.long(), LABELS), {"image": "photo", "label": "kind"}
    batch, places = {"photo": IMAGES, "kind": LABELS, "image": ["a.png"]}, {"image": 2, "label": 0}
    for found in (read(pair), read(batch, keys), read([LABELS, "a.png", IMAGES], places)):
        assert torch.equal(found.tokens, tokens) and torch.equal(found.labels, LABELS)
    with pytest.raises(ValueError, match=r"no labels.*its keys are \['fine_label', 'img'\].*set keys="):
        need_labels(read({"img": IMAGES, "fine_label": LABELS}), 3)
    for form in forms[1:5]:
        assert torch.equal(read(form).labels, LABELS)


def test_bytes_survive_the_way_through_floats():
    every = torch.arange(256, dtype=torch.uint8)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(to_bytes((every.double() / 255).to(dtype)), every)
    assert torch.equal(to_bytes((every.float() / 255).half().float().clamp(0, 1)), every)


def test_bytes_survive_a_normalisation_that_was_undone():
    every = torch.arange(256, dtype=torch.uint8)
    for mean, std in [(0.485, 0.229), (0.5, 0.5), (0.4467, 0.2010)]:
        assert torch.equal(to_bytes((every.float() / 255 - mean) / std * std + mean), every)
    assert to_bytes(torch.tensor([-0.0019, 1.0019])).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (IMAGES.permute(0, 2, 3, 1), ValueError, r"permute\(0, 3, 1, 2\)"),
        (IMAGES[0], ValueError, r"shape \(B, 3, 4, 4\); got \(3, 4, 4\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), ValueError, "8 x 8 but .* reads 4 x 4; resize them"),
        (torch.zeros(2, 3, 4, 6, dtype=torch.uint8), ValueError, "4 x 6 but the network reads 4 x 4"),
        (IMAGES.float() / 127.5 - 1, ValueError, "Leave out the normalization"),
        (IMAGES.float(), ValueError, r"\.to\(torch\.uint8\)"),
        (torch.full((1, 3, 4, 4), float("nan")), ValueError, r"must lie in \[0, 1\]"),
        (IMAGES.int() + 99, ValueError, r"int32 must lie in 0..255; these run from \d+ to 3\d\d"),
        (IMAGES > 9, TypeError, "got torch.bool"),
        ({"photo": IMAGES, "kind": LABELS}, TypeError, r"\['kind', 'photo'\], but .* exactly one of image, .*keys="),
        ({"img": IMAGES, "image": IMAGES}, TypeError, r"\['image', 'img'\], but a module reads exactly one"),
        ([IMAGES, IMAGES], TypeError, r"Tensor \(3, 3, 4, 4\), Tensor .*: train on one view and one loader"),
        ([IMAGES, LABELS, IMAGES], TypeError, "one view and one loader"),
        ([{"image": IMAGES}, {"image": IMAGES}], TypeError, r"of dict \(\), dict \(\): train on one view"),
        ({"a": {"image": IMAGES}, "b": [IMAGES]}, TypeError, r"\['a', 'b'\]"),
        ({"image": [IMAGES[0]]}, TypeError, "stack them"),
        ("cat.png", TypeError, "got str"),
        ({"tokens": torch.zeros(2, 9, dtype=torch.long)}, ValueError, r"\(B, 16\).*image_size=4"),
        ({"tokens": torch.full((2, 16), 8)}, ValueError, "run from 8 to 8; this network has 8 colors"),
        ({"tokens": torch.zeros(2, 16).long(), "palette": ["f" * 64] * 2}, ValueError, "ffffffffffff, but the network"),
    ],
)
def test_wrong_batches_say_what_was_expected(batch, error, message):
    with pytest.raises(error, match=message):
        read(batch)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "has no labels"),
        (torch.tensor([0, 1, 3]), r"run from 0 to 3, but num_classes is 3"),
        (torch.tensor([0, -1, 1]), "hidden labels"),
        (torch.tensor([0.0, 1.0, 2.0]), "must be integers"),
        (torch.tensor([[0], [1], [2]]), "must be integers of shape"),
    ],
)
def test_wrong_labels_say_so(labels, message):
    with pytest.raises(ValueError, match=message):
        need_labels(read({"image": IMAGES, "label": labels}), 3)
