import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard as HubCard
from PIL import Image
from transformers import pipeline

from lightning_igpt.palette import Palette
from lightning_igpt.weights import ModelCard, save_pretrained
from tests.networks import random_network


def read_card(folder):
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_the_card_states_what_is_known(tmp_path):
    palette = Palette.load("gray:20")
    card = ModelCard("Cats", "me/cats", 5000, 2.34567, measured_at=4000, license="MIT", notes="*Grey* cats: only.")
    save_pretrained(tmp_path, random_network(), palette, card=card)
    front, body = read_card(tmp_path)
    assert front["license"] == "mit" and front["datasets"] == ["me/cats"] and front["library_name"] == "transformers"
    for text in ("# Cats", "| 5,000 |", "| 2.3457 at step 4,000 |", palette.sha256, "*Grey* cats: only.", "sos"):
        assert text in body


def test_the_hub_reads_what_was_measured(tmp_path):
    """With the hub's own reader: data, metrics and results, as far as they are known and of a dataset on the hub."""
    palette, head = Palette.load("gray:20"), torch.ones(3, 32)
    known = {"data": "me/cats", "nats_per_pixel": 2.5, "accuracy": 0.75, "license": "mit"}
    for card, expected in [
        (known, [("accuracy", 0.75), ("nats_per_pixel", 2.5)]),
        (known | {"accuracy": None}, [("nats_per_pixel", 2.5)]),
        (known | {"data": "my own photos"}, []),
        ({}, []),
    ]:
        save_pretrained(tmp_path / "cats", random_network(), palette, card=card, head=head)
        read = HubCard.load(tmp_path / "cats" / "README.md", ignore_metadata_errors=False).data
        results = read.eval_results or []
        assert [(one.metric_type, one.metric_value) for one in results] == expected
        assert {one.dataset_type for one in results} <= {"me/cats"} and {one.dataset_split for one in results} <= {
            "validation"
        }
        assert (read.metrics or []) == [name for name, _ in expected]
        assert read.pipeline_tag is None and read.library_name == "lightning-igpt"
        assert read.datasets == (["me/cats"] if card.get("data") == "me/cats" else None)


def test_the_cards_snippets_run(tmp_path):
    """Both ways of loading, for a network and for a classifier, exactly as the card writes them."""
    network, palette = random_network(), Palette.load("gray:20")
    images = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    for folder, head in [("plain", None), ("classifier", torch.randn(3, 32))]:
        save_pretrained(tmp_path / folder, network, palette, head=head)
        ours, theirs = re.findall(r"```python\n(.*?)```", (tmp_path / folder / "README.md").read_text(), re.DOTALL)
        names = {"images": images}
        exec(ours.replace("path/or/hub-id", str(tmp_path / folder)), names)
        tokens = names["tokens"]
        with torch.no_grad():
            expected = network(tokens) if head is None else network.hidden(tokens).mean(1) @ head.T
        if head is not None:
            torch.testing.assert_close(names["logits"], expected)
        names = {"images": [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).numpy()]}
        exec(theirs.replace("path/or/hub-id", str(tmp_path / folder)), names)
        torch.testing.assert_close(names["logits"], expected, rtol=1e-4, atol=1e-5)
    for scores, probabilities in zip(names["scores"], expected.softmax(1), strict=True):  # of transformers.pipeline
        found = {one["label"]: one["score"] for one in scores}
        torch.testing.assert_close(torch.tensor([found[f"LABEL_{n}"] for n in range(3)]), probabilities)
    with pytest.raises(ValueError, match="input_ids"):  # without sos it would be wrong, so it makes no scores
        pipeline("image-classification", model=str(tmp_path / "classifier"))(names["images"])


def test_odd_texts_break_neither_front_matter_nor_table(tmp_path):
    names = ["a|b", "c\r\nd", 'say "x": \x7f', "ü"]
    card = {"data": "a\x7f/b\u0085c", "license": "x\ny: z", "title": "T\udcff"}
    save_pretrained(
        tmp_path, random_network(), Palette.load("gray:20"), card=card, head=torch.ones(4, 32), class_names=names
    )
    front, body = read_card(tmp_path)
    assert front["license"] == "x\ny: z" and "datasets" not in front
    rows = [line for line in body.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
