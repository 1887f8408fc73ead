import lightning
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_igpt.callbacks import Throughput, throughput
from lightning_igpt.callbacks.throughput import batch_size_of, flops_per_image
from lightning_igpt.modules import PretrainModule, ProbeModule
from lightning_igpt.planning import forward_flops_per_token, train_flops_per_token
from tests.modules.helpers import BERT, TINY, loader, quiet_trainer


class Clock:
    """Time that passes only where a test says so, and counts who asks for it."""

    def __init__(self):
        self.now, self.asked = 0.0, 0

    def __call__(self):
        self.asked += 1
        return self.now


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

    def log_hyperparams(self, *args, **kwargs): ...

    def log_metrics(self, metrics, step=None):
        self.rows.append({"step": step, **metrics})

    def of(self, name):
        return {row["step"]: row[name] for row in self.rows if name in row}


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(throughput, "perf_counter", fake)
    return fake


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
    windows = [slice(start, end) for start, end in zip(starts, ends, strict=True)]
    return [sum(passed.images[window]) / sum(passed.seconds[window]) for window in windows]


def test_rates_are_those_of_the_batches_since_the_last_log(tmp_path, clock):
    trainer, log, passed = fit(tmp_path, clock, log_every_n_steps=3)
    rates = log.of("throughput/images_per_second")
    assert list(rates) == [2, 5]
    assert list(rates.values()) == pytest.approx(expected(passed, [3, 6]))
    tokens = log.of("throughput/tokens_per_second").values()
    assert list(tokens) == pytest.approx([16 * rate for rate in rates.values()])
    assert "throughput/mfu" not in trainer.logged_metrics  # the peak of a CPU is not known
    assert trainer.progress_bar_metrics["throughput/images_per_second"] == pytest.approx(rates[5])
    assert clock.asked == 1 + 2 * len(rates)  # to start, then when Lightning logs


def test_validation_and_checkpoints_do_not_count(tmp_path, clock):
    class SlowDisk(TorchCheckpointIO):
        def save_checkpoint(self, *args, **kwargs):
            super().save_checkpoint(*args, **kwargs)
            clock.now += 500

    _, log, passed = fit(
        tmp_path, clock, log_every_n_steps=3, limit_val_batches=1, val_check_interval=2, plugins=SlowDisk(),
        enable_checkpointing=True, callbacks=[ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)],
    )  # fmt: skip
    assert clock.now > 8 * 500 + 4 * 1000
    assert list(log.of("throughput/images_per_second").values()) == pytest.approx(expected(passed, [3, 6]))


def test_accumulated_batches_all_count(tmp_path, clock):
    batches = loader(60)  # seven batches of 8, and one of 4
    _, log, passed = fit(tmp_path, clock, batches=batches, log_every_n_steps=1, accumulate_grad_batches=3)
    assert passed.images == [8] * 7 + [4]
    assert list(log.of("throughput/images_per_second").values()) == pytest.approx(expected(passed, [3, 6, 8]))


def test_a_resumed_run_measures_its_own_part(tmp_path, clock):
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


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_a_probe_takes_the_forward_pass_up_to_the_deepest_layer(tmp_path, clock, solver):
    module = ProbeModule(network=TINY, palette="gray:8", num_classes=3, layers=[0, 1], solver=solver, lr=0.01)
    head = 2 * TINY.vocab_size * TINY.n_embd
    assert flops_per_image(module) * 2 == (forward_flops_per_token(TINY) - head) * 16  # 1 of 2 blocks
    _, log, passed = fit(tmp_path, clock, module, log_every_n_steps=3)
    rates = log.of("throughput/images_per_second")
    assert [rates[2], rates[5]] == pytest.approx(expected(passed, [3, 6]))
    assert set(rates.values()) == {rates[2], rates[5]}  # the last batch, in which L-BFGS fits, is not measured
