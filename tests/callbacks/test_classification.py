import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from lightning_igpt.callbacks import ClassificationReport, classification
from lightning_igpt.modules import FineTuneModule
from tests.modules.helpers import BERT, TINY, labelled_images, loader, quiet_trainer

FILES = ["confusion.csv", "confusion.png", "worst.png"]


def classifier(config=TINY, **options):
    torch.manual_seed(7)  # with this one every class is said
    module = FineTuneModule(num_classes=3, network=config, palette="gray:8", **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval()


def written(folder):
    return sorted(path.name for path in Path(folder).glob("*.*") if path.suffix in (".csv", ".png"))


def read_counts(path):
    with path.open(newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["true", *(row[0] for row in rows)]
    return head[1:], np.array([[int(cell) for cell in row[1:]] for row in rows])


@pytest.mark.parametrize("batch_size", [32, 7])
def test_the_counts_equal_scikit_learns(tmp_path, batch_size):
    module, report = classifier(class_names=["dark", "$gray$", "a, b"]), ClassificationReport()
    trainer = quiet_trainer(tmp_path, callbacks=[report])
    for _ in range(2):  # the second test counts from zero
        metrics = trainer.test(module, loader(batch_size=batch_size), verbose=False)[0]
    said = torch.cat(quiet_trainer(tmp_path).predict(module, loader())).argmax(1)
    names, counts = read_counts(tmp_path / "pictures" / "confusion.csv")
    assert names == ["dark", "$gray$", "a, b"]
    assert np.array_equal(counts, confusion_matrix(labelled_images()[1], said))
    assert len(set(said.tolist())) == 3, "one answer for all would show nothing"
    assert counts.trace() / counts.sum() == pytest.approx(metrics["test/accuracy"])
    assert written(tmp_path / "pictures") == FILES


def test_votes_are_counted_as_the_accuracy_counts_them(tmp_path):
    module = classifier(BERT, n_masks=2)  # ties at random, so the likeliest class is not always what it says
    module.class_names = ["dark"]  # classes beyond the names are numbered
    metrics = quiet_trainer(tmp_path, callbacks=[ClassificationReport()]).test(module, loader(), verbose=False)[0]
    names, counts = read_counts(tmp_path / "pictures" / "confusion.csv")
    assert names == ["dark", "1", "2"]
    likeliest = torch.cat(quiet_trainer(tmp_path).predict(module, loader())).argmax(1)
    assert not np.array_equal(counts, confusion_matrix(labelled_images()[1], likeliest))
    assert counts.trace() / counts.sum() == pytest.approx(metrics["test/accuracy"])


@pytest.mark.parametrize("n_worst", [5, 50])
def test_the_worst_images_are_those_of_the_highest_loss(tmp_path, monkeypatch, n_worst):
    shown, sheet = [], classification.contact_sheet

    def spy(cells, captions, **options):
        shown.extend(zip(cells[:, :, ::48, ::48], captions, strict=True))  # each pixel is drawn as a square of 48
        return sheet(cells, captions, **options)

    monkeypatch.setattr(classification, "contact_sheet", spy)
    module = classifier(class_names=["dark", "gray", "light"])
    quiet_trainer(tmp_path, callbacks=[ClassificationReport(n_worst)]).test(module, loader(batch_size=3), verbose=False)
    images, labels = labelled_images()
    probabilities = torch.cat(quiet_trainer(tmp_path).predict(module, loader()))
    loss, palette = -probabilities[range(32), labels].log(), module.palette
    order = sorted(range(32), key=lambda row: -loss[row])[:n_worst]
    for row, (image, caption) in zip(order, shown, strict=True):
        assert torch.equal(image, palette.dequantize(palette.quantize(images[row : row + 1]))[0])
        said = int(probabilities[row].argmax())
        names = [module.class_names[index] for index in (labels[row], said)]
        assert caption == [f"{names[0]} -> {names[1]} ({probabilities[row, said]:.2f})"]
    assert (np.array(Image.open(tmp_path / "pictures" / "worst.png").convert("RGB")) < 255).any()
