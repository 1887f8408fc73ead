import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.utils.data import DataLoader

from lightning_igpt.callbacks import Throughput, throughput
from lightning_igpt.callbacks.throughput import batch_size_of, flops_per_image, peak_tflops
from lightning_igpt.modules import FineTuneModule, PretrainModule, ProbeModule
from lightning_igpt.planning import DEVICES, forward_flops_per_token, train_flops_per_token
from tests.modules.helpers import BERT, TINY, labelled_images, loader, quiet_trainer


class Clock:
    """Time that passes only where a test says so, and counts who asks for it."""

    def __init__(self):
        self.now, self.asked = 0.0, 0

    def __call__(self):
        self.asked += 1
        return self.now


class SlowDisk(TorchCheckpointIO):
    """Takes 500 seconds to write a checkpoint."""

    def __init__(self, clock):
        self.clock = clock

    def save_checkpoint(self, *args, **kwargs):
        super().save_checkpoint(*args, **kwargs)
        self.clock.now += 500


class Batches(lightning.pytorch.Callback):
    """Makes the k-th batch of training take k + 1 seconds and one of validation 1000, and notes what was trained on."""

    def __init__(self, clock):
        self.clock, self.seconds, self.images = clock, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seconds.append(len(self.seconds) + 1)
        self.images.append(batch_size_of(batch))
        self.clock.now += self.seconds[-1]

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.clock.now += 1000


class Recorder(Logger):
    name, version = "recorder", 0

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step, **metrics})

    def of(self, name):
        return {row["step"]: row[name] for row in self.rows if name in row}


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(throughput, "perf_counter", found)
    return found


def fit(folder, clock, module=None, batches=None, callback=None, **options):
    """Train by the clock; gives the trainer, what was logged, and the batches that passed."""
    log, passed = Recorder(), Batches(clock)
    options = {"logger": log, "enable_checkpointing": False, "max_epochs": 1, "limit_val_batches": 0} | options
    callbacks = [passed, *options.pop("callbacks", []), callback or Throughput()]
    trainer = quiet_trainer(folder, callbacks=callbacks, **options)
    trainer.fit(module or PretrainModule(TINY, "gray:8"), batches or loader(64), loader(8))
    return trainer, log, passed


def expected(passed, ends):
    """Images per second of windows that end after these batches; the first batch, which warms up, is in none."""
    starts = [1, *ends[:-1]]
    return [
        sum(passed.images[start:end]) / sum(passed.seconds[start:end])
        for start, end in zip(starts, ends, strict=True)
    ]  # fmt: skip


def test_rates_are_those_of_the_batches_since_the_last_log(tmp_path, clock):
    trainer, log, passed = fit(tmp_path, clock, log_every_n_steps=3)
    rates = log.of("throughput/images_per_second")
    assert list(rates) == [2, 5]
    assert list(rates.values()) == pytest.approx(expected(passed, [3, 6]))
    assert list(log.of("throughput/tokens_per_second").values()) == pytest.approx(
        [16 * rate for rate in rates.values()]
    )
    assert "throughput/mfu" not in trainer.logged_metrics  # the peak of a CPU is not known
    assert trainer.progress_bar_metrics["throughput/images_per_second"] == pytest.approx(rates[5])
    assert clock.asked == 1 + len(rates)  # once to start, then when Lightning logs


def test_validation_and_checkpoints_do_not_count(tmp_path, clock):
    _, log, passed = fit(
        tmp_path, clock, log_every_n_steps=3, limit_val_batches=1, val_check_interval=2, plugins=SlowDisk(clock),
        enable_checkpointing=True, callbacks=[ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)],
    )  # fmt: skip
    assert clock.now > 8 * 500 + 4 * 1000
    assert list(log.of("throughput/images_per_second").values()) == pytest.approx(expected(passed, [3, 6]))


def test_accumulated_batches_all_count(tmp_path, clock):
    batches = loader(60)  # seven batches of 8, and one of 4
    _, log, passed = fit(tmp_path, clock, batches=batches, log_every_n_steps=1, accumulate_grad_batches=3)
    assert passed.images == [8] * 7 + [4]
    assert list(log.of("throughput/images_per_second").values()) == pytest.approx(expected(passed, [3, 6, 8]))


def test_a_resumed_run_measures_anew(tmp_path, clock):
    trainer, *_ = fit(tmp_path, clock, log_every_n_steps=2, max_epochs=-1, max_steps=3)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    log, passed = Recorder(), Batches(clock)
    trainer = quiet_trainer(tmp_path, logger=log, max_steps=8, log_every_n_steps=2, callbacks=[passed, Throughput()])
    trainer.fit(PretrainModule(TINY, "gray:8"), loader(64), ckpt_path=tmp_path / "part.ckpt")
    rates = log.of("throughput/images_per_second")
    assert list(rates) == [5, 7]  # step 4 alone warms up
    assert list(rates.values()) == pytest.approx(expected(passed, [3, 5]))


@pytest.mark.parametrize("config", [TINY, BERT], ids=["autoregressive", "bert"])
def test_mfu_is_operations_by_the_peak(tmp_path, clock, config):
    options = {"callback": Throughput(peak_tflops=2e-6), "log_every_n_steps": 4}
    _, log, passed = fit(tmp_path, clock, PretrainModule(config, "gray:8"), **options)
    flops = train_flops_per_token(config) * 16
    want = [rate * flops / 2e6 for rate in expected(passed, [4, 8])]
    assert list(log.of("throughput/mfu").values()) == pytest.approx(want)


def test_all_processes_count_for_images_and_one_for_mfu(tmp_path, clock, monkeypatch):
    _, log, passed = fit(tmp_path, clock, callback=Throughput(peak_tflops=1e-6), log_every_n_steps=8)
    monkeypatch.setattr(lightning.Trainer, "world_size", 4)
    _, more, _ = fit(tmp_path, clock, callback=Throughput(peak_tflops=1e-6), log_every_n_steps=8)
    assert more.of("throughput/images_per_second")[7] == pytest.approx(4 * expected(passed, [8])[0])
    assert more.of("throughput/mfu") == log.of("throughput/mfu")


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_a_probe_takes_the_forward_pass_up_to_the_deepest_layer(tmp_path, clock, solver):
    module = ProbeModule(network=TINY, palette="gray:8", num_classes=3, layers=[0, 1], solver=solver, lr=0.01)
    head = 2 * TINY.vocab_size * TINY.n_embd
    assert flops_per_image(module) * 2 == (forward_flops_per_token(TINY) - head) * 16  # 1 of 2 blocks
    _, log, passed = fit(tmp_path, clock, module, log_every_n_steps=3)
    rates = log.of("throughput/images_per_second")
    assert [rates[2], rates[5]] == pytest.approx(expected(passed, [3, 6]))
    assert set(rates.values()) == {rates[2], rates[5]}  # the last batch, in which L-BFGS fits, is not measured


def test_operations_of_finetuning():
    head = 2 * TINY.vocab_size * TINY.n_embd
    joint = FineTuneModule(num_classes=3, network=TINY, palette="gray:8")
    alone = FineTuneModule(num_classes=3, network=TINY, palette="gray:8", generative_weight=0)
    assert flops_per_image(joint) == 16 * train_flops_per_token(TINY)
    assert flops_per_image(joint) - flops_per_image(alone) == 3 * 16 * head


@pytest.mark.parametrize("logger", [True, False])
def test_it_needs_neither_logger_nor_progress_bar(tmp_path, logger):
    trainer = quiet_trainer(tmp_path, max_epochs=1, log_every_n_steps=1, logger=logger, callbacks=[Throughput()])
    trainer.fit(PretrainModule(TINY, "gray:8"), loader())
    assert trainer.callback_metrics["throughput/images_per_second"] > 0
    trainer.validate(trainer.lightning_module, loader(), verbose=False)


def test_it_rests_beside_other_modules(tmp_path):
    trainer = quiet_trainer(tmp_path, max_steps=2, log_every_n_steps=1, callbacks=[Throughput()])
    trainer.fit(BoringModel())
    assert not [name for name in trainer.logged_metrics if name.startswith("throughput")]


def test_every_form_of_a_batch_is_counted(tmp_path, clock):
    images, labels = labelled_images(16)
    tokens = torch.zeros(16, 16, dtype=torch.int16)
    for batches in (
        DataLoader(images, batch_size=4),
        DataLoader(list(zip(images, labels, strict=True)), batch_size=4),
        DataLoader([{"label": 0, "tokens": one} for one in tokens], batch_size=4),
        DataLoader([{"label": 0, "image": one} for one in images], batch_size=4),
    ):
        _, log, _ = fit(tmp_path, clock, batches=batches, log_every_n_steps=4)
        assert log.of("throughput/images_per_second") == {3: pytest.approx(12 / (2 + 3 + 4))}
    assert batch_size_of(["a"]) == batch_size_of({}) == batch_size_of(None) == 0


def test_peaks_of_devices(monkeypatch):
    assert peak_tflops("NVIDIA H200", "bf16-mixed") == 989.4
    assert peak_tflops("NVIDIA H100 80GB HBM3", "bf16-true") == 989.4
    assert peak_tflops("NVIDIA H100 PCIe", "16-mixed") == 756
    assert peak_tflops("NVIDIA H100 NVL", "bf16-mixed") == 835
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "bf16-mixed") == 312
    assert peak_tflops("NVIDIA L40S", "bf16-mixed") == 362
    for name in ("", "NVIDIA RTX A1000", "NVIDIA A40", "NVIDIA H20", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"):
        assert peak_tflops(name, "bf16-mixed") is None
    assert peak_tflops("NVIDIA H100 80GB HBM3", "64-true") is None
    for setting, peak in {"highest": 19.5, "high": 156, "medium": 156}.items():
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda setting=setting: setting)
        assert peak_tflops("NVIDIA A100-SXM4-40GB", "32-true") == peak
        assert peak_tflops("Tesla T4", "32-true") == DEVICES["t4"].tflops_32


def test_a_peak_must_be_above_zero():
    with pytest.raises(ValueError, match="peak_tflops is 0; it must be above 0"):
        Throughput(peak_tflops=0)
