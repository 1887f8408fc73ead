import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix

from lightning_igpt.callbacks import ClassificationReport, classification
from lightning_igpt.callbacks.classification import draw_confusion
from lightning_igpt.modules import FineTuneModule, PretrainModule
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
    module, report = classifier(class_names=["dark", "$grey$", "a, b"]), ClassificationReport()
    trainer = quiet_trainer(tmp_path, callbacks=[report])
    for _ in range(2):  # the second test starts anew
        metrics = trainer.test(module, loader(batch_size=batch_size), verbose=False)[0]
    said = torch.cat(quiet_trainer(tmp_path).predict(module, loader())).argmax(1)
    names, counts = read_counts(tmp_path / "confusion.csv")
    assert names == ["dark", "$grey$", "a, b"]
    assert np.array_equal(counts, confusion_matrix(labelled_images()[1], said))
    assert len(set(said.tolist())) == 3, "one answer for all would show nothing"
    assert counts.trace() / counts.sum() == pytest.approx(metrics["test/accuracy"])
    assert written(tmp_path) == FILES


def test_votes_are_counted_as_the_accuracy_counts_them(tmp_path):
    module = classifier(BERT, n_masks=2)  # ties at random, so the likeliest class is not always what it says
    module.class_names = ["dark"]  # classes beyond the names are numbered
    metrics = quiet_trainer(tmp_path, callbacks=[ClassificationReport()]).test(module, loader(), verbose=False)[0]
    names, counts = read_counts(tmp_path / "confusion.csv")
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
    module = classifier(class_names=["dark", "grey", "light"])
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
    assert (np.array(Image.open(tmp_path / "worst.png").convert("RGB")) < 255).any()


def test_pictures_reach_tensorboard_and_the_loggers_folder(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = quiet_trainer(tmp_path, logger=True, callbacks=[ClassificationReport()])
    trainer.test(classifier(), loader(), verbose=False)
    assert written(trainer.log_dir) == FILES and written(tmp_path) == []
    assert {"test/confusion", "test/worst"} <= set(EventAccumulator(trainer.log_dir).Reload().Tags()["images"])


def test_without_worst_images_only_the_confusion_is_drawn(tmp_path):
    quiet_trainer(tmp_path, callbacks=[ClassificationReport(0)]).test(classifier(), loader(), verbose=False)
    assert written(tmp_path) == FILES[:2]


def test_it_rests_where_there_is_no_classification(tmp_path):
    class Other(FineTuneModule):
        tokens_of = property()

    images = loader()
    for module in (PretrainModule(TINY, "gray:8"), Other(num_classes=3, network=TINY, palette="gray:8")):
        quiet_trainer(tmp_path, callbacks=[ClassificationReport()]).test(module, images, verbose=False)
    quiet_trainer(tmp_path, fast_dev_run=True, callbacks=[ClassificationReport()]).test(classifier(), images)
    options = {"max_epochs": 1, "enable_checkpointing": False, "callbacks": [ClassificationReport()]}
    quiet_trainer(tmp_path, **options).fit(classifier(), images, images)  # with its sanity check
    assert written(tmp_path) == []


@pytest.mark.parametrize("n", [2, 12, 101])
def test_any_number_of_classes_can_be_drawn(n):
    counts = torch.diag(torch.arange(n)) * 1000  # the first class never occurs
    picture = draw_confusion(counts, [f"the class of ${number} " + "x" * (number % 60) for number in range(n)])
    assert picture.dtype == torch.uint8 and picture.shape[0] == 3
    dark = (picture == torch.tensor([8, 48, 107], dtype=torch.uint8)[:, None, None]).all(0)  # a share of 1
    assert dark.any()


SCRIPT = """
import sys, torch
import lightning_igpt as igpt
from lightning_igpt.callbacks import ClassificationReport

if __name__ == "__main__":
    devices, out = int(sys.argv[1]), sys.argv[2]
    torch.manual_seed(0)
    network = igpt.ImageGPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=16, image_size=8)
    module = igpt.FineTuneModule(network=network, palette="gray:16", generative_weight=0.0, layer_decay=0.7)
    torch.nn.init.normal_(module.head.weight)
    trainer = igpt.make_trainer(
        max_epochs=1, limit_train_batches=3, default_root_dir=out, accelerator="cpu", devices=devices,
        strategy="ddp" if devices > 1 else "auto", logger=False, enable_progress_bar=False,
        enable_model_summary=False, precision="32-true", callbacks=[ClassificationReport(4)],
    )
    data = igpt.FineTuneDataModule("digits", batch_size=32 // devices, pad=0, flip=False)
    trainer.test(module, data, verbose=False)
    before = module.network.wte.weight.clone()
    trainer.fit(module, data)
    assert not torch.equal(module.network.wte.weight, before)
    print("TRAINED", trainer.global_step)
"""


@pytest.mark.marathon
@pytest.mark.slow
def test_two_processes_report_what_one_does_and_train_without_the_colour_head(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    for devices in (1, 2):
        command = [sys.executable, str(script), str(devices), str(tmp_path / str(devices))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0 and "TRAINED 3" in done.stdout, done.stderr[-3000:]
    assert written(tmp_path / "1") == FILES
    for name in FILES:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes(), name
    assert read_counts(tmp_path / "1" / "confusion.csv")[1].sum() == 360
