import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from lightning_igpt.callbacks import OnlineProbe
from lightning_igpt.callbacks.online_probe import OnlineHead
from lightning_igpt.data import FineTuneDataModule, PretrainDataModule
from lightning_igpt.modules import PretrainModule
from tests.modules.helpers import BERT, TINY, labelled_images, loader, quiet_trainer
from tests.processes import in_processes

NAME = "online_probe/layer_1/accuracy"


def module(config=TINY, **options):
    torch.manual_seed(0)
    return PretrainModule(config, "gray:8", **options)


def state_of(probe):
    state = probe.state_dict()
    return [value for part in (state["head"], *state["optimizer"]["state"].values()) for value in part.values()]


class Augmented(Dataset):
    """Labelled images that draw from torch's global generator whenever one is read."""

    def __init__(self):
        self.images, self.labels = labelled_images()
        self.read = []

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        self.read.append((row, torch.rand(()).item()))
        return self.images[row], self.labels[row]


@pytest.mark.parametrize("config", [TINY, BERT])
def test_it_learns_the_classes_during_pretraining(tmp_path, config):
    trainer = quiet_trainer(tmp_path, max_steps=30, callbacks=[OnlineProbe(num_classes=3)])
    trainer.fit(module(config), loader(shuffle=True), loader())
    assert trainer.callback_metrics[NAME] > 0.9  # three levels of brightness


@pytest.mark.parametrize(
    ("source", "precision"), [("batches", "32-true"), ("batches", "bf16-mixed"), ("data", "32-true")]
)
def test_training_is_the_same_to_the_last_bit(tmp_path, source, precision):
    """Also where dropout and the order of the images draw from the global generator, as the labeled loader does."""

    def fit(callbacks):
        model, losses = module({**TINY.to_dict(), "dropout": 0.1}), []
        model.network.h[0].eval()  # a part that its owner froze stays as it was
        trainer = quiet_trainer(tmp_path, max_steps=6, val_check_interval=2, precision=precision, callbacks=callbacks)
        model.on_train_batch_end = lambda outputs, *_: losses.append((outputs["loss"].item(), torch.rand(()).item()))
        trainer.fit(model, loader(shuffle=True), loader())
        assert not callbacks or NAME in trainer.callback_metrics
        return losses, [*model.state_dict().items()], [part.training for part in model.modules()]

    labeled = Augmented()
    options = {"data": LightningDataModule.from_datasets(labeled, labeled, batch_size=8)} if source == "data" else {}
    losses, weights, modes = fit([])
    other_losses, other_weights, other_modes = fit([OnlineProbe(num_classes=3, **options)])
    assert losses == other_losses and modes == other_modes
    for (name, mine), (other_name, other) in zip(weights, other_weights, strict=True):
        assert name == other_name and torch.equal(mine, other), name


def test_a_step_is_adam_on_standardised_features(tmp_path):
    """The second step too, when the first has moved mean and variance."""
    probe, model = OnlineProbe(layer=2, num_classes=3, lr=0.05), module()
    seen = []
    model.on_train_batch_end = lambda *_: seen.append(model.network.features(batch, [2])[:, 0].detach())
    images, labels = labelled_images(16)
    batch = model.palette.quantize(images)
    rows = DataLoader([{"image": image, "label": label} for image, label in zip(images, labels, strict=True)], 16)
    quiet_trainer(tmp_path, max_steps=2, callbacks=[probe]).fit(model, rows)
    weight, bias = torch.zeros(3, 16, requires_grad=True), torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([weight, bias], lr=0.05, eps=1e-6)
    for step in range(2):
        mean, variance = torch.cat(seen[: step + 1]).mean(0), torch.cat(seen[: step + 1]).var(0, correction=0)
        logits = (seen[step] - mean) / (16 * variance + 1e-6).sqrt() @ weight.T + bias
        adam.zero_grad()
        F.cross_entropy(logits, labels).backward()
        adam.step()
    head = probe.state_dict()["head"]
    torch.testing.assert_close(head["weight"], weight.detach(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head["bias"], bias.detach(), rtol=1e-3, atol=1e-5)


def test_accuracy_is_over_all_validation_images(tmp_path):
    probe, model = OnlineProbe(layer=2, num_classes=3, lr=0.01), module()
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[probe])
    images, labels = labelled_images(21)
    labels[::4] = 0
    rows = [{"image": image, "label": label} for image, label in zip(images, labels, strict=True)]
    trainer.fit(model, loader(), DataLoader(rows, batch_size=8))  # the last batch is smaller
    head = OnlineHead(16, 3)
    head.load_state_dict(probe.state_dict()["head"])
    with torch.no_grad():
        logits = head(model.eval().network.features(model.palette.quantize(images), [2])[:, 0])
    hits = (logits.argmax(1) == labels).float().mean().item()
    assert 0 < hits < 1
    assert trainer.callback_metrics["online_probe/layer_2/accuracy"].item() == pytest.approx(hits)
    trainer.validate(model, DataLoader(rows, batch_size=21), verbose=False)
    assert trainer.callback_metrics["online_probe/layer_2/accuracy"].item() == pytest.approx(hits)


def test_a_resumed_run_ends_with_its_twins_classifier(tmp_path):
    path = tmp_path / "third.ckpt"

    def fit(ckpt_path=None, lr=0.1):
        probe, model = OnlineProbe(lr=lr), module(warmup_steps=1)
        trainer = quiet_trainer(
            tmp_path, max_steps=6, val_check_interval=2, limit_val_batches=1, enable_checkpointing=False,
            callbacks=[probe],
        )  # fmt: skip
        model.on_train_batch_end = lambda *_: trainer.global_step == 3 and trainer.save_checkpoint(path)
        data = PretrainDataModule("digits", batch_size=16, image_size=4)
        trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return probe, trainer.callback_metrics[NAME]

    whole, accuracy = fit()
    resumed, accuracy_again = fit(path)
    assert accuracy_again == accuracy
    for mine, other in zip(state_of(whole), state_of(resumed), strict=True):
        assert torch.equal(mine, other)
    assert fit(path, lr=0.01)[0].state_dict()["optimizer"]["param_groups"][0]["lr"] == 0.01


@pytest.mark.marathon
@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    """Where the global batches are the same; and the processes agree whatever their loaders hold."""

    def fit(devices, rank=0):
        torch.manual_seed(0)
        probes = [OnlineProbe(), OnlineProbe(2, data=FineTuneDataModule("digits"))]
        options = {"devices": devices, "strategy": "ddp" if devices > 1 else "auto", "callbacks": [*probes]}
        trainer = quiet_trainer(tmp_path, max_steps=5, val_check_interval=5, **options)
        model = PretrainModule({**TINY.to_dict(), "vocab_size": 16, "image_size": 8}, "gray:16")
        trainer.fit(model, PretrainDataModule("digits", batch_size=32))
        heads = [[value.clone() for value in probe.state_dict()["head"].values()] for probe in probes]
        torch.save([*heads, trainer.callback_metrics[NAME]], tmp_path / f"{devices}-{rank}.pt")

    fit(1)
    assert in_processes(lambda rank: fit(2, rank)) == [0, 0]
    one, two, other = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    torch.testing.assert_close(two, other, rtol=0, atol=0)
    torch.testing.assert_close(two[0], one[0], rtol=0, atol=0.005)
    assert two[2].item() == pytest.approx(one[2].item(), abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": 3}, r"layers is \[3\]; it must be one or more numbers from 0 to 2"),
        ({"num_classes": None}, "set num_classes"),
        ({"num_classes": 2}, "labels run from 0 to 2, but num_classes is 2"),
    ],
)
def test_what_cannot_be_probed_is_refused(tmp_path, options, message):
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[OnlineProbe(**{"num_classes": 3, **options})])
    with pytest.raises(ValueError, match=message):
        trainer.fit(module(), loader(), loader())
