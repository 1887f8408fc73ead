"""Each private name that the package uses does what private.py says of it, in the installed versions."""

import multiprocessing
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_igpt import private

CPUINFO = Path("/proc/cpuinfo")
MULTIPLIES_BFLOAT16 = private.multiplies_bfloat16("cpu")  # before conftest.py reports another CPU


def test_instructions_for_bfloat16():
    if CPUINFO.exists() and "flags" in CPUINFO.read_text():
        flags = CPUINFO.read_text().split()
        assert ("amx_tile" in flags or "avx512_bf16" in flags) == MULTIPLIES_BFLOAT16


@pytest.mark.parametrize("length", [8, 9])
def test_attention_is_one_of_the_kernels(length):
    called = []

    class Listed(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 4, length, 16, requires_grad=True)
    with Listed():
        torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
    assert set(called) & set(private.attention_kernels())


def test_the_int8_product():
    x, weight = torch.randn(3, 64).bfloat16(), torch.randint(-127, 128, (32, 64), dtype=torch.int8)
    scale = torch.rand(32).bfloat16()
    expected = x.float() @ (weight * scale.float()[:, None]).T
    product = private.int8_product()(x, weight, scale).float()
    assert (product - expected).abs().max() < 0.01 * expected.abs().max()


def test_the_module_within_a_compiled_one():
    module = torch.nn.Linear(2, 2)
    assert private.uncompiled(torch.compile(module)) is module and private.uncompiled(module) is module


def test_the_data_module_in_use():
    seen = []
    keep = LambdaCallback(on_validation_start=lambda trainer, module: seen.append(private.current_datamodule(trainer)))
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[keep], limit_val_batches=1, **quiet)
    data = BoringDataModule()
    trainer.validate(BoringModel(), datamodule=data, verbose=False)
    trainer.validate(BoringModel(), DataLoader(torch.randn(2, 32)), verbose=False)
    assert seen == [data, None]


def test_clipping_for_a_fused_optimizer():
    optimizer, precision = torch.optim.AdamW([torch.ones(2, requires_grad=True)], fused=True), MixedPrecision
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        precision("bf16-mixed", "cpu").clip_gradients(optimizer, 1.0)
    precision("bf16-mixed", "cpu").clip_gradients(private.allow_clipping(optimizer), 1.0)


def test_workers_are_stopped_and_others_start():
    loader = DataLoader(range(4), num_workers=1, persistent_workers=True)
    iterator, before = iter(loader), set(multiprocessing.active_children())
    assert next(iterator) == 0 and before
    private.stop_workers(iterator)
    assert not any(process.is_alive() for process in before)
    private.forget_iterator(loader)
    assert [int(value) for value in loader] == [0, 1, 2, 3]
    private.stop_workers(iter(loader))
